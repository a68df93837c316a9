"""What `auto` takes on cards of several sizes, and the plan for it; worked out, nothing is loaded.

    python benchmarks/auto_tokens.py

Prints a table in Markdown: tokens of a micro-batch, and for PPO rows of a rollout, whether a merged
copy has room, and whether keys and values do from one rollout to the next. Llama-3.2's shapes in
NF4 at the scripts' defaults: texts of 512 tokens, pairs of 640 (the prompt counted once), prompts
of 384 with responses of 128. A card of 12 GB has 12e9 bytes here.
"""

import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rlhf  # noqa: F401  before the libraries that it sets up

import ppo_train
import reward_train
import sft_train
from rlhf.engine.card import MOST_TOKENS, STEP, Asked, Plan, Rollouts, deal, tokens_that_fit
from rlhf.engine.plan import Lora, Shape, UpdateSizes, plan_ppo, plan_reward, plan_sft
from rlhf.reports.dry_run import room_of

CARDS = (8, 12, 16, 24, 80)  # GB
LLAMA = {
    "3B": Shape(
        28, 3072, 8192, 24, 8, 128, 128_256, True, in_4bit=True, width=2, fused_attention=True
    ),
    "1B": Shape(
        16, 2048, 8192, 32, 8, 64, 128_256, True, in_4bit=True, width=2, fused_attention=True
    ),
}


def plans(shape: Shape, room: float) -> dict[str, tuple[Plan, int, str]]:
    """Each phase's plan by micro-batch tokens, its longest text, and what else fits."""
    sft = sft_train.Config()
    reward = reward_train.Config()
    ppo = ppo_train.Config()
    layers = shape.layers // 2  # that the roles adapt
    role = Lora(16, layers)
    adapters = {"sft": Lora(16), "reward": role, "policy": role}
    update = UpdateSizes(ppo.episodes_per_update, ppo.num_mini_batches, 384, 128)

    def plans_of_ppo(rollouts: Rollouts) -> Plan:
        return partial(plan_ppo, shape, adapters, update, False, rollouts)

    rollouts = deal(plans_of_ppo, Asked(), ppo.episodes_per_update, 513, room)
    dealt = (
        f", {rollouts.rows} rows, "
        f"{'merged' if rollouts.merged else 'base'}{', kept' if rollouts.kept else ''}"
    )
    return {
        "SFT": (partial(plan_sft, shape, Lora(16), sft.batch_size, 512, False), 512, ""),
        "reward model": (
            partial(plan_reward, shape, Lora(16), role, reward.batch_size, 640, False),
            640,
            "",
        ),
        "PPO": (plans_of_ppo(rollouts), 513, dealt),
    }


def main() -> None:
    print("| | " + " | ".join(f"{card} GB" for card in CARDS) + " |")
    print("|---" * (len(CARDS) + 1) + "|")
    for name, shape in LLAMA.items():
        for phase in ("SFT", "reward model", "PPO"):
            cells = [cell(shape, phase, room_of(card)) for card in CARDS]
            print(f"| {name}, {phase} | {' | '.join(cells)} |")


def cell(shape: Shape, phase: str, room: float) -> str:
    """Tokens, GB of the plan, and GB of the plan with 256 tokens more.

    The last is missing where that is more than `auto` ever takes.
    """
    plan, longest, dealt = plans(shape, room)[phase]
    tokens = tokens_that_fit(plan, longest, room)
    now, more = (sum(plan(number).values()) / 1e9 for number in (tokens, tokens + STEP))
    return f"{tokens:,}: {now:.1f}" + ("" if tokens == MOST_TOKENS else f" ({more:.1f})") + dealt


if __name__ == "__main__":
    main()
