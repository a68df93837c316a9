"""CUDA graphs of functions with fixed shapes and addresses: many kernels in one launch.

A capture records what the card does, with the addresses of that moment. So the function may only
read and write tensors that stay in place, and must not read a value on the CPU.
"""

from collections.abc import Callable, Hashable

import torch

from rlhf.runs.errors import causes_of, is_out_of_memory, one_line
from rlhf.runs.terminal import console


class Graphs:
    """Runs a function eagerly the first time, and from then on as a graph.

    A shape runs eagerly first, so that a card that is too small for it fails there; the second time
    it is captured. A graph keeps its memory until `clear`, so call that when the graph's tensors
    go. All graphs go at once, as resetting one frees a workspace that the others still use.

    Args:
        enabled: False runs everything eagerly, as on a CPU.
    """

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.seen: set[Hashable] = set()
        self.captured: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, shape: Hashable, function: Callable[[], None]) -> None:
        """Run `function`, which must always be the same for one `shape`."""
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
        try:
            self.captured[shape].replay()
        except Exception as error:
            raise_if_out_of_memory(error)
            raise

    def capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """A graph of what `function` does. If capture fails: None, and it is not tried again.

        Raises:
            torch.OutOfMemoryError: half as many rows may still be captured.
        """
        stream = torch.cuda.current_stream()
        try:
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as a loader's, may call CUDA at the same time.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                function()
            return graph
        except Exception as error:
            # A capture that fails at its end leaves its own stream as the current one.
            torch.cuda.set_stream(stream)
            raise_if_out_of_memory(error)
            self.enabled = False
            console.print(
                "warning: decoding runs without CUDA graphs, which is several times slower "
                f"({one_line(error)}); ppo_train.py --no-cuda-graphs does not try them"
            )
            return None

    def clear(self) -> None:
        """Give up all graphs and what they hold."""
        if self.captured:
            torch.cuda.current_stream().synchronize()  # the last steps may still be running
        self.captured.clear()
        self.seen.clear()


def raise_if_out_of_memory(error: Exception) -> None:
    """Raise torch.OutOfMemoryError if that is what `error` was, or what it followed from.

    A capture that runs out of memory in its middle fails once more where it ends.
    """
    cause = next(filter(is_out_of_memory, causes_of(error)), None)
    if cause is not None:
        raise torch.OutOfMemoryError(one_line(cause)) from None
