"""What the scripts are made of. Imports go one way, from right to left.

    runs <- data <- engine <- ppo, reports <- the scripts

`runs` is what any run needs and that knows no model; `data` leads from rows to token ids;
`engine` is the base and its roles; `ppo` is what PPO alone needs; `reports` is what is said of a
model. `chat` and `export` are commands, `python -m rlhf.chat` and `python -m rlhf.export`.
Importing this package sets up libraries that are imported after it.
"""

import logging
import os
import sys

# bitsandbytes logs a missing optional kernel package at import, on every CPU.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# On a CPU oneDNN and its binding each keep compiled code for the last 1024 shapes: 500 MB, as no
# two batches are of one length. 64 are more than a layer has.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
# Micro-batches differ in size, which fragments the memory of a card; pieces that grow do not. torch
# reads it when it starts.
if "torch" not in sys.modules and not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & {
    *os.environ
}:
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
