"""How many tokens go through the model at once: cut by length, halved when memory runs out.

A micro-batch is measured in tokens, so one setting suits short and long texts. It changes neither
what a step computes nor which rows the step has.
"""

import ctypes
from bisect import bisect_left
from collections.abc import Callable
from typing import Literal, TypeVar

import torch

from rlhf.runs.processes import least, sharded
from rlhf.runs.terminal import console

T = TypeVar("T")
CPU_TOKENS = 1024  # of a micro-batch on a CPU, where more takes memory and no less time


def cut_by_tokens(lengths: list[int], tokens: int) -> list[list[int]]:
    """Micro-batches as indices of texts. Similar lengths go together, so attention pads little.

    There are as few as can be, and the largest of so many is as small as can be.

    Args:
        lengths: of the texts, in tokens.
        tokens: at most in a micro-batch, with padding; a longer text gets its own.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    fewest = len(_fill(order, lengths, tokens))
    even = bisect_left(
        range(tokens), True, key=lambda size: len(_fill(order, lengths, size)) <= fewest
    )
    return _fill(order, lengths, even)


def _fill(order: list[int], lengths: list[int], tokens: int) -> list[list[int]]:
    """Micro-batches of texts in this order, each with as many as fit."""
    micro_batches: list[list[int]] = []
    for index in order:
        if not micro_batches or (len(micro_batches[-1]) + 1) * lengths[index] > tokens:
            micro_batches.append([])
        micro_batches[-1].append(index)
    return micro_batches


def free_memory() -> None:
    """Give back the memory that a card's allocator holds unused."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trim_heap() -> None:
    """Give freed tensors' memory back to the system.

    glibc keeps it, in pieces that the next phase's larger tensors do not fit into, so that a run on
    a CPU would grow by a tenth. Other C libraries have no such call, and nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


class MicroBatchSize:
    """Tokens of a micro-batch on this process.

    Args:
        tokens: to begin with.
    """

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.halved = False  # since the last `agree`

    def retry(
        self, work: Callable[[], T], longest: int, undo: Callable[[], None] | None = None
    ) -> T:
        """Return `work()`. When memory runs out, `undo()`, and `work()` again with half the tokens.

        `work` must read `tokens` each time, and must not wait for another process.

        Args:
            longest: tokens of the longest text. If that alone does not fit, nothing smaller helps.
            undo: drops what `work` left half done, such as gradients.
        Raises:
            torch.OutOfMemoryError: a micro-batch of one text does not fit, or the processes wait
                for each other under FSDP.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                if self.tokens <= longest or sharded():
                    raise
            # Outside of `except`, which would keep the tensors that did not fit.
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
        """Take the smallest size of all processes. All processes call it."""
        self.tokens = least(self.tokens)
        self.halved = False


def keep_tokens(micro_batch: MicroBatchSize, asked: int | Literal["auto"], before: int) -> None:
    """Go on with as many tokens as `before`, unless the flag asked for a number."""
    if asked == "auto":
        micro_batch.tokens = before
    elif micro_batch.tokens != before:
        console.print(
            f"A micro-batch has {micro_batch.tokens:,} tokens from now on, not {before:,}."
        )
