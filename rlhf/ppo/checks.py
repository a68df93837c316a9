"""Flags of `ppo_train.py` that do not go together."""

from rlhf.runs.checks import nearest_multiple
from rlhf.runs.errors import UserError
from rlhf.runs.processes import num_processes, sharded


def check_not_sharded() -> None:
    if sharded():
        raise UserError(
            "FSDP is for sft_train.py and reward_train.py: start ppo_train.py with configs/ddp.yaml"
        )


def check_judge(keep: str, gold_checkpoint: str | None) -> None:
    """Raise UserError if the best policy is asked for and nobody judges."""
    if keep == "best" and gold_checkpoint is None:
        raise UserError(
            "--keep best needs a judge that PPO does not train against: name one with "
            "--gold-checkpoint, or leave --keep out"
        )


def check_kl_horizon(kl_controller: str, kl_horizon: int, episodes_per_update: int) -> None:
    """Raise UserError if one update could turn the adaptive KL coefficient negative."""
    if kl_controller == "adaptive" and episodes_per_update >= 5 * kl_horizon:
        raise UserError(
            f"--kl-horizon {kl_horizon} is too short for an update's {episodes_per_update} "
            "episodes: the coefficient could turn negative; the shortest is "
            f"{episodes_per_update // 5 + 1}"
        )


def check_minibatches(episodes_per_update: int, num_mini_batches: int) -> None:
    """Raise UserError unless all minibatches of all processes have the same size."""
    parts = num_mini_batches * num_processes()
    if episodes_per_update % parts:
        among = f" x {num_processes()} processes" if num_processes() > 1 else ""
        raise UserError(
            f"--episodes-per-update {episodes_per_update} is not a multiple of {num_mini_batches} "
            f"minibatches{among}: the nearest is {nearest_multiple(episodes_per_update, parts)}"
        )


def check_episodes(total_episodes: int, episodes_per_update: int) -> None:
    """Raise UserError unless the episodes make whole updates."""
    if total_episodes % episodes_per_update:
        nearest = nearest_multiple(total_episodes, episodes_per_update)
        raise UserError(
            f"--total-episodes {total_episodes} is not a multiple of --episodes-per-update "
            f"{episodes_per_update}: the nearest is {nearest}"
        )


def check_critic_warmup(
    critic_warmup_updates: int, num_updates: int, max_steps: int | None
) -> None:
    """Raise UserError if the critic learns alone in all updates."""
    if num_updates <= critic_warmup_updates:
        raise UserError(
            f"--critic-warmup-updates {critic_warmup_updates} are all that the run makes "
            f"({num_updates}): the policy would not be trained; at most {num_updates - 1} of them "
            f"are possible, or raise {'--max-steps' if max_steps else '--total-episodes'}"
        )
