"""What two or more of the training scripts share, one topic a module."""

import logging

# bitsandbytes logs a missing optional kernel package at import, on every CPU.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
