"""What the processes of preparation have loaded when they begin. Only cache.py names this module, to be preloaded."""

import os

# Before the libraries: each process has one core, and threads do not survive a fork.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ[name] = "1"

import pyarrow.parquet  # noqa: E402, F401
from transformers import AutoTokenizer  # noqa: E402, F401

from data_prep import clean, decontaminate, mask_pass, pii, quality, read_pass  # noqa: E402, F401
