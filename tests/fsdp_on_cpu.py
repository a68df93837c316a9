"""Runs a script under accelerate's FSDP on CPUs: torch can do that, accelerate wants a GPU for it.

torchrun --nproc-per-node 2 tests/fsdp_on_cpu.py sft_train.py ...
"""

import runpy
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

start = AcceleratorState.__init__


def shard_on_cpus(self, *args, fsdp_plugin=None, **kwargs):
    start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = shard_on_cpus
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
