"""Opt-outs that an entry point sets before it imports a library: no telemetry, no prompts, no chatter."""

from __future__ import annotations

import logging
import os
import warnings

OPT_OUTS = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
    "TOKENIZERS_PARALLELISM": "false",  # the tokenizers library warns after a fork otherwise
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}


def opt_out() -> None:
    """Set the opt-outs; what the user has set already stays."""
    for name, value in OPT_OUTS.items():
        os.environ.setdefault(name, value)
    # The libraries tell each other of coming renames; a user of a recipe can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|torch|accelerate)\b")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
