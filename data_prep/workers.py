"""What the processes of preparation have loaded when they begin. Only cache.py names this module, to be preloaded."""

import gc
import os

# Before the libraries: each process has one core, and threads do not survive a fork.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ[name] = "1"

import pyarrow.parquet  # noqa: E402, F401

from data_prep import cache, clean, decontaminate, mask_pass, pii, quality, read_pass  # noqa: E402, F401
from data_prep.tokens import load_tokenizer  # noqa: E402
from recipes.schema import Model  # noqa: E402

# The first tokenizer, whichever it is, has transformers import much of torch: once here, not in each process.
load_tokenizer(Model(base="embedded:tiny"))
gc.collect()
gc.freeze()  # what is loaded stays: no process looks through it again, or copies its pages by doing so
gc.set_threshold(cache.GC_THRESHOLD)
