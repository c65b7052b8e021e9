"""Sorted Fine-Tuning: the trainer of sorted checkpoints, and what measures and exports them."""

import logging

# transformers and peft import bitsandbytes where it is installed, and it tells everyone of kernels
# that it would like to download.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
