"""What fits a card by the memory plan: micro-batch tokens, rollout rows, a merged copy.

Memory is dealt out in this order: rows of a rollout, `FIRST_TOKENS` of a micro-batch, the merged
copy, keys and values that stay from one rollout to the next, more tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from rlhf.engine.micro_batches import CPU_TOKENS
from rlhf.runs.errors import UserError
from rlhf.runs.processes import least, sharded

CARD_OVERHEAD = 0.08  # share of a card kept free for the driver's context and the allocator's gaps
STEP = 256  # tokens; `auto` takes a multiple of it
MOST_TOKENS = 8192  # more does not pay: the card is busy by then
FIRST_TOKENS = 3584  # with fewer a card idles, which costs more than a merged copy gains
CPU_ROWS = 32  # of a rollout on a CPU


@dataclass(frozen=True)
class Asked:
    """What the flags say of rollouts and micro-batches; "auto" leaves it to the plan."""

    rollout_batch_size: int | Literal["auto"] = "auto"
    rollout_weights: Literal["auto", "merged", "base"] = "auto"
    micro_batch_tokens: int | Literal["auto"] = "auto"


@dataclass(frozen=True)
class Rollouts:
    """How responses are sampled."""

    rows: int  # at a time
    merged: bool = False  # from a merged copy, if that is faster
    kept: bool = False  # keys, values and graphs stay on the card between rollouts


Plan = Callable[[int], dict[str, float]]  # bytes by owner, given the tokens of a micro-batch
Plans = Callable[[Rollouts], Plan]


def tokens_that_fit(plan: Plan, longest: int, room: float) -> int:
    """The largest multiple of `STEP`, up to `MOST_TOKENS`, for which the plan fits `room` bytes.

    At least `longest`, the tokens of the longest text: a micro-batch has at least one.
    """
    fitting = [n for n in range(STEP, MOST_TOKENS + 1, STEP) if sum(plan(n).values()) <= room]
    return max(fitting[-1] if fitting else 0, longest)


def deal(plans: Plans, asked: Asked, episodes: int, longest: int, room: float) -> Rollouts:
    """The rollouts that fit: as few as possible, unless --rollout-batch-size sets their rows.

    A merged copy, and keys and values that stay, need room beside `FIRST_TOKENS`, or beside as many
    tokens as were asked for. A merged copy that was asked for is dealt even if it does not fit.

    Args:
        longest: tokens of the longest text.
    """

    def fits(rollouts: Rollouts, tokens: int) -> bool:
        return sum(plans(rollouts)(tokens).values()) <= room

    rows = asked.rollout_batch_size
    tokens = first_tokens(asked.micro_batch_tokens, longest)
    if rows == "auto":
        sizes = [-(-episodes // parts) for parts in range(1, episodes + 1)]
        rows = next((size for size in sizes if fits(Rollouts(size), longest)), 1)
    merged = asked.rollout_weights == "merged" or (
        asked.rollout_weights == "auto" and fits(Rollouts(rows, merged=True), tokens)
    )
    kept = fits(Rollouts(rows, merged, kept=True), tokens)
    return Rollouts(rows, merged, kept)


def first_tokens(asked: int | Literal["auto"], longest: int) -> int:
    """The micro-batch that must fit before memory goes into faster rollouts."""
    return max(FIRST_TOKENS if asked == "auto" else asked, longest)


def room_for_tensors(total: int, free: int, reserved: int, fraction: float) -> float:
    """Bytes of a card that this process may fill.

    Args:
        total, free: bytes of the card, and what is free of it now.
        reserved: bytes that this process already holds.
        fraction: the share of the card that this process may have.
    """
    others = total - free - reserved
    return min(total * fraction, total - others) - total * fraction * CARD_OVERHEAD


def room_on_card(device: torch.device) -> float:
    # The memory fraction is asked for by number.
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    fraction = torch.cuda.get_per_process_memory_fraction(index)
    return room_for_tensors(total, free, torch.cuda.memory_reserved(index), fraction)


def choose_rollouts(
    plans: Plans,
    asked: Asked,
    episodes: int,
    longest: int,
    device: torch.device,
    before: dict[str, Any] | None,
) -> Rollouts:
    """How responses are sampled, the same on all processes. All processes call it.

    Args:
        episodes: of an update, in this process.
        longest: tokens of the longest text.
        before: the sizes that the run began with, if it is resumed.
    Raises:
        UserError: a merged copy was asked for and does not fit by the plan.
    """
    rows = asked.rollout_batch_size
    weights = asked.rollout_weights
    if before and "rollout_rows" in before:  # earlier versions did not record it
        rows = before["rollout_rows"] if rows == "auto" else rows
        merged = (before["rollout_weights"] if weights == "auto" else weights) == "merged"
        return Rollouts(rows, merged, before["rollouts_kept"])
    if device.type != "cuda":
        return Rollouts(CPU_ROWS if rows == "auto" else rows, weights == "merged")
    room = room_on_card(device)
    dealt = deal(plans, asked, episodes, longest, room)
    rows, merged, kept = (least(int(number)) for number in (dealt.rows, dealt.merged, dealt.kept))
    rollouts = Rollouts(rows, bool(merged), bool(kept))
    tokens = first_tokens(asked.micro_batch_tokens, longest)
    needed = sum(plans(replace(rollouts, kept=False))(tokens).values())
    if least(int(weights != "merged" or needed <= room)):
        return rollouts
    raise UserError(
        f"--rollout-weights merged: by the memory plan the {room / 1e9:.1f} GB for tensors on this "
        f"card have no room for a merged copy beside {rows} rows of a rollout and micro-batches of "
        f"{tokens} tokens: leave it at auto, or take base"
    )


def choose_tokens(
    plan: Plan,
    asked: int | Literal["auto"],
    longest: int,
    device: torch.device,
    before: dict[str, Any] | None,
    advice: str,
) -> tuple[int, str]:
    """Tokens of a micro-batch, the same on all processes, and why. All processes call it.

    Args:
        longest: tokens of the longest text.
        before: the sizes that the run began with, if it is resumed.
        advice: what to do if one text does not fit.
    Raises:
        UserError: the plan does not fit the card with as many tokens as were asked for, or with one
            text.
    """
    if asked == "auto" and before:
        return before["micro_batch_tokens"], "as the run began"
    if device.type != "cuda":
        return (CPU_TOKENS, "as on any CPU") if asked == "auto" else (asked, "as asked")
    if sharded():
        return (CPU_TOKENS, "the plan knows no shards") if asked == "auto" else (asked, "as asked")
    room = room_on_card(device)
    fitting = least(tokens_that_fit(plan, longest, room))
    needed = sum(plan(fitting).values())
    if needed > room:
        raise UserError(
            f"by the memory plan one text of {longest} tokens takes {needed / 1e9:.1f} GB, and "
            f"{room / 1e9:.1f} GB of this card are free for it: {advice}"
        )
    if asked == "auto":
        most = fitting == MOST_TOKENS
        return fitting, "the most that pays" if most else "what this card holds by the plan"
    if sum(plan(asked).values()) > room:
        raise UserError(
            f"--micro-batch-tokens {asked} is more than this card holds by the memory plan: "
            f"{fitting} fit"
        )
    return asked, "as asked"


def describe_start(
    device: torch.device, tokens: int, rows: int, dtype: torch.dtype, why: str
) -> str:
    """The first line of a run."""
    where = "CPU"
    if device.type == "cuda":
        where = (
            f"{torch.cuda.get_device_name(device)}, {torch.cuda.mem_get_info(device)[0] / 1e9:.1f} "
            "GB free"
        )
    name = str(dtype).removeprefix("torch.")
    return f"{where}: micro-batches of {tokens:,} tokens ({why}), {rows} rows a step, {name}"
