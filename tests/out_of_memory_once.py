"""Runs a training script whose memory runs out once, amid a step; in the last of several.

torchrun --nproc-per-node 2 tests/out_of_memory_once.py sft_train.py ...
"""

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rlhf  # noqa: F401  before the libraries that it sets up

import pytest
import torch

import rlhf.engine.trainer
from rlhf.engine.roles import SharedBase


def run_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a part has left gradients: SFT's and reward's second step, the policy's first."""
    differentiate = rlhf.engine.trainer.Resumable.differentiate
    upper = SharedBase.upper
    ran_out = []

    def run_out_if(begun):
        if begun and not ran_out:
            ran_out.append(True)
            print("out of memory")
            raise torch.OutOfMemoryError("out of memory")

    def spoiled(self, *args):
        begun = any(weight.grad is not None for weight in self.trained().values())
        run_out_if(self.state.global_step == 1 and begun)
        return differentiate(self, *args)

    def spoiled_upper(self, lower, texts, role):
        learns = role == "policy" and torch.is_grad_enabled()
        run_out_if(learns and any(weight.grad is not None for weight in self.parameters(role)))
        return upper(self, lower, texts, role)

    monkeypatch.setattr(rlhf.engine.trainer.Resumable, "differentiate", spoiled)
    monkeypatch.setattr(SharedBase, "upper", spoiled_upper)


if __name__ == "__main__":
    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        run_out_once(pytest.MonkeyPatch())
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
