"""What two or more of the training scripts share, one topic a module."""

import logging
import os

# bitsandbytes logs a missing optional kernel package at import, on every CPU.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# On a CPU oneDNN keeps compiled code for each of the last 1024 shapes: 200 MB, where no two batches are of one length.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
