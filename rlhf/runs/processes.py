"""What several processes do together: each works on its share, and all take the same step.

With one process, the functions here change nothing.
"""

import os
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from rlhf.runs.errors import UserError


def this_process() -> PartialState:
    """accelerate's view of this process. It uses CPUs only if told to, or without a card."""
    told = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return PartialState(cpu=told or not torch.accelerator.is_available())


def num_processes() -> int:
    return this_process().num_processes


def is_main() -> bool:
    """Whether this is the process that writes files and talks."""
    return this_process().is_main_process


def sharded() -> bool:
    """Whether each process holds only part of every weight, as with configs/fsdp2.yaml."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def world() -> dict[str, Any]:
    """What must not change when a run is resumed: the number of processes, and FSDP.

    With another number each step has other rows; FSDP writes other files.
    """
    return ({"processes": num_processes()} if num_processes() > 1 else {}) | (
        {"fsdp": True} if sharded() else {}
    )


def whole(weight: Tensor) -> Tensor:
    """A whole weight, of which this process may hold only a part. All processes call it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def part(weight: Tensor, like: Tensor) -> Tensor:
    """The part of a whole weight that this process holds of `like`. All processes call it."""
    if not isinstance(like, DTensor):
        return weight
    return distribute_tensor(weight.to(like.device), like.device_mesh, like.placements)


def share(items: list) -> list:
    """This process's share of the items: every n-th of them, with n processes."""
    return items[this_process().process_index :: num_processes()]


def gather(items: list) -> list:
    """All processes' items, of which each has its `share`, in the original order."""
    if num_processes() == 1:
        return items
    n = num_processes()
    everyone = gather_object([items])
    return [everyone[i % n][i // n] for i in range(sum(map(len, everyone)))]


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if num_processes() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def largest(tensor: Tensor) -> Tensor:
    """The elementwise maximum over all processes, in place."""
    if num_processes() > 1 and tensor.numel():
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return tensor


def sum_numbers(numbers: dict[str, float]) -> dict[str, float]:
    """Each number summed over all processes."""
    if num_processes() == 1:
        return numbers
    sums = sum_over_processes(
        torch.tensor(list(numbers.values()), dtype=torch.float64, device=this_process().device)
    )
    return dict(zip(numbers, sums.tolist(), strict=True))


def least(number: int) -> int:
    """The smallest number of all processes."""
    return number if num_processes() == 1 else min(gather_object([number]))


def most(number: int) -> int:
    """The largest number of all processes."""
    return -least(-number)


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by n) of all processes' values [n]."""
    if num_processes() == 1:
        return values.mean(), values.var(unbiased=False)
    on_device = this_process().device  # where processes can exchange tensors
    count, sum_ = sum_over_processes(
        torch.stack([values.new_tensor(len(values)), values.sum()]).double().to(on_device)
    )
    mean = (sum_ / count).to(values)
    return mean, (
        sum_over_processes((values - mean).square().sum().double().to(on_device)) / count
    ).to(values)


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its sum over all processes, in one message.

    All processes must send the same, so a parameter without a gradient counts as zeros. If none of
    them has a gradient, nothing is sent, which must then be so on every process. (PPO trains its
    critic alone for a while.)
    """
    parameters = list(parameters)
    if num_processes() == 1 or all(parameter.grad is None for parameter in parameters):
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    flat = sum_over_processes(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def wait() -> None:
    """Wait until all processes are here."""
    this_process().wait_for_everyone()


def agree(value: Any) -> Any:
    """The main process's value, on all processes."""
    if num_processes() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def agree_on_error(wrong: str | None) -> None:
    """Raise UserError on all processes if something is `wrong` on one of them.

    Otherwise the others would wait for it.
    """
    found = [wrong] if num_processes() == 1 else gather_object([wrong])
    for text in found:
        if text:
            raise UserError(text)
