"""Which flags a script refuses before it does any work."""

import math
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from rlhf.runs.advice import flag
from rlhf.runs.device import device
from rlhf.runs.errors import UserError
from rlhf.runs.processes import num_processes, sharded

# The range of each number, the same in every script that has the flag.
AT_LEAST_ONE = (
    *("lora_rank", "lora_alpha", "max_length", "max_prompt_length", "response_length"),
    *("max_new_tokens", "micro_batch_tokens", "rollout_batch_size", "batch_size"),
    *("max_train_samples", "max_eval_samples", "extra_weight", "max_steps", "eval_steps"),
    *("save_steps", "save_total_limit", "total_episodes", "episodes_per_update"),
    *("num_mini_batches", "num_ppo_epochs", "kl_horizon"),
)
ABOVE_ZERO = (
    *("num_train_epochs", "max_grad_norm", "card_gb", "save_minutes"),
    *("kl_target", "kl_stop", "cliprange", "cliprange_value", "score_clip"),
)
NOT_NEGATIVE = (
    *("learning_rate", "value_learning_rate", "warmup_updates", "critic_warmup_updates"),
    *("kl_coef", "missing_eos_penalty", "center_rewards_coefficient", "reward_weight"),
    *("temperature", "num_printed_samples", "num_test_prompts", "show"),
)
SHARES = ("warmup_ratio", "gamma", "lam")
# What FSDP must be told: states are whole files, and its checkpointing would rename the weights.
SHARDED = {
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}


def check_numbers(flags: Mapping[str, Any]) -> None:
    """Raise UserError for a script's first flag that is out of its range; None and "auto" pass."""
    numbers = {name: value for name, value in flags.items() if isinstance(value, int | float)}

    def given(names: tuple[str, ...]) -> dict[str, float]:
        return {name: numbers[name] for name in names if name in numbers}

    check_at_least_one(**given(AT_LEAST_ONE))
    check_above_zero(**given(ABOVE_ZERO))
    check_between(0, math.inf, **given(NOT_NEGATIVE))
    check_between(0, 1, **given(SHARES))
    check_between(0, 2**32 - 1, **given(("seed",)))


def check_at_least_one(**numbers: float) -> None:
    """Raise UserError unless each number, by its flag's field, is at least 1."""
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"{flag(name)} must be at least 1, not {value}")


def check_above_zero(**numbers: float) -> None:
    """Raise UserError unless each number, by its flag's field, is finite and above 0."""
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise UserError(f"{flag(name)} must be above 0 and finite, not {value}")


def check_between(low: float, high: float, **numbers: float) -> None:
    """Raise UserError unless each number, by its flag's field, is finite and in `low` to `high`."""
    for name, value in numbers.items():
        if not (low <= value <= high and math.isfinite(value)):
            most = "finite" if high == math.inf else f"at most {high:g}"
            raise UserError(f"{flag(name)} must be at least {low:g} and {most}, not {value}")


def check_training(log_with: str | None, dry_run: bool, measure: bool) -> None:
    """Raise UserError for what stops any training script, whatever its numbers."""
    if device().type == "cuda" and torch.cuda.device_count() > 1 and num_processes() == 1:
        raise UserError(
            "several GPUs are visible: start the script with `accelerate launch`, or set "
            "CUDA_VISIBLE_DEVICES=0 to use one"
        )
    for name, value in SHARDED.items() if sharded() else ():
        if os.environ.get(name) != value:
            raise UserError(f"{name.lower()} must be {value} with FSDP, as in configs/fsdp2.yaml")
    if measure and not dry_run:
        raise UserError("--measure belongs to --dry-run: add it, or leave --measure out")
    if log_with and find_spec(log_with) is None:
        raise UserError(
            f"--log-with {log_with}: it is not installed; run `pip install {log_with}`, or leave "
            "the flag out"
        )


def check_batch_size(batch_size: int) -> None:
    """Raise UserError unless all processes get the same number of rows."""
    if batch_size % num_processes():
        nearest = nearest_multiple(batch_size, num_processes())
        raise UserError(
            f"--batch-size {batch_size} is not a multiple of {num_processes()} processes: the "
            f"nearest is {nearest}"
        )


def check_weight(reward_weight: float, reward_function: str | None) -> None:
    """Raise UserError if the reward model is weighed with nothing beside it."""
    if reward_weight != 1 and reward_function is None:
        raise UserError(
            "--reward-weight weighs the reward model beside a --reward-function: name one, or "
            "leave the weight out"
        )


def nearest_multiple(number: int, of: int) -> int:
    """The multiple of `of` that is nearest to `number`; `of` at least."""
    return max(1, round(number / of)) * of
