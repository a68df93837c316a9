"""What the SFT and the reward script add to TRL's trainers alike, and which numbers the training scripts refuse."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from rlhf.checkpoints import check_same
from rlhf.cli import UserError, check_above_zero, check_at_least_one, check_between, check_tracker, flag
from rlhf.decoder import Decoder
from rlhf.processes import agree, is_main, num_processes, part, sharded, this_process, wait, whole, world
from rlhf.reporting import TrainerLog, read_jsonl
from rlhf.resume import (
    HARMLESS,
    asked_to_stop,
    check_stop,
    new_state,
    newest_state,
    read_facts,
    states,
    stop_when_asked,
)

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import FSDP_MODEL_NAME

# What FSDP must be told: the states are whole files, and checkpointing would give the weights other names.
SHARDED = {"FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_ACTIVATION_CHECKPOINTING": "false"}


def device() -> torch.device:
    """The device of this process: a CUDA card if there is one, unless accelerate was told otherwise.

    Raises:
        UserError: it is neither a CUDA card nor a CPU.
    """
    device = this_process().device
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"{device.type} is not supported: set ACCELERATE_USE_CPU=1 to compute on the CPU")
    return device


def effective_batch(config: Any) -> int:
    """Rows of an optimizer step, of all processes."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * num_processes()


def num_steps(config: Any, rows: int) -> int:
    """Optimizer steps of a run. Raises UserError when the rows do not fill one."""
    batch = effective_batch(config)
    if rows < batch:
        names = "per_device_train_batch_size", "gradient_accumulation_steps"
        lower = " or ".join(flag(name) for name in names if getattr(config, name) > 1) or "the number of processes"
        raise UserError(f"{rows} training rows do not fill one batch of {batch}: lower {lower}")
    side_by_side = config.per_device_train_batch_size * num_processes()
    batches = rows // side_by_side if num_processes() > 1 else math.ceil(rows / side_by_side)
    epoch = math.ceil(batches / config.gradient_accumulation_steps)  # as the Trainer counts
    return config.max_steps or math.ceil(epoch * config.num_train_epochs)


def trainer_options(config: Any, dtype: torch.dtype, folder: Path, rows: int) -> dict[str, Any]:
    """The arguments that SFTConfig and RewardConfig share, from the fields of the same names in a script's Config."""
    return {
        "output_dir": str(folder),
        "learning_rate": config.learning_rate,
        "num_train_epochs": config.num_train_epochs,
        "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "per_device_eval_batch_size": 2 * config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_checkpointing": False,  # the decoder's own is used, or `prepare` turns it on
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(config.warmup_ratio * num_steps(config, rows)),
        "max_grad_norm": config.max_grad_norm,
        "bf16": False,  # the base computes in bfloat16 by itself; autocast on top of it would only cost time
        "fp16": dtype == torch.float16,  # for the gradient scaler
        "use_cpu": this_process().device.type == "cpu",
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": this_process().device.type != "cpu",
        "logging_steps": 1,  # what a longer mean has seen would be lost when a run is cut short
        "logging_nan_inf_filter": False,
        "report_to": config.log_with or "none",
        "save_steps": config.save_steps,
        "disable_tqdm": True,
        "seed": config.seed,
    }


def check_numbers(config: Any) -> None:
    """Raise UserError for a number of a training script that cannot be, and for what else keeps it from starting."""
    if device().type == "cuda" and torch.cuda.device_count() > 1 and num_processes() == 1:
        raise UserError(
            "several GPUs are visible: start the script with `accelerate launch`, or set CUDA_VISIBLE_DEVICES=0 to use one"
        )
    for name, value in SHARDED.items() if sharded() else ():
        if os.environ.get(name) != value:
            raise UserError(f"{name.lower()} must be {value} with FSDP, as in configs/fsdp2.yaml")
    check_tracker(config.log_with)
    check_at_least_one(
        config,
        "lora_rank",
        "lora_alpha",
        "max_steps",
        "max_train_samples",
        "max_eval_samples",
        "save_steps",
        "save_total_limit",
    )
    check_above_zero(config, "max_grad_norm", "card_gb")
    check_between(config, 0, math.inf, "learning_rate")
    check_between(config, 0, 2**32 - 1, "seed")


def check_trainer_numbers(config: Any) -> None:
    """The same for the SFT and the reward script."""
    check_numbers(config)
    check_at_least_one(config, "max_length", "per_device_train_batch_size", "gradient_accumulation_steps")
    check_above_zero(config, "num_train_epochs")
    check_between(config, 0, 1, "warmup_ratio")


def check_ppo_numbers(config: Any) -> None:
    """The same for the PPO script."""
    if sharded():
        raise UserError("FSDP is for sft_train.py and reward_train.py: start ppo_train.py with configs/ddp.yaml")
    check_numbers(config)
    check_at_least_one(config, "episodes_per_update", "num_mini_batches", "num_ppo_epochs")
    if config.micro_batch_tokens != "auto":
        check_at_least_one(config, "micro_batch_tokens")
    check_at_least_one(config, "max_prompt_length", "response_length")
    check_at_least_one(config, "total_episodes", "rollout_batch_size", "eval_steps", "kl_horizon")
    check_above_zero(config, "temperature", "kl_target", "kl_stop", "cliprange", "cliprange_value", "score_clip")
    check_between(config, 0, 1, "gamma", "lam")
    check_between(config, 0, math.inf, "value_learning_rate", "kl_coef", "missing_eos_penalty")
    check_between(config, 0, math.inf, "warmup_updates", "critic_warmup_updates", "num_printed_samples")
    if config.kl_controller == "adaptive" and config.episodes_per_update >= 5 * config.kl_horizon:
        raise UserError(
            f"--kl-horizon {config.kl_horizon} is too short for an update's {config.episodes_per_update} episodes: the "
            "coefficient could turn negative"
        )
    parts = config.num_mini_batches * num_processes()
    if config.episodes_per_update % parts:
        among = f" x {num_processes()} processes" if num_processes() > 1 else ""
        raise UserError(
            f"--episodes-per-update {config.episodes_per_update} is not a multiple of {config.num_mini_batches} "
            f"minibatches{among}: the nearest is {nearest_multiple(config.episodes_per_update, parts)}"
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
            f"({config.num_updates}): the policy would not be trained"
        )


def nearest_multiple(number: int, of: int) -> int:
    """The multiple of `of`, at least once it, that is nearest to `number`."""
    return max(1, round(number / of)) * of


def keep_fp32(model: nn.Module) -> None:
    """Cast every trainable weight to float32: on a quantised base TRL has just made them bf16, the head included."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


# ---------------------------------------------------------------- TRL's trainers, resumable


class AllStepsMade(Exception):
    """A run goes on from its very last step."""


class StopWhenAsked(TrainerCallback):
    """Ends the training after the step at hand, with a state, when a signal has asked for it."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:  # the Trainer would make one more before it looks
            raise AllStepsMade
        state.save_steps = args.save_steps  # it has the interrupted run's

    def on_step_end(self, args, state, control, **kwargs):
        if asked_to_stop():
            control.should_save = control.should_training_stop = True


class Restack(TrainerCallback):
    """Has the decoder's passes see the adapters as they are when training begins, and after each step."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder

    def on_train_begin(self, args, state, control, optimizer, **kwargs):
        self.decoder.restack()  # a state may have been loaded
        self.decoder.follow(optimizer.optimizer)  # the one that accelerate's holds


class Resumable(Trainer):
    """What comes before TRL's trainer in a trainer of ours; `run` takes the place of `train`.

    transformers' Trainer writes its checkpoints in place and removes old ones before anybody has looked at the new one.
    Here they go through `rlhf.resume`: the weights that are trained, optimizer, scheduler, scaler, random numbers and the
    place in the data. A loss or gradient that is not finite ends the run.
    """

    partial = Path()  # the state that is being written
    at_hand: list[list[int]]  # token ids of the texts of the step

    def prepare(self, config: Any, folder: Path, inputs: dict[str, Any], name: str) -> None:
        """Find the state to go on from, if there is one and --resume was given.

        Args:
            inputs: what the run starts from, by name: it goes on only from the same.
            name: of the run, at its progress bar.
        Raises:
            UserError: the run began with other settings or inputs.
        """
        inputs = inputs | world()
        self.config, self.folder, self.inputs, self.lines = config, folder, inputs, TrainerLog(folder, name)
        self.at_hand, position = [], 0
        self.resumed = newest_state(folder) if config.resume else None
        if self.resumed:
            facts, where = read_facts(self.resumed), f"the run in {folder}"
            check_same(facts["hyperparameters"], dataclasses.asdict(config), HARMLESS, where)
            check_same(facts["inputs"], inputs, (), where)
            position = facts["position"]
        if is_main():
            self.lines.metrics.cut(position)
        self.remove_callback(PrinterCallback)  # it prints each log as a dictionary; TrainerLog is ours
        self.add_callback(StopWhenAsked())
        self.add_callback(self.lines)
        self.args.eval_on_start = self.eval_dataset is not None and not self.resumed
        if sharded() and config.gradient_checkpointing:
            base = self.model.get_base_model()
            base.activation_checkpointing_enable()
            base.disable_input_require_grads()  # it needs none, and layers below the first adapter would go backward

    def run(self) -> None:
        """Train, from the beginning or from the state that `prepare` found. Raises Stopped when a signal asked for it."""
        with stop_when_asked():
            try:
                self.train(resume_from_checkpoint=str(self.resumed) if self.resumed else None)
            except AllStepsMade:  # its weights are loaded by now
                if is_main():
                    row = {"step": self.state.global_step, "train_runtime": 0.0, "epoch": self.state.epoch}
                    self.lines.metrics.write(row)
            finally:
                self.lines.stop()
            check_stop(together=True)

    def first_row(self, name: str) -> float | None:
        """What the run has logged before its first step."""
        rows = read_jsonl(self.folder / "metrics.jsonl") if is_main() else []
        return agree(rows[0].get(name) if rows else None)

    def trained(self) -> dict[str, nn.Parameter]:
        """The weights that are trained, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """The weights that are trained, by name. All processes call it."""
        return {name: whole(parameter.detach()).contiguous() for name, parameter in self.trained().items()}

    def not_finite(self, what: str) -> UserError:
        """The error for a number that is not finite: the step, the rows at hand, and from where to go on."""
        column = "chosen_ids" if "chosen_ids" in self.train_dataset.column_names else "input_ids"
        rows = [i for i, ids in enumerate(self.train_dataset[column]) if ids in self.at_hand]
        state = next(iter(states(self.folder)), "none")
        return UserError(
            f"step {self.state.global_step + 1}: the {what} is not finite, at usable training rows "
            f"{', '.join(map(str, rows))} (counted from 0); the last good state is {state}; lower "
            "--learning-rate, try --dtype fp32, or look at these rows"
        )

    # -- called by transformers' Trainer

    def get_train_dataloader(self):
        """With several processes the rows that do not fill a last batch for all are left out: accelerate would repeat others."""
        self.args.dataloader_drop_last = num_processes() > 1
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = False

    def training_step(self, model, inputs, *args, **kwargs):
        self.at_hand += [
            ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not loss.isfinite():
            raise self.not_finite("loss")
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaler = self.accelerator.scaler  # with fp16 it skips such a step and halves its scale; below 1 no room is left
        if not math.isfinite(norm) and not (scaler and scaler.get_scale() >= 1):
            raise self.not_finite("gradient")
        self.at_hand = []
        return norm

    def _save_checkpoint(self, model, trial):
        step = self.state.global_step
        facts = {"hyperparameters": dataclasses.asdict(self.config), "inputs": self.inputs}
        facts["position"] = self.lines.metrics.position()
        with new_state(self.folder, step, facts, self.config.save_total_limit) as self.partial:
            Trainer._save_checkpoint(self, model, trial)  # not TRL's, which writes a model card first
            wait()
            checkpoint = self.partial / f"checkpoint-{step}"
            if is_main():
                (checkpoint / f"{FSDP_MODEL_NAME}.bin").unlink(missing_ok=True)  # the same weights once more
                for path in checkpoint.iterdir():
                    path.rename(self.partial / path.name)
                checkpoint.rmdir()

    def _get_output_dir(self, trial):
        return str(self.partial)

    def save_model(self, output_dir=None, _internal_call=False):
        weights = self.whole_weights()
        if is_main():
            Path(output_dir).mkdir(exist_ok=True)
            save_file(weights, f"{output_dir}/weights.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        weights = load_file(f"{resume_from_checkpoint}/weights.safetensors")
        with torch.no_grad():
            for name, parameter in self.trained().items():
                parameter.copy_(part(weights[name], parameter))
