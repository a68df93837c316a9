"""What the scripts are made of. Imports go one way: each part imports only from those to its left.

    runs <- data <- engine <- ppo, reports <- the scripts

`runs` has what any run needs and knows no model; `data` leads from rows to token ids; `engine` is
the base and its roles; `ppo` has what only PPO needs; `reports` says what a model is like. `chat`
and `export` are commands: `python -m rlhf.chat` and `python -m rlhf.export`. Importing this package
sets up libraries that are imported after it.
"""

import logging
import os
import sys

# On every CPU, bitsandbytes complains at import that an optional kernel package is missing.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# On a CPU, oneDNN and its binding each cache compiled code for 1024 shapes. Hardly any two batches
# have the same length, so that takes 500 MB. A layer has fewer than 64 shapes.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
# datasets prints nothing of its own. It reads this at its import, which takes 80 MB, so only what
# needs it imports it.
os.environ.setdefault("DATASETS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
# Micro-batches of different sizes fragment a card's memory, unless its segments can grow. torch
# reads this when it starts.
if "torch" not in sys.modules and not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & {
    *os.environ
}:
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
