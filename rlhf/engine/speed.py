"""How fast a run is: seconds by part, tokens a second, memory, and share of the card's peak.

MFU is the arithmetic that is needed, over the card's dense peak. For each token, a weight takes 2
operations forward and 2 more backward, as frozen weights get no gradient. Attention's own products
and the adapters are not counted; they are a few percent.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rlhf.engine.decoder import Decoder
from rlhf.runs.processes import num_processes

# Dense 16-bit tensor operations a second with float32 accumulation, in 1e12, from the vendor's data
# sheets.
PEAK = {
    "NVIDIA H200": 989,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA L40S": 362,
    "NVIDIA L4": 121,
    "NVIDIA A10": 125,
    "Tesla T4": 65,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165,
    "NVIDIA GeForce RTX 5090": 209,
}


class Stopwatch:
    """Times a step's parts, one after the other. Each ends when the device is done."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.last = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self, part: str) -> None:
        """End the part of this name."""
        now = self.now()
        self.seconds[part] = now - self.last
        self.last = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context that counts towards no part."""
        before = self.now()
        yield
        self.last += self.now() - before


def mfu(
    operations: float, seconds: float, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """The share of the cards' peak that all processes reached; nothing for an unknown card."""
    peak = peak_flops(device, dtype)
    return {"speed/mfu": operations / seconds / peak / num_processes()} if peak else {}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The card's peak operations a second in `dtype`; None if it is unknown."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    peak = PEAK.get(torch.cuda.get_device_name(device))
    return peak and peak * 1e12


def memory_gib(device: torch.device) -> dict[str, float]:
    """The most that tensors and the allocator have held on a card so far; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "memory/allocated_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "memory/reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
    }


@dataclass(frozen=True)
class Work:
    """Operations that a token takes in a forward pass."""

    lower: float  # in the layers below the roles
    upper: float  # in the layers with roles
    head: float  # in the LM head

    @classmethod
    def of(cls, decoder: Decoder, first: int, lm_head: torch.Tensor | None) -> "Work":
        """For a decoder where the layers from `first` on have adapters that train."""
        layers = [
            2.0
            * sum(
                base.in_features * base.out_features
                for linear in layer.maps
                for base in linear.bases
            )
            for layer in decoder.layers
        ]
        head = 0.0 if lm_head is None else 2.0 * lm_head.numel()
        return cls(sum(layers[:first]), sum(layers[first:]), head)

    def training(self, texts: float, predicted: float) -> float:
        """Operations in a step of SFT or of the reward model, which has no LM head.

        Args:
            texts: tokens that go through the model.
            predicted: tokens that the loss needs probabilities of.
        """
        return texts * (self.lower + 2 * self.upper) + predicted * 2 * self.head

    def ppo_update(
        self, texts: int, sampled: int, policy_epochs: float, value_epochs: float
    ) -> float:
        """Operations in an update.

        Args:
            texts: tokens of its prompts and responses.
            sampled: tokens that were sampled.
            policy_epochs, value_epochs: how often each of the two was trained on all of them.
        """
        rollout = texts * (self.lower + self.upper) + sampled * self.head
        # Policy, reference, reward and value read the texts; the first two give log-probabilities.
        measure = texts * (self.lower + 4 * self.upper) + sampled * 2 * self.head
        # Backward goes through the same weights and takes as much.
        policy = policy_epochs * 2 * (texts * self.upper + sampled * self.head)
        value = value_epochs * 2 * texts * self.upper
        return rollout + measure + policy + value
