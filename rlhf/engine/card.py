"""What a card holds by the memory plan: micro-batch tokens, rollout rows, a merged copy.

Memory is dealt in this order: rows of a rollout, `FIRST_TOKENS` of a micro-batch, the merged copy,
keys and values that stay from one rollout to the next, more tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from rlhf.engine.micro_batches import CPU_TOKENS
from rlhf.runs.advice import less_memory
from rlhf.runs.checkpoints import recorded
from rlhf.runs.errors import UserError
from rlhf.runs.processes import agree, least, sharded

CARD_OVERHEAD = 0.08  # share of a card kept free for the driver's context and the allocator's gaps
STEP = 256  # tokens: `auto` takes a multiple of it
MOST_TOKENS = 8192  # more does not pay: a card is at work by then
FIRST_TOKENS = 3584  # with fewer a card idles, which costs more than a merged copy gains
CPU_ROWS = 32  # of a rollout on a CPU


@dataclass(frozen=True)
class Rollouts:
    """How responses are sampled."""

    rows: int  # at a time
    merged: bool = False  # from a merged copy, if it is the faster one
    kept: bool = False  # keys, values and graphs stay on the card between rollouts


Plan = Callable[[int], dict[str, float]]  # bytes by owner, of the tokens of a micro-batch
Plans = Callable[[Rollouts], Plan]


def tokens_that_fit(plan: Plan, longest: int, room: float) -> int:
    """The largest multiple of `STEP`, up to `MOST_TOKENS`, whose plan fits `room` bytes.

    Where even one text has more, it is that text: a micro-batch has one at least.

    Args:
        plan: bytes by owner, from the tokens of a micro-batch.
        longest: tokens of the longest text.
    """
    fitting = [n for n in range(STEP, MOST_TOKENS + 1, STEP) if sum(plan(n).values()) <= room]
    return max(fitting[-1] if fitting else 0, longest)


def deal(plans: Plans, config: Any, episodes: int, longest: int, room: float) -> Rollouts:
    """The rollouts that fit: all episodes in as few as possible, unless --rollout-batch-size says.

    A merged copy and what is kept need room beside `FIRST_TOKENS`, or beside as many as were asked
    for. A merged copy that was asked for may not fit.

    Args:
        longest: tokens of the longest text.
    """

    def fits(rollouts: Rollouts, tokens: int) -> bool:
        return sum(plans(rollouts)(tokens).values()) <= room

    rows = config.rollout_batch_size
    weights = config.rollout_weights
    tokens = first_tokens(config.micro_batch_tokens, longest)
    if rows == "auto":
        sizes = [-(-episodes // parts) for parts in range(1, episodes + 1)]
        rows = next((size for size in sizes if fits(Rollouts(size), longest)), 1)
    merged = weights == "merged" or (
        weights == "auto" and fits(Rollouts(rows, merged=True), tokens)
    )
    kept = fits(Rollouts(rows, merged, kept=True), tokens)
    return Rollouts(rows, merged, kept)


def first_tokens(asked: int | Literal["auto"], longest: int) -> int:
    """Tokens of a micro-batch that come before what makes rollouts fast."""
    return max(FIRST_TOKENS if asked == "auto" else asked, longest)


def room_for_tensors(total: int, free: int, reserved: int, fraction: float) -> float:
    """Bytes of a card that this process may fill.

    Args:
        total: of the card; free: of it now; reserved: what this process holds already.
        fraction: of the card that this process may have.
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
    config: Any, plans: Plans, episodes: int, longest: int, device: torch.device
) -> Rollouts:
    """How responses are sampled, the same for all processes. All processes call it.

    Raises:
        UserError: a merged copy was asked for and does not fit by the plan.
    """
    asked = config.rollout_batch_size
    weights = config.rollout_weights
    if config.resume:
        before = agree(recorded(config.output_dir)) or {}
        if "rollout_rows" in before:  # runs of earlier versions do not say
            rows = before["rollout_rows"] if asked == "auto" else asked
            merged = (before["rollout_weights"] if weights == "auto" else weights) == "merged"
            return Rollouts(rows, merged, before["rollouts_kept"])
    if device.type != "cuda":
        return Rollouts(CPU_ROWS if asked == "auto" else asked, weights == "merged")
    room = room_on_card(device)
    dealt = deal(plans, config, episodes, longest, room)
    rows, merged, kept = (least(int(number)) for number in (dealt.rows, dealt.merged, dealt.kept))
    rollouts = Rollouts(rows, bool(merged), bool(kept))
    tokens = first_tokens(config.micro_batch_tokens, longest)
    if least(
        int(
            weights != "merged"
            or sum(plans(replace(rollouts, kept=False))(tokens).values()) <= room
        )
    ):
        return rollouts
    raise UserError(
        f"--rollout-weights merged: by the memory plan {room / 1e9:.1f} GB of this card have no "
        f"room for a merged copy beside {rows} rows of a rollout and micro-batches of {tokens} "
        "tokens: leave it at auto, or take base"
    )


def choose_tokens(config: Any, plan: Plan, longest: int, device: torch.device) -> tuple[int, str]:
    """Tokens of a micro-batch, the same for all processes, and why. All processes call it.

    Raises:
        UserError: the plan has more than the card, with as many tokens as were asked for, or with
            one text.
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
            f"by the memory plan one text of {longest} tokens takes "
            f"{sum(plan(fitting).values()) / 1e9:.1f} GB, and {room / 1e9:.1f} GB of this card "
            f"are free for it: {less_memory(config)}"
        )
    if asked == "auto":
        return (
            fitting,
            "the most that pays" if fitting == MOST_TOKENS else "what this card holds by the plan",
        )
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
