"""CUDA graphs of functions with fixed shapes and addresses: many kernels for one launch.

A capture records what the card does, with the addresses of that moment. So all that the function
reads or writes must be tensors that stay in place, and it must not read a value on the CPU.
"""

from collections.abc import Callable, Hashable

import torch

from rlhf.runs.errors import is_out_of_memory, one_line
from rlhf.runs.terminal import console


class Graphs:
    """Runs functions as they are at first, then from a graph of them.

    A shape runs eagerly the first time, so that a card that is too small for it says so there, and
    is captured at the second. What a graph wrote is pinned until `clear`, so that goes together
    with the tensors that it works on, and all graphs go at once: resetting one of several frees a
    workspace that the others still use.

    Args:
        enabled: False runs everything eagerly, as on a CPU.
    """

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.seen: set[Hashable] = set()
        self.captured: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, shape: Hashable, function: Callable[[], None]) -> None:
        """`function()`, which is always the same for one `shape`."""
        if not self.enabled:
            function()
            return
        if shape not in self.captured:
            if shape not in self.seen:
                self.seen.add(shape)
                function()
                return
            graph = self.capture(function)
            if graph is None:
                function()
                return
            self.captured[shape] = graph
        self.captured[shape].replay()

    def capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """A graph of what `function` does; None if that failed, after which none is tried any more.

        Raises:
            torch.OutOfMemoryError: half the rows may be captured yet.
        """
        stream = torch.cuda.current_stream()
        try:
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as a loader's, may call CUDA meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                function()
            return graph
        except Exception as error:
            # A capture that fails at its end leaves its own stream as the current one.
            torch.cuda.set_stream(stream)
            if is_out_of_memory(error):
                raise torch.OutOfMemoryError(str(error)) from None
            self.enabled = False
            console.print(
                "warning: decoding runs without CUDA graphs, several times slower "
                f"({one_line(error)}); ppo_train.py --no-cuda-graphs does so from the start"
            )
            return None

    def clear(self) -> None:
        """Give all graphs up, with what they hold."""
        if self.captured:
            torch.cuda.current_stream().synchronize()  # the last steps of one may still be at work
        self.captured.clear()
        self.seen.clear()
