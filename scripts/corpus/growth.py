"""A larger network that starts as a smaller one (Chen et al. 2016, "Net2Net"): the teacher begins where the base ended.

The weights of the small network stand in the first rows and columns of the large one. What is new reads at random and
writes nothing, so the large network answers like the small one until it is trained (up to the small new embeddings).
"""

from __future__ import annotations

from typing import Any

import torch

NEW_SCALE = 0.02  # standard deviation of the new embedding dimensions and of what new units read


@torch.no_grad()
def grow(small: Any, large: Any) -> None:
    """Fill the fresh model `large` with `small`: same depth, head width and vocabulary, wider everywhere else."""
    kept = small.state_dict()
    shrink = (small.config.hidden_size / large.config.hidden_size) ** 0.5  # a norm over dimensions that are mostly zero
    for name, weight in large.state_dict().items():
        old = kept[name]
        if name.endswith("norm.weight"):
            weight.fill_(shrink)
            weight[: len(old)] = shrink * old
        else:
            if name.endswith(("o_proj.weight", "down_proj.weight", "bias")):
                weight.zero_()
            else:
                weight.normal_(0.0, NEW_SCALE)
            weight[tuple(slice(size) for size in old.shape)] = old
