"""Count the bytes of all live tensors by owner, op by op, and keep the largest moment.

A tensor's owner is told by what it is: the base's weights and the adapters' are registered; of the
others a float32 tensor of an adapter's shape is its gradient or a moment of Adam's, the last
dimension (vocabulary) tells logits, and four dimensions with the key heads tell the KV cache; the
rest are activations. Works on any device; made for a CPU, where no allocator counts.
"""

import weakref
from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Within this context every op's outputs are counted until they are freed.

    Args:
        vocabulary: the model's, padded or not.
        cache_shape: (key heads, head dimension) of a tensor [rows, key heads, tokens, head
            dimension].
    """

    def __init__(self, vocabulary: int, cache_shape: tuple[int, int]):
        super().__init__()
        self.vocabulary = vocabulary
        self.cache_shape = cache_shape
        self.live: Counter[str] = Counter()  # bytes by owner, now
        self.peak: Counter[str] = Counter()  # at the largest moment
        self.stopped = False  # whether the largest moment is final
        self.seen: dict[int, str] = {}  # owner by the address of the storage
        self.lora_shapes: set[tuple[int, ...]] = set()  # of the weights that train

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf, self.owner(leaf))
        return result

    def owner(self, tensor: Tensor) -> str:
        shape = tuple(tensor.shape)
        if shape and shape[-1] == self.vocabulary:
            return "logits"
        if shape in self.lora_shapes and tensor.dtype == torch.float32:
            return "optimizer"
        if (
            len(shape) == 4
            and (shape[1], shape[3]) == self.cache_shape
            and not torch.is_grad_enabled()
        ):
            return "KV cache"
        return "activations"

    def add(self, tensor: Tensor, owner: str, again: bool = False) -> None:
        """Count a tensor's storage under `owner`, once; `again` moves it from another owner."""
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        size = storage.nbytes()
        if not size:
            return
        if address in self.seen:
            if again and self.seen[address] != owner:
                self.live[self.seen[address]] -= size
                self.live[owner] += size
                self.seen[address] = owner
            return
        self.seen[address] = owner
        self.live[owner] += size
        weakref.finalize(storage, self.drop, address, size)
        if not self.stopped and sum(self.live.values()) > sum(self.peak.values()):
            self.peak = self.live.copy()

    def drop(self, address: int, size: int) -> None:
        self.live[self.seen.pop(address)] -= size

    def reset(self) -> None:
        """Forget the largest moment."""
        self.peak = self.live.copy()
