"""What several processes do together: each works on its share, all take the same step.

With one process every function here is the identity.
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
    """accelerate's view of this process. It runs several on CPUs only if told to use CPUs."""
    told = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return PartialState(cpu=told or not torch.accelerator.is_available())


def num_processes() -> int:
    return this_process().num_processes


def is_main() -> bool:
    """Whether this is the process that writes files and talks."""
    return this_process().is_main_process


def sharded() -> bool:
    """Whether each process holds part of every weight: configs/fsdp2.yaml started the script."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def world() -> dict[str, Any]:
    """What must not change when a run is resumed: the number of processes, and FSDP.

    Other processes have other rows in a step; FSDP writes other files.
    """
    return ({"processes": num_processes()} if num_processes() > 1 else {}) | (
        {"fsdp": True} if sharded() else {}
    )


def whole(weight: Tensor) -> Tensor:
    """A weight of which this process may hold a part. All processes call it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def part(weight: Tensor, like: Tensor) -> Tensor:
    """Of a whole weight what this process holds of `like`. All processes call it."""
    if not isinstance(like, DTensor):
        return weight
    return distribute_tensor(weight.to(like.device), like.device_mesh, like.placements)


def share(items: list) -> list:
    """Every n-th of the items, for this one of n processes."""
    return items[this_process().process_index :: num_processes()]


def gather(items: list) -> list:
    """The items of all processes, each of which has its `share`, in their order."""
    if num_processes() == 1:
        return items
    n = num_processes()
    everyone = gather_object([items])
    return [everyone[i % n][i // n] for i in range(sum(map(len, everyone)))]


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum over all processes, in the tensor's place."""
    if num_processes() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def largest(tensor: Tensor) -> Tensor:
    """The elementwise maximum over all processes, in the tensor's place."""
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
    """The least of what the processes say."""
    return number if num_processes() == 1 else min(gather_object([number]))


def most(number: int) -> int:
    """The most of what the processes say."""
    return -least(-number)


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (over n) of the values [n] of all processes."""
    if num_processes() == 1:
        return values.mean(), values.var(unbiased=False)
    on_device = this_process().device  # where the processes can add up
    count, sum_ = sum_over_processes(
        torch.stack([values.new_tensor(len(values)), values.sum()]).double().to(on_device)
    )
    mean = (sum_ / count).to(values)
    return mean, (
        sum_over_processes((values - mean).square().sum().double().to(on_device)) / count
    ).to(values)


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its sum over all processes, in one message.

    A parameter that has none here counts as zeros, since all processes must send the same. Only
    where none of them has one, as while PPO trains its critic alone, nothing is sent: then that
    must be so on every process.
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
    """Until all processes are here."""
    this_process().wait_for_everyone()


def agree(value: Any) -> Any:
    """What the main process says, for all."""
    if num_processes() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def agree_on_error(wrong: str | None) -> None:
    """Raise UserError on all processes if one of them has something `wrong`: none waits for it."""
    found = [wrong] if num_processes() == 1 else gather_object([wrong])
    for text in found:
        if text:
            raise UserError(text)
