"""Phase 1: supervised fine-tuning of the base model on the chosen responses.

In: a base model, and prompts with answers, such as those of a preference data set.
Out: `checkpoints/sft`, a LoRA adapter in PEFT's format with its tokenizer.

1. Tokenise each prompt with its chosen response, closed by EOS. Only the response's tokens count in
   the loss.
2. Load the base, frozen, in NF4 (or 16 bit), and put a LoRA adapter on all linear layers of its
   decoder.
3. Train with TRL's SFTTrainer. Evaluate on the test split before, during and after training.

    python sft_train.py                      # the real thing: Llama 3.2 3B on one 12 GB card
    python sft_train.py --preset demo        # a small model on a CPU

Next: python reward_train.py
"""

import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import rlhf  # noqa: F401  before the libraries that it sets up

import datasets
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, set_seed
from trl import SFTConfig, SFTTrainer

from rlhf.data.files import facts_of_source
from rlhf.data.format import PromptFormat, TokenPair, fingerprint_tokens, tokenize_pairs
from rlhf.data.rows import Pair
from rlhf.data.sources import load_splits
from rlhf.data.splits import fingerprint
from rlhf.engine.base import base_facts, check_context, identified
from rlhf.engine.callbacks import Restack
from rlhf.engine.card import Plan
from rlhf.engine.decoder import Decoder, lay_out
from rlhf.engine.loading import linear_names, load_base
from rlhf.engine.logprobs import TokenLogprobs, logprobs_of
from rlhf.engine.peft_workarounds import UNNAMED, save_adapter
from rlhf.engine.plan import Lora, plan_sft, read_shape
from rlhf.engine.portable import save_tokenizer
from rlhf.engine.speed import Work
from rlhf.engine.tokenizers import check_vocabulary, load_tokenizer
from rlhf.engine.trainer import (
    Resumable,
    Row,
    checkpoint_layers,
    choose_size,
    keep_fp32,
    num_steps,
    steps_between_evaluations,
    trainer_options,
)
from rlhf.reports.dry_run import show_data, show_end, show_plan
from rlhf.runs.advice import less_memory, next_command
from rlhf.runs.checkpoints import commit_before, is_finished, start_run, weights_of, write_run
from rlhf.runs.checks import check_batch_size, check_numbers, check_training
from rlhf.runs.cli import run
from rlhf.runs.curves import Panel
from rlhf.runs.device import choose_dtype, device
from rlhf.runs.errors import UserError
from rlhf.runs.folders import check_output, output_folder
from rlhf.runs.processes import num_processes, sharded, share
from rlhf.runs.resume import States
from rlhf.runs.run_warnings import sft_warnings, show
from rlhf.runs.terminal import console
from rlhf.runs.trained_prompts import prompt_hashes, report_overlap
from rlhf.runs.trial import time_steps


@dataclass(frozen=True)
class Config:
    base_model: str = "meta-llama/Llama-3.2-3B"  # hub id or local folder
    revision: str | None = None  # branch, tag or commit of a hub model
    # hub id, folder, .jsonl, .json, .csv (also .gz or .zst) or .parquet
    dataset: str = "Dahoas/rm-static"
    columns: str | None = None  # renames its columns: prompt=question,chosen=good
    output_dir: str = "checkpoints/sft"  # must be empty or not exist yet
    overwrite: bool = False  # replace what output_dir holds
    resume: bool = False  # continue a run that was stopped or cut short
    dry_run: bool = False  # check data, checkpoints and flags, print a memory plan, and stop
    card_gb: float = 12.0  # size of the card that --dry-run plans for
    measure: bool = False  # with --dry-run: time a few real steps, and estimate the whole run
    # hh: "\n\nHuman: ..."; model: an Instruct base's own chat template
    prompt_format: Literal["hh", "model"] = "hh"

    max_length: int = 512  # tokens of prompt and response; longer prompts lose their oldest turns
    max_train_samples: int | None = None  # use only the first N rows; None: all
    max_eval_samples: int | None = 500  # use only the first N test rows; None: all

    load_in_4bit: bool = True  # NF4 base with double quantisation (QLoRA, 2305.14314)
    # what the base computes in; adapters are fp32
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    # a third slower, with several times less activation memory
    gradient_checkpointing: bool = False
    lora_rank: int = 16  # of the adapter on all linear layers
    lora_alpha: int = 32  # LoRA is scaled by alpha / rank

    learning_rate: float = 2e-4  # peak, of AdamW
    num_train_epochs: float = 2.0  # passes over the training rows
    max_steps: int | None = None  # stop after N optimizer steps
    batch_size: int = 16  # rows per optimizer step, over all processes
    # tokens in the model at once; auto: what fits the card
    micro_batch_tokens: int | Literal["auto"] = "auto"
    warmup_ratio: float = 0.03  # share of the steps; then cosine decay to 0
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    # steps between test losses; auto: up to ten; None: first and last only
    eval_steps: int | Literal["auto"] | None = "auto"
    save_minutes: float = 10.0  # minutes between states to resume from: the most a crash can cost
    save_steps: int | None = None  # save every N optimizer steps instead
    save_total_limit: int = 2  # how many states to keep
    # a tracker to log to, beside metrics.jsonl
    log_with: Literal["tensorboard", "trackio", "wandb"] | None = None
    seed: int = 0  # of initialisation and shuffling
    preset: Literal["demo"] | None = None  # a named set of values; flags override it


FIRST = (  # flags that --help shows first
    *("base_model", "dataset", "columns", "output_dir", "overwrite", "resume", "dry_run"),
    *("max_length", "max_train_samples", "load_in_4bit"),
    *("learning_rate", "num_train_epochs", "batch_size", "eval_steps"),
)
SFT = "sft"  # the role whose adapter is trained
PRESETS = {
    "demo": Config(
        base_model="models/SmolLM2-135M-Instruct",
        dataset="demo/data",
        output_dir="runs/demo/sft",
        max_length=192,
        load_in_4bit=False,
        learning_rate=1e-3,
        num_train_epochs=1.0,
        batch_size=8,
        warmup_ratio=0.1,
        eval_steps=21,
    )
}


def main(config: Config) -> None:
    started = time.monotonic()
    check_training(config.log_with, config.dry_run, config.measure)
    check_numbers(vars(config))
    check_batch_size(config.batch_size)
    check_output(
        config.output_dir, config.overwrite, config.base_model, config.dataset, resume=config.resume
    )
    if config.resume and is_finished(config.output_dir, asdict(config)):
        return
    dtype = choose_dtype(config.dtype, device())
    # A branch of the hub may move on while a run is stopped.
    began_with = commit_before(config.output_dir, config.resume, config.base_model)
    base = base_facts(config.base_model, config.revision or began_with, config.load_in_4bit)
    tokenizer = load_tokenizer(base["model"], base["revision"])
    check_vocabulary(tokenizer, base)
    prompt_format = PromptFormat(config.prompt_format, tokenizer)

    # 1. Tokenise: prompt tokens are masked out of the loss, EOS is not.
    train_pairs, eval_pairs = load_splits(
        config.dataset, "answer", config.columns, config.max_train_samples, config.max_eval_samples
    )
    trained_prompts = prompt_hashes(pair.turns for pair in train_pairs)
    report_overlap((pair.turns for pair in eval_pairs), {"sft": trained_prompts})
    if config.dry_run:
        dry_run(config, base, prompt_format, train_pairs)
        return
    train_rows = tokenize_pairs(train_pairs, prompt_format, config.max_length, "train")
    test_rows = tokenize_pairs(eval_pairs, prompt_format, config.max_length, "test")
    train_set = response_only(train_rows)
    eval_set = response_only(test_rows)

    # 2. and 3.
    longest = max(map(len, train_set["input_ids"]))
    check_context(base, max(longest, *map(len, eval_set["input_ids"])), "--max-length")
    tokens = choose_size(make_plan(config, base, longest), longest, vars(config), device(), dtype)
    set_seed(config.seed)
    base = identified(base)
    model = load_base(base, dtype, prompt_format.pad_token_id)
    data = {
        **facts_of_source(config.dataset, config.columns),
        "train_rows": len(train_set),
        "sha256": fingerprint(train_pairs),
    }
    same = {
        "base": [base["config_sha256"], weights_of(base)],
        "dtype": str(dtype),
        "data": data["sha256"],
        "training text": fingerprint_tokens(train_rows),
        "test text": fingerprint_tokens(test_rows),
    }
    with output_folder(config.output_dir, config.resume) as folder:
        trainer = make_trainer(config, model, prompt_format, train_set, eval_set, dtype, folder)
        trainer.prepare(States(folder, asdict(config), same), "SFT", tokens)
        start_run(folder, "sft", asdict(config), dtype, base=base, micro_batch_tokens=tokens)
        trainer.run()
        metrics = evaluate(trainer)
        facts = {"data": data, "metrics": metrics, "trained_prompts": trained_prompts}
        save(config, trainer, prompt_format, base, dtype, started, **facts)
    console.print(f"Saved {config.output_dir} after {time.monotonic() - started:.0f} s.")
    show(metrics["warnings"])
    has_pairs = any(pair.rejected is not None for pair in train_pairs)
    if not has_pairs:
        console.print(
            f"{config.dataset} has no rejected answers, which the reward model needs: give it a "
            "--dataset of your own pairs, or leave the flag out."
        )
    console.print(f"Next: {next_command('reward_train.py', vars(config), 'sft', has_pairs)}")


def response_only(pairs: list[TokenPair]):
    """Token ids, and labels in which -100 hides the prompt from the loss."""
    rows = [
        {
            "input_ids": p.prompt_ids + p.chosen_ids,
            "labels": [-100] * len(p.prompt_ids) + p.chosen_ids,
        }
        for p in pairs
    ]
    return datasets.Dataset.from_list(rows)


def dry_run(
    config: Config, base: dict[str, Any], prompt_format: PromptFormat, pairs: list[Pair]
) -> None:
    """Print rows, tokens, steps and the memory plan."""
    tokenized = tokenize_pairs(pairs, prompt_format, config.max_length, "train")
    lengths = [len(p.prompt_ids) + len(p.chosen_ids) for p in tokenized]
    show_data("training rows", lengths)
    steps = num_steps(len(lengths), config.batch_size, config.num_train_epochs, config.max_steps)
    console.print(f"optimizer steps: {steps} of {config.batch_size} rows")
    longest = max(lengths)
    check_context(base, longest, "--max-length")
    plan = make_plan(config, base, longest)
    advice = less_memory(vars(config))
    show_plan(plan, config.micro_batch_tokens, longest, config.card_gb, advice)
    if config.measure:
        time_steps(main, config, steps)
    show_end(config.measure)


def make_plan(config: Config, base: dict[str, Any], longest: int) -> Plan:
    """The memory plan by tokens of a micro-batch, for texts of up to `longest` tokens."""
    shape = read_shape(base, config.dtype)
    rows = config.batch_size // num_processes()
    adapter = Lora(config.lora_rank)
    return partial(plan_sft, shape, adapter, rows, longest, config.gradient_checkpointing)


class Trainer(Resumable, SFTTrainer):
    """TRL's, with states to resume from and steps in parts by tokens.

    Its loss is a mean over response tokens.
    """

    panels = (
        Panel("Loss", "nats a token", {"loss": "training", "eval_loss": "test"}),
        Panel(
            "Tokens guessed right",
            "share of response tokens",
            {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "test"},
        ),
    )
    means = ("loss", "entropy", "mean_token_accuracy")
    decoder: Decoder  # unless the model is sharded

    def tokens(self, row: Row) -> int:
        return len(row["input_ids"])

    def items(self, row: Row) -> int:
        return sum(label != -100 for label in row["labels"][1:])  # nothing predicts the first token

    def part_loss(self, rows: list[Row]) -> dict[str, Tensor]:
        if sharded():  # FSDP has whole weights only inside the modules' own forwards
            batch = {name: x.to(self.args.device) for name, x in self.padded(rows).items()}
            chosen = self.model(**batch, use_cache=False, fused_lm_head=True)
            logprobs = chosen.log_probs
        else:
            chosen = self.read_responses(rows)
            logprobs = chosen.logprobs
        sums = -logprobs.sum(), chosen.entropy.sum(), chosen.is_top1.sum()
        return dict(zip(self.means, sums, strict=True))

    def read_responses(self, rows: list[Row]) -> TokenLogprobs:
        """All labelled tokens [N]. There is no padding, and the LM head runs only for them."""
        texts = lay_out([row["input_ids"] for row in rows], self.args.device)
        following = np.array([label for row in rows for label in [*row["labels"][1:], -100]])
        labelled = np.flatnonzero(following != -100)
        labels, places = torch.from_numpy(np.stack([following[labelled], labelled])).to(
            self.args.device
        )
        states = self.decoder.run(self.decoder.embed(texts.ids), texts, SFT, self.decoder.layers)[
            places
        ]
        lm_head = self.decoder.model.get_output_embeddings().weight
        return logprobs_of(self.decoder.norm(states), lm_head, labels, 1.0, statistics=True)

    def evaluation(self) -> dict[str, float]:
        """Means over the test rows' response tokens. Each process reads its share of the rows."""
        means, _ = self.go_through(share(list(self.eval_dataset)))
        return means


def make_trainer(
    config: Config,
    model: PreTrainedModel,
    prompt_format: PromptFormat,
    train_set: datasets.Dataset,
    eval_set: datasets.Dataset,
    dtype: torch.dtype,
    folder: Path,
) -> Trainer:
    """The trainer of `model` with a fresh LoRA adapter, which is kept in float32."""
    rows = len(train_set)
    steps = num_steps(rows, config.batch_size, config.num_train_epochs, config.max_steps)
    args = SFTConfig(
        **trainer_options(dtype, folder),
        learning_rate=config.learning_rate,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size // num_processes(),
        warmup_steps=round(config.warmup_ratio * steps),
        max_grad_norm=config.max_grad_norm,
        report_to=config.log_with or "none",
        seed=config.seed,
        max_length=None,
    )
    trainer = Trainer(
        model=add_adapter(model, config.lora_rank, config.lora_alpha),
        args=args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=prompt_format.tokenizer,
    )
    keep_fp32(trainer.model)
    trainer.dtype = dtype
    trainer.eval_steps = steps_between_evaluations(
        config.eval_steps, steps, config.batch_size, len(eval_set)
    )
    if sharded():
        if config.gradient_checkpointing:
            checkpoint_layers(trainer.model.get_base_model())
        return trainer
    trainer.decoder = Decoder(trainer.model.get_base_model())
    trainer.decoder.stack({SFT: [UNNAMED]})
    trainer.decoder.gradient_checkpointing = config.gradient_checkpointing
    trainer.work = Work.of(trainer.decoder, 0, model.get_output_embeddings().weight)
    trainer.add_callback(Restack(trainer.decoder))
    return trainer


def add_adapter(model: PreTrainedModel, rank: int, alpha: int) -> PeftModel:
    """`model` with LoRA on all linear layers of its decoder."""
    lora = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=linear_names(model), task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora)


def evaluate(trainer: Trainer) -> dict[str, Any]:
    """The loss on the test rows, before and after, and `warnings`.

    Raises:
        UserError: the loss is not finite.
    """
    before = trainer.first_row("eval_loss")
    after = trainer.evaluate()["eval_loss"]
    if not math.isfinite(after):
        raise UserError("the loss is not finite: lower --learning-rate; nothing was saved")
    rows = len(trainer.eval_dataset)
    metrics = {"eval_loss_before": before, "eval_loss": after, "eval_rows": rows}
    return metrics | {"warnings": sft_warnings(metrics)}


def save(
    config: Config,
    trainer: Trainer,
    prompt_format: PromptFormat,
    base: dict[str, Any],
    dtype: torch.dtype,
    started: float,
    **facts: Any,
) -> None:
    """What a finished run leaves: adapter, tokenizer, curves, run.json last.

    Args:
        facts: what else `write_run` takes.
    """
    weights = trainer.whole_weights()
    if not trainer.is_world_process_zero():
        return
    save_adapter(trainer.model, weights, base, trainer.folder)
    save_tokenizer(prompt_format.tokenizer, trainer.folder)
    trainer.lines.curves.draw()
    write_run(
        trainer.folder,
        "sft",
        asdict(config),
        dtype,
        started,
        base=base,
        prompt_format=config.prompt_format,
        parents={},
        epochs=round(trainer.state.epoch or 0, 2),
        steps=trainer.state.global_step,
        micro_batch_tokens=trainer.micro_batch.tokens,
        speed=trainer.speed(),
        **facts,
    )


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__, FIRST)
