"""How many tokens go through the model at once: cut by length, halved when memory runs out.

A micro-batch is a number of tokens, so the same setting suits short texts and long ones. It changes
neither what a step computes nor which rows it has.
"""

from collections.abc import Callable
from typing import Literal, TypeVar

import torch

from rlhf.runs.processes import least, sharded
from rlhf.runs.terminal import console

T = TypeVar("T")
CPU_TOKENS = 1024  # a micro-batch on a CPU: more would not be faster there


def cut_by_tokens(lengths: list[int], tokens: int) -> list[list[int]]:
    """Indices of texts in micro-batches, like lengths together, so that attention pads little.

    Args:
        lengths: of the texts, in tokens.
        tokens: in a micro-batch at most, with padding; a longer text gets one of its own.
    """
    micro_batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not micro_batches or (len(micro_batches[-1]) + 1) * lengths[index] > tokens:
            micro_batches.append([])
        micro_batches[-1].append(index)
    return micro_batches


def free_memory() -> None:
    """Return the memory that a card's allocator holds unused."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class MicroBatchSize:
    """Tokens of a micro-batch on this process.

    Args:
        tokens: to begin with.
    """

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.halved = False  # since the processes last agreed

    def retry(
        self, work: Callable[[], T], longest: int, undo: Callable[[], None] | None = None
    ) -> T:
        """`work()`; when memory runs out, `undo()`, and `work()` again with half the tokens.

        `work` must read `tokens` each time, and must not wait for another process.

        Args:
            longest: tokens of the longest text. If that alone does not fit, nothing smaller helps.
            undo: drops what `work` left half-done, such as gradients.
        Raises:
            torch.OutOfMemoryError: a micro-batch of one text does not fit, or FSDP has all
                processes wait for each other.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                if self.tokens <= longest or sharded():
                    raise
            # Outside `except`, which would hold the tensors that did not fit.
            self.halve()
            if undo:
                undo()

    def halve(self) -> None:
        before = self.tokens
        self.tokens = self.tokens // 2
        self.halved = True
        console.print(
            f"out of memory: a micro-batch has {self.tokens:,} tokens from now on, not {before:,}"
        )
        free_memory()

    def agree(self) -> None:
        """Take the least of all processes. All processes call it."""
        self.tokens = least(self.tokens)
        self.halved = False


def keep_tokens(micro_batch: MicroBatchSize, asked: int | Literal["auto"], before: int) -> None:
    """Go on with micro-batches of as many tokens as `before`, unless the flag asked for others."""
    if asked == "auto":
        micro_batch.tokens = before
    elif micro_batch.tokens != before:
        console.print(
            f"A micro-batch has {micro_batch.tokens:,} tokens from now on, not {before:,}."
        )
