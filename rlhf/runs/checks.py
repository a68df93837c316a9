"""Which settings a script refuses before it does any work."""

import math
import os
from importlib.util import find_spec
from typing import Any

import torch

from rlhf.runs.advice import flag
from rlhf.runs.device import device
from rlhf.runs.errors import UserError
from rlhf.runs.processes import num_processes, sharded

# What FSDP must be told: the states are whole files, and checkpointing would give the weights other
# names.
SHARDED = {
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}


def check_at_least_one(config: Any, *names: str) -> None:
    """Raise UserError unless each named field is None or a number of at least 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{flag(name)} must be at least 1, not {value}")


def check_above_zero(config: Any, *names: str) -> None:
    """Raise UserError unless each named field is a finite number above 0."""
    for name in names:
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise UserError(f"{flag(name)} must be above 0 and finite, not {value}")


def check_between(config: Any, low: float, high: float, *names: str) -> None:
    """Raise UserError unless each named field is a finite number from `low` to `high`."""
    for name in names:
        value = getattr(config, name)
        if not (low <= value <= high and math.isfinite(value)):
            most = "finite" if high == math.inf else f"at most {high:g}"
            raise UserError(f"{flag(name)} must be at least {low:g} and {most}, not {value}")


def check_tracker(name: str | None) -> None:
    """Raise UserError when the tracker that --log-with names is not installed."""
    if name and find_spec(name) is None:
        raise UserError(
            f"--log-with {name}: it is not installed; run `pip install {name}`, or leave the flag "
            "out"
        )


def check_numbers(config: Any) -> None:
    """Raise UserError for impossible numbers of a training script, and for what else stops it."""
    if device().type == "cuda" and torch.cuda.device_count() > 1 and num_processes() == 1:
        raise UserError(
            "several GPUs are visible: start the script with `accelerate launch`, or set "
            "CUDA_VISIBLE_DEVICES=0 to use one"
        )
    for name, value in SHARDED.items() if sharded() else ():
        if os.environ.get(name) != value:
            raise UserError(f"{name.lower()} must be {value} with FSDP, as in configs/fsdp2.yaml")
    if config.measure and not config.dry_run:
        raise UserError("--measure belongs to --dry-run: add it, or leave --measure out")
    check_tracker(config.log_with)
    check_at_least_one(
        config, "lora_rank", "lora_alpha", "max_steps", "max_train_samples", "max_eval_samples"
    )
    check_at_least_one(config, "save_steps", "save_total_limit")
    if config.micro_batch_tokens != "auto":
        check_at_least_one(config, "micro_batch_tokens")
    check_above_zero(config, "max_grad_norm", "card_gb", "save_minutes")
    check_between(config, 0, math.inf, "learning_rate")
    check_between(config, 0, 2**32 - 1, "seed")


def check_trainer_numbers(config: Any) -> None:
    """The same for the SFT and the reward script."""
    check_numbers(config)
    check_at_least_one(config, "batch_size", "max_length")
    check_above_zero(config, "num_train_epochs")
    check_between(config, 0, 1, "warmup_ratio")
    if config.eval_steps != "auto":
        check_at_least_one(config, "eval_steps")
    if config.batch_size % num_processes():
        nearest = nearest_multiple(config.batch_size, num_processes())
        raise UserError(
            f"--batch-size {config.batch_size} is not a multiple of {num_processes()} processes: "
            f"the nearest is {nearest}"
        )


def check_weight(config: Any) -> None:
    """Raise UserError unless the reward model's weight is possible, and has something beside it."""
    check_between(config, 0, math.inf, "reward_weight")
    if config.reward_weight != 1 and config.reward_function is None:
        raise UserError(
            "--reward-weight weighs the reward model beside a --reward-function: name one, or "
            "leave the weight out"
        )


def check_ppo_numbers(config: Any) -> None:
    """The same for the PPO script."""
    if sharded():
        raise UserError(
            "FSDP is for sft_train.py and reward_train.py: start ppo_train.py with configs/ddp.yaml"
        )
    check_numbers(config)
    check_at_least_one(config, "episodes_per_update", "num_mini_batches", "num_ppo_epochs")
    check_at_least_one(config, "max_prompt_length", "response_length")
    check_at_least_one(config, "total_episodes", "eval_steps", "kl_horizon")
    if config.rollout_batch_size != "auto":
        check_at_least_one(config, "rollout_batch_size")
    check_above_zero(
        config, "temperature", "kl_target", "kl_stop", "cliprange", "cliprange_value", "score_clip"
    )
    check_between(config, 0, 1, "gamma", "lam")
    check_between(config, 0, math.inf, "value_learning_rate", "kl_coef", "missing_eos_penalty")
    check_between(
        config, 0, math.inf, "warmup_updates", "critic_warmup_updates", "num_printed_samples"
    )
    check_weight(config)
    if config.keep == "best" and config.gold_checkpoint is None:
        raise UserError(
            "--keep best needs a judge that PPO does not train against: name one with "
            "--gold-checkpoint, or leave --keep out"
        )
    if config.kl_controller == "adaptive" and config.episodes_per_update >= 5 * config.kl_horizon:
        raise UserError(
            f"--kl-horizon {config.kl_horizon} is too short for an update's "
            f"{config.episodes_per_update} episodes: the coefficient could turn negative; the "
            f"shortest is {config.episodes_per_update // 5 + 1}"
        )
    parts = config.num_mini_batches * num_processes()
    if config.episodes_per_update % parts:
        among = f" x {num_processes()} processes" if num_processes() > 1 else ""
        raise UserError(
            f"--episodes-per-update {config.episodes_per_update} is not a multiple of "
            f"{config.num_mini_batches} minibatches{among}: the nearest is "
            f"{nearest_multiple(config.episodes_per_update, parts)}"
        )
    if config.total_episodes % config.episodes_per_update:
        nearest = nearest_multiple(config.total_episodes, config.episodes_per_update)
        raise UserError(
            f"--total-episodes {config.total_episodes} is not a multiple of --episodes-per-update "
            f"{config.episodes_per_update}: the nearest is {nearest}"
        )
    if config.num_updates <= config.critic_warmup_updates:
        raise UserError(
            f"--critic-warmup-updates {config.critic_warmup_updates} are all that the run makes "
            f"({config.num_updates}): the policy would not be trained; at most "
            f"{config.num_updates - 1} of them are possible, or raise "
            f"{'--max-steps' if config.max_steps else '--total-episodes'}"
        )


def nearest_multiple(number: int, of: int) -> int:
    """The multiple of `of`, at least once it, that is nearest to `number`."""
    return max(1, round(number / of)) * of
