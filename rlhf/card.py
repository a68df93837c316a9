"""What a card holds, by the memory plan: tokens of a micro-batch, rows of a rollout, a merged copy to sample from.

Memory is dealt in this order: rows of a rollout, `FIRST_TOKENS` of a micro-batch, the merged copy, more tokens.
"""

from collections.abc import Callable
from typing import Any

from rlhf.checkpoints import recorded
from rlhf.cli import UserError, less_memory
from rlhf.micro_batches import CPU_TOKENS
from rlhf.processes import agree, least, sharded

import torch

CARD_OVERHEAD = 0.08  # share of a card kept free for the driver's context and the allocator's gaps
STEP = 256  # tokens: `auto` takes a multiple of it
MOST_TOKENS = 8192  # more does not pay: a card is at work by then
FIRST_TOKENS = 3584  # with fewer a card idles, which costs more than a merged copy gains
CPU_ROWS = 32  # of a rollout on a CPU

Plan = Callable[[int], dict[str, float]]  # bytes by owner, of the tokens of a micro-batch
Plans = Callable[[int, bool], Plan]  # of the rows of a rollout, and whether there is a merged copy


def tokens_that_fit(plan: Plan, longest: int, room: float) -> int:
    """The largest multiple of `STEP`, `MOST_TOKENS` at most, whose plan has no more than `room` bytes.

    Where even one text has more, it is that text: a micro-batch has one at least.

    Args:
        plan: bytes by owner, of a micro-batch of so many tokens.
        longest: tokens of the longest text.
    """
    fitting = [n for n in range(STEP, MOST_TOKENS + 1, STEP) if sum(plan(n).values()) <= room]
    return max(fitting[-1] if fitting else 0, longest)


def deal(plans: Plans, asked_rows: int | str, episodes: int, longest: int, room: float) -> tuple[int, bool]:
    """Rows of a rollout, and whether a merged copy fits beside them and `FIRST_TOKENS`.

    Args:
        asked_rows: or "auto": all episodes in as few rollouts as their keys and values allow.
        longest: tokens of the longest text.
    """

    def fits(rows: int, merged: bool, tokens: int) -> bool:
        return sum(plans(rows, merged)(tokens).values()) <= room

    rows = asked_rows
    if rows == "auto":
        sizes = [-(-episodes // parts) for parts in range(1, episodes + 1)]
        rows = next((size for size in sizes if fits(size, False, longest)), 1)
    return rows, fits(rows, True, max(FIRST_TOKENS, longest))


def room_for_tensors(total: int, free: int, reserved: int, fraction: float) -> float:
    """Bytes of a card that this process may fill.

    Args:
        total: of the card; free: of it now; reserved: what this process holds already.
        fraction: of the card that this process may have.
    """
    others = total - free - reserved
    return min(total * fraction, total - others) - total * fraction * CARD_OVERHEAD


def room_on_card(device: torch.device) -> float:
    index = torch.cuda.current_device() if device.index is None else device.index  # the fraction is asked by number
    free, total = torch.cuda.mem_get_info(index)
    fraction = torch.cuda.get_per_process_memory_fraction(index)
    return room_for_tensors(total, free, torch.cuda.memory_reserved(index), fraction)


def choose_rollout(config: Any, plans: Plans, episodes: int, longest: int, device: torch.device) -> tuple[int, bool]:
    """Rows of a rollout, and whether it may have a merged copy, the same for all processes. All processes call it.

    Raises:
        UserError: a merged copy was asked for and does not fit by the plan.
    """
    asked, weights = config.rollout_batch_size, config.rollout_weights
    if config.resume:
        before = agree(recorded(config.output_dir)) or {}
        if "rollout_rows" in before:  # runs of earlier versions do not say
            rows = before["rollout_rows"] if asked == "auto" else asked
            return rows, (before["rollout_weights"] if weights == "auto" else weights) == "merged"
    if device.type != "cuda":
        return (CPU_ROWS if asked == "auto" else asked), weights == "merged"
    room = room_on_card(device)
    rows, fits = deal(plans, asked, episodes, longest, room)
    rows, fits = least(rows), bool(least(int(fits)))
    if weights == "merged" and not fits:
        raise UserError(
            f"--rollout-weights merged: by the memory plan {room / 1e9:.1f} GB of this card have no room for a merged copy "
            f"beside {rows} rows of a rollout and micro-batches of {FIRST_TOKENS} tokens: leave it at auto, or take base"
        )
    return rows, fits and weights != "base"


def choose_tokens(config: Any, plan: Plan, longest: int, device: torch.device) -> tuple[int, str]:
    """Tokens of a micro-batch, the same for all processes, and why. All processes call it.

    Raises:
        UserError: the plan has more than the card, with as many tokens as were asked for, or with one text.
    """
    asked = config.micro_batch_tokens
    if asked == "auto" and config.resume:
        before = agree(recorded(config.output_dir))
        if before:
            return before["micro_batch_tokens"], "as the run began"
    if device.type != "cuda":
        return (CPU_TOKENS, "as on any CPU") if asked == "auto" else (asked, "as asked")
    if sharded():
        return (CPU_TOKENS, "the plan knows no shards") if asked == "auto" else (asked, "as asked")
    room = room_on_card(device)
    fitting = least(tokens_that_fit(plan, longest, room))
    if sum(plan(fitting).values()) > room:
        raise UserError(
            f"by the memory plan one text of {longest} tokens takes {sum(plan(fitting).values()) / 1e9:.1f} GB, and "
            f"{room / 1e9:.1f} GB of this card are free for it: {less_memory(config)}"
        )
    if asked == "auto":
        return fitting, "the most that pays" if fitting == MOST_TOKENS else "what this card holds by the plan"
    if sum(plan(asked).values()) > room:
        raise UserError(f"--micro-batch-tokens {asked} is more than this card holds by the memory plan: {fitting} fit")
    return asked, "as asked"


def describe_start(device: torch.device, tokens: int, rows: int, dtype: torch.dtype, why: str) -> str:
    """The first line of a run."""
    where = "CPU"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, {torch.cuda.mem_get_info(device)[0] / 1e9:.1f} GB free"
    name = str(dtype).removeprefix("torch.")
    return f"{where}: micro-batches of {tokens:,} tokens ({why}), {rows} rows a step, {name}"
