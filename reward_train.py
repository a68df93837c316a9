"""Phase 2: a reward model that learns which of two responses people prefer.

In: `checkpoints/sft` and a preference data set. Out: `checkpoints/reward`, a LoRA adapter with a scalar head that PEFT
opens as a sequence classification model.

1. Tokenise each prompt with its chosen and its rejected response, both closed by EOS.
2. Load the base the SFT adapter was trained on, stack a LoRA adapter on its upper layers, add a float32 scalar head.
3. Train with TRL's RewardTrainer: -log sigmoid(score(chosen) - score(rejected)) (Bradley-Terry).
4. Score the test split: accuracy with its interval, margin, loss, and what "the longer response wins" would get.

    python reward_train.py
    python reward_train.py --preset demo

Next: python ppo_train.py
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf.checkpoints import check_output, output_folder, read_run, write_run
from rlhf.cli import UserError, next_command, run
from rlhf.data import PromptFormat, fingerprint, load_pairs, tokenize_pairs
from rlhf.decoder import lay_out_pairs, unpad
from rlhf.modeling import SharedBase, choose_dtype, load_base, load_tokenizer, same_base, save_stacked
from rlhf.plan import SAMPLE, plan_reward, read_shape, show_data, show_end, show_plan
from rlhf.reporting import TrainerLog, console, plot_curves, preference, wilson_interval
from rlhf.training import (
    check_numbers,
    device,
    effective_batch,
    keep_fp32,
    num_steps,
    ours_to_print,
    trainer_options,
)

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import set_seed
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import RewardConfig, RewardTrainer


@dataclass(frozen=True)
class Config:
    sft_checkpoint: str = "checkpoints/sft"  # its base model, precision and prompt format are taken over
    base_model: str | None = None  # where the base is now, if not where the SFT checkpoint says
    dataset: str = "Dahoas/rm-static"  # hub id, folder, .jsonl, .json, .csv or .parquet
    output_dir: str = "checkpoints/reward"  # a folder that is empty or not there yet
    overwrite: bool = False  # replace what output_dir holds
    dry_run: bool = False  # check data, checkpoints and flags, print the plan for a card, and stop
    card_gb: float = 12.0  # the card that --dry-run plans for

    max_length: int = 512  # tokens of prompt and response; prompts are cut from the left at a turn boundary
    max_train_samples: int | None = None  # the first so many rows; None: all
    max_eval_samples: int | None = 2000  # the first so many test rows; None: all

    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # what the base computes in; adapter and head are fp32
    gradient_checkpointing: bool = True  # about a third slower, several times less activation memory
    lora_rank: int = 16  # of the adapter on all linear layers
    lora_alpha: int = 32  # LoRA is scaled by alpha / rank
    role_layers: int = 14  # upper layers that get the adapter; 0: all

    learning_rate: float = 2e-4  # of AdamW at its peak
    num_train_epochs: float = 1.0  # a second epoch overfits
    max_steps: int | None = None  # stop after so many optimizer steps
    per_device_train_batch_size: int = 2  # pairs
    gradient_accumulation_steps: int = 8  # effective batch: 2 x 8 pairs
    warmup_ratio: float = 0.05  # share of the steps; then cosine to 0
    center_rewards_coefficient: float = 0.01  # keeps the scores near mean 0 (2312.09244)
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    logging_steps: int = 10  # optimizer steps between lines of metrics.jsonl
    log_with: Literal["tensorboard", "trackio", "wandb"] | None = None  # a tracker beside metrics.jsonl
    seed: int = 0  # of initialisation and shuffling


PRESETS = {
    "demo": Config(
        sft_checkpoint="runs/demo/sft",
        dataset="demo/data",
        output_dir="runs/demo/reward",
        max_length=192,
        gradient_checkpointing=False,
        role_layers=15,
        learning_rate=5e-4,
        num_train_epochs=2.0,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        warmup_ratio=0.1,
        logging_steps=5,
    ),
}


def main(config: Config) -> None:
    check_numbers(config)
    check_output(config.output_dir, config.overwrite, config.sft_checkpoint, config.base_model, config.dataset)
    sft = read_run(config.sft_checkpoint, "sft")

    started = time.monotonic()
    dtype = choose_dtype(config.dtype, device())
    base = same_base(sft, config.sft_checkpoint, config.base_model)
    form = PromptFormat(sft["prompt_format"], load_tokenizer(config.sft_checkpoint))

    # 1. Tokenise both responses of each pair.
    train_pairs = load_pairs(config.dataset, "train", config.max_train_samples)
    eval_pairs = load_pairs(config.dataset, "test", config.max_eval_samples)
    if config.dry_run:
        dry_run(config, base, form, train_pairs, sft)
        return
    train_set = both_responses(tokenize_pairs(train_pairs, form, config.max_length, "train"), form.eos_token_id)
    eval_set = both_responses(tokenize_pairs(eval_pairs, form, config.max_length, "test"), form.eos_token_id)

    # 2. The SFT adapter stays frozen below the reward model's own.
    set_seed(config.seed)
    model = load_base(base, dtype, form.pad_token_id, with_head=True)
    shared = SharedBase(model, config.sft_checkpoint, dtype)
    shared.add_role("reward", config.lora_rank, config.lora_alpha, config.role_layers)
    shared.heads["reward"] = model.score
    shared.decoder.gradient_checkpointing = config.gradient_checkpointing
    shared.activate("reward", train=True)

    with output_folder(config.output_dir) as folder:
        # 3. Train.
        trainer = make_trainer(config, shared, form, train_set, dtype, folder)
        trainer.train()

        # 4. Score the test split.
        if trainer.is_world_process_zero():
            metrics = evaluate(shared, eval_set, 2 * config.per_device_train_batch_size)
            console.print(describe(metrics))
            if not metrics["score_std"] > 1e-3:
                raise UserError(
                    f"the reward model gives every text about the same score (standard deviation {metrics['score_std']:.1e}): "
                    "it has learned nothing and was not saved; raise --learning-rate or train longer"
                )
            save_stacked(folder, shared, "reward", form, base)
            plot_curves(folder, "step", {"loss": ["loss"], "accuracy": ["accuracy"], "margin": ["margin"]})
            write_run(
                folder,
                "reward",
                config,
                dtype,
                started,
                base=base,
                prompt_format=sft["prompt_format"],
                parents={"sft": sft["adapter_sha256"]},
                data={"source": config.dataset, "train_rows": len(train_set), "sha256": fingerprint(train_pairs)},
                steps=trainer.state.global_step,
                metrics=metrics,
            )
    console.print(f"Saved {config.output_dir} after {time.monotonic() - started:.0f} s.")
    console.print(f"Next: {next_command('ppo_train.py', sft=config.sft_checkpoint, reward=config.output_dir)}")


def both_responses(pairs, eos_token_id: int):
    """Token ids of prompt + chosen and prompt + rejected, each closed by EOS, where the score is read."""

    def close(ids: list[int]) -> list[int]:
        return ids if ids[-1] == eos_token_id else [*ids, eos_token_id]

    rows = [
        {"chosen_ids": p.prompt_ids + close(p.chosen_ids), "rejected_ids": p.prompt_ids + close(p.rejected_ids)}
        for p in pairs
    ]
    return datasets.Dataset.from_list(rows)


def dry_run(config: Config, base, form, pairs, sft) -> None:
    """Rows, tokens, steps and the memory plan."""
    sample = tokenize_pairs(pairs[:SAMPLE], form, config.max_length, "train")
    lengths = [len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in sample]  # the prompt is read once
    show_data("training pairs", len(pairs), lengths)
    console.print(f"optimizer steps: {num_steps(config, len(pairs))} of {effective_batch(config)} pairs")
    plan = plan_reward(read_shape(base, config.dtype), config, sft["hyperparameters"]["lora_rank"], max(lengths))
    show_plan(
        plan, config.card_gb, "--per-device-train-batch-size or --max-length, and turn on --gradient-checkpointing"
    )
    show_end()


def make_trainer(config: Config, shared: SharedBase, form, train_set, dtype, folder: Path):
    """TRL's RewardTrainer on an adapter that is already in place; keeps adapter and head in float32."""
    args = RewardConfig(
        **trainer_options(config, dtype, folder, len(train_set)),
        max_length=None,
        center_rewards_coefficient=config.center_rewards_coefficient or None,
    )
    trainer = RewardTrainer(
        model=shared.peft,
        args=args,
        train_dataset=train_set,
        processing_class=form.tokenizer,
        callbacks=[TrainerLog(folder, "Reward model")],
    )
    keep_fp32(trainer.model)
    read_prompts_once(shared)
    return ours_to_print(trainer)


def read_prompts_once(shared: SharedBase) -> None:
    """Let the model read a pair as one text, prompt, chosen, rejected, so that the prompt goes through it once."""

    def forward(input_ids: Tensor, attention_mask: Tensor, **_) -> SequenceClassifierOutput:
        """Scores [2 x pairs, 1] of padded texts [2 x pairs, T], all chosen ones first, as TRL's collator makes them."""
        chosen, rejected = (unpad(*part) for part in zip(input_ids.chunk(2), attention_mask.chunk(2), strict=True))
        texts = lay_out_pairs(list(zip(chosen, rejected, strict=True)), shared.device)
        return SequenceClassifierOutput(logits=shared.read_head(texts)[:, None])

    shared.peft.get_base_model().forward = forward


def evaluate(shared: SharedBase, eval_set, batch_size: int) -> dict[str, float]:
    """Scores of the test pairs and what they say. A tie counts as half right: a constant scorer gets 0.5, not 1."""
    chosen_ids, rejected_ids = list(eval_set["chosen_ids"]), list(eval_set["rejected_ids"])
    chosen, rejected = shared.score_pairs(list(zip(chosen_ids, rejected_ids, strict=True)), batch_size)
    right = preference(chosen.tolist(), rejected.tolist())
    longer = preference(map(len, chosen_ids), map(len, rejected_ids))
    low, high = wilson_interval(sum(right), len(right))
    return {
        "eval_pairs": len(right),
        "eval_accuracy": sum(right) / len(right),
        "eval_accuracy_low": low,
        "eval_accuracy_high": high,
        "eval_margin": (chosen - rejected).mean().item(),
        "eval_loss": -F.logsigmoid(chosen - rejected).mean().item(),
        "longer_wins_accuracy": sum(longer) / len(longer),
        "score_mean": torch.cat([chosen, rejected]).mean().item(),
        "score_std": torch.cat([chosen, rejected]).std().item(),
    }


def describe(m: dict[str, float]) -> str:
    return (
        f"test pairs {m['eval_pairs']}: accuracy {m['eval_accuracy']:.3f} "
        f"(95 % interval {m['eval_accuracy_low']:.3f} to {m['eval_accuracy_high']:.3f}; a tie counts half), "
        f"mean margin {m['eval_margin']:.3f}, loss {m['eval_loss']:.4f}\n"
        f'"the longer response wins" would score {m["longer_wins_accuracy"]:.3f}; '
        f"scores have mean {m['score_mean']:.2f}, standard deviation {m['score_std']:.2f}"
    )


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
