"""What the SFT and the reward script tell TRL's trainers alike, and which numbers the training scripts refuse."""

import math
from pathlib import Path
from typing import Any

from rlhf.cli import UserError, check_at_least_one, check_tracker

import torch
from accelerate import PartialState
from torch import nn
from transformers import PrinterCallback, Trainer


def device() -> torch.device:
    """The device of this process: a CUDA card if there is one, unless accelerate was told otherwise.

    Raises:
        UserError: it is neither a CUDA card nor a CPU.
    """
    device = PartialState().device
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"{device.type} is not supported: set ACCELERATE_USE_CPU=1 to compute on the CPU")
    return device


def check_one_process() -> None:
    """Raise UserError under a launcher of several processes: they would write one output folder."""
    if PartialState().num_processes > 1:
        raise UserError("the training scripts run in one process: start them with `python`, not with a launcher")


def effective_batch(config: Any) -> int:
    """Rows of an optimizer step."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps


def num_steps(config: Any, rows: int) -> int:
    """Optimizer steps of a run. Raises UserError when the rows do not fill one."""
    batch = effective_batch(config)
    if rows < batch:
        raise UserError(f"{rows} training rows do not fill one batch of {batch}: lower --gradient-accumulation-steps")
    return config.max_steps or math.ceil(rows / batch * config.num_train_epochs)


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
        "gradient_checkpointing": False,  # the decoder's own is used
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(config.warmup_ratio * num_steps(config, rows)),
        "max_grad_norm": config.max_grad_norm,
        "bf16": False,  # the base computes in bfloat16 by itself; autocast on top of it would only cost time
        "fp16": dtype == torch.float16,  # for the gradient scaler
        "use_cpu": PartialState().device.type == "cpu",
        "dataloader_pin_memory": PartialState().device.type != "cpu",
        "logging_steps": config.logging_steps,
        "report_to": config.log_with or "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": config.seed,
    }


def ours_to_print(trainer: Trainer) -> Trainer:
    """Leave printing to `TrainerLog`: the Trainer would print each log as a dictionary."""
    trainer.remove_callback(PrinterCallback)
    return trainer


def check_numbers(config: Any) -> None:
    """Raise UserError for a size of the SFT or the reward script that is below 1, or what else cannot be started."""
    sizes = (
        "max_length",
        "max_train_samples",
        "max_eval_samples",
        "lora_rank",
        "lora_alpha",
        "max_steps",
        "logging_steps",
    )
    check_one_process()
    if device().type == "cuda" and torch.cuda.device_count() > 1:
        raise UserError("several GPUs are visible and TRL's trainers want one: set CUDA_VISIBLE_DEVICES=0")
    check_tracker(config.log_with)
    check_at_least_one(config, *sizes, "per_device_train_batch_size", "gradient_accumulation_steps")


def check_ppo_numbers(config: Any) -> None:
    """The same for the PPO script."""
    sizes = "per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches", "num_ppo_epochs"
    lengths = "max_prompt_length", "response_length", "max_train_samples", "max_eval_samples", "lora_rank", "lora_alpha"
    check_one_process()
    check_tracker(config.log_with)
    check_at_least_one(config, *sizes, *lengths, "total_episodes", "rollout_batch_size", "eval_steps", "max_steps")
    if config.total_episodes % config.batch_size:
        raise UserError(
            f"--total-episodes {config.total_episodes} is not a multiple of an update's {config.batch_size} episodes "
            f"({config.per_device_train_batch_size} x {config.gradient_accumulation_steps} x {config.num_mini_batches})"
        )
    if min(config.temperature, config.kl_stop) <= 0 or config.seed < 0:
        raise UserError("--temperature and --kl-stop must be above 0, and --seed not below")


def keep_fp32(model: nn.Module) -> None:
    """Cast every trainable weight to float32: on a quantised base TRL has just made them bf16, the head included."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
