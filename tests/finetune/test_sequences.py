"""Log-probabilities and answers in bounded memory: the numbers of the model, without the logits of whole rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_distilling import tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.losses import slice_size
from finetune.sequences import cached_tokens, log_probabilities

TOKENIZER: Any = SimpleNamespace(backend=SimpleNamespace(pad_token_id=0))


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that is made."""

    found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(one, torch.Tensor) and one.untyped_storage().nbytes() >= one.numel() * one.element_size():
                self.found = max(self.found, one.numel())
        return made


class Odd(LlamaForCausalLM):  # type: ignore[misc]
    """A model that does more after its head than its configuration says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * 1.5
        return found


def llama(kind: Any = LlamaForCausalLM, vocab_size: int = 120) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(LlamaConfig(vocab_size=vocab_size, **sizes)).eval()


def rows(count: int, vocabulary: int) -> list[tuple[list[int], list[bool]]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [5 + 7 * i for i in range(count)]
    ids = [torch.randint(1, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return [(row, [i % 3 != 1 for i in range(len(row))]) for row in ids]


@pytest.mark.parametrize(
    "model",
    [
        lambda: llama(),
        lambda: llama(Odd),
        lambda: tiny("Gemma2", head_dim=16, final_logit_softcapping=0.5, query_pre_attn_scalar=16),
        lambda: tiny("Granite", logits_scaling=4.0),
        lambda: tiny("Phi"),
        lambda: llama().to(torch.bfloat16),
    ],
    ids=["plain", "head that cannot be told apart", "capped", "scaled", "bias", "bfloat16"],
)
def test_log_probabilities_are_those_of_the_models_own_logits(model: Any) -> None:
    model = model()
    sequences = rows(6, 120)
    found = log_probabilities(model, TOKENIZER, sequences, "test")
    for (ids, mask), values in zip(sequences, found, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
        wanted = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0][torch.tensor(mask[1:])]
        near = 0.05 if model.dtype == torch.bfloat16 else 1e-5  # padding changes the order of sums
        assert values.dtype == torch.float32 and values.tolist() == pytest.approx(wanted.tolist(), abs=near)
    assert log_probabilities(model, TOKENIZER, [], "test") == []


def test_no_logits_of_a_whole_row_are_made() -> None:
    """At a vocabulary of 150,000 those of a row of 2,400 tokens would take 1.4 GiB, and their softmax as much again."""
    vocabulary = 100_000
    model = llama(vocab_size=vocabulary)
    ids = [1 + i % 500 for i in range(700)]
    with Largest() as largest:
        (found,) = log_probabilities(model, TOKENIZER, [(ids, [i > 100 for i in range(700)])], "test")
    assert len(found) == 599 and slice_size(vocabulary) == 256
    assert largest.found == 256 * vocabulary


def test_answers_are_batched_by_their_keys_and_values() -> None:
    """A token of a model of Qwen3-8B's shape keeps 147,456 bytes: 2 GiB hold 14,563, whatever the vocabulary."""
    shape = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    config = LlamaConfig(vocab_size=151_936, hidden_size=4096, **shape)
    assert cached_tokens(SimpleNamespace(config=config, dtype=torch.bfloat16)) == 14_563
    assert cached_tokens(llama()) == 16_384
