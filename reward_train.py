"""Phase 2: a reward model that learns which of two responses people prefer.

In: `checkpoints/sft` and a preference data set. Out: `checkpoints/reward`, a LoRA adapter with a
scalar head that PEFT opens as a sequence classification model, and what it gets right in
`evaluation.json` and `evaluation.png`.

1. Tokenise each prompt with its chosen and its rejected response, both closed by EOS.
2. Load the base the SFT adapter was trained on, stack a LoRA adapter on its upper layers, add a
   float32 scalar head.
3. Train with TRL's RewardTrainer: -log sigmoid(score(chosen) - score(rejected)) (Bradley-Terry).
   Evaluate on the test split on the way.
4. Score the test split: accuracy, calibration, and how much of it is length
   (rlhf/reports/reward_evaluation.py). Score the safety probe: are refusals preferred where they
   should be (rlhf/reports/probe.py)?

With --extra-data, people's votes (`python -m feedback.vote`) are mixed into the training pairs. The
votes on one prompt in five are held out, the same ones every time, and scored at the end too.

    python reward_train.py
    python reward_train.py --preset demo
    python reward_train.py --eval-only    # 4 alone, of the reward model in --output-dir
    python reward_train.py --extra-data feedback/votes.jsonl

Next: python ppo_train.py
"""

import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from os.path import commonprefix
from pathlib import Path
from typing import Any, Literal

import rlhf  # noqa: F401  before the libraries that it sets up

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import set_seed
from trl import RewardConfig, RewardTrainer

from rlhf.data.files import facts_of_source
from rlhf.data.format import PromptFormat, TokenPair, fingerprint_tokens, tokenize_pairs
from rlhf.data.rows import Pair, Turns
from rlhf.data.sources import load_pairs, load_splits
from rlhf.data.splits import fingerprint
from rlhf.data.votes import VotePairs, load_votes
from rlhf.engine.adapters import read_stacked, save_stacked
from rlhf.engine.base import check_context, same_base
from rlhf.engine.callbacks import Restack
from rlhf.engine.card import Plan
from rlhf.engine.loading import load_base
from rlhf.engine.plan import Lora, plan_reward, read_shape
from rlhf.engine.roles import SharedBase
from rlhf.engine.speed import Work
from rlhf.engine.tokenizers import load_format
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
from rlhf.reports.dry_run import earlier_runs, format_of, show_data, show_end, show_plan
from rlhf.reports.probe import describe_probe, judge_probe, load_probe
from rlhf.reports.reward_evaluation import ScoredPairs, describe, judge, write_evaluation
from rlhf.runs.advice import less_memory, next_command
from rlhf.runs.checkpoints import (
    check_child,
    is_finished,
    read_run,
    start_run,
    write_run,
)
from rlhf.runs.checks import check_batch_size, check_between, check_numbers, check_training
from rlhf.runs.cli import run
from rlhf.runs.curves import Panel
from rlhf.runs.device import choose_dtype, device
from rlhf.runs.errors import UserError
from rlhf.runs.folders import check_output, output_folder
from rlhf.runs.processes import gather, is_main, num_processes, sharded, share
from rlhf.runs.resume import States
from rlhf.runs.run_warnings import reward_warnings, said_before, show
from rlhf.runs.terminal import console
from rlhf.runs.trained_prompts import prompt_hashes, report_overlap, trained_by
from rlhf.runs.trial import time_steps


@dataclass(frozen=True)
class Config:
    sft_checkpoint: str = "checkpoints/sft"  # sets base model, precision and prompt format
    base_model: str | None = None  # where the base is now, if it was moved after SFT
    # hub id, folder, .jsonl, .json, .csv (also .gz or .zst) or .parquet
    dataset: str = "Dahoas/rm-static"
    columns: str | None = None  # renames its columns: prompt=question,chosen=good
    extra_data: str | None = None  # a file of votes, mixed into the training pairs
    extra_weight: int = 1  # times an epoch goes over each vote
    output_dir: str = "checkpoints/reward"  # must be empty or not exist yet
    overwrite: bool = False  # replace what output_dir holds
    resume: bool = False  # continue a run that was stopped or cut short
    eval_only: bool = False  # train nothing; score the test split with the model in output_dir
    dry_run: bool = False  # check data, checkpoints and flags, print a memory plan, and stop
    card_gb: float = 12.0  # size of the card that --dry-run plans for
    measure: bool = False  # with --dry-run: time a few real steps, and estimate the whole run

    max_length: int = 512  # tokens of prompt and response; longer prompts lose their oldest turns
    # of the training prompts; the other half can train a judge for PPO
    half: Literal["both", "first", "second"] = "both"
    max_train_samples: int | None = None  # use only the first N rows; None: all
    max_eval_samples: int | None = 2000  # use only the first N test rows; None: all

    # what the base computes in; adapter and head are fp32
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    # a third slower, with several times less activation memory
    gradient_checkpointing: bool = False
    lora_rank: int = 16  # of the adapter on all linear layers
    lora_alpha: int = 32  # LoRA is scaled by alpha / rank
    role_layers: int = 14  # upper layers that get the adapter; 0: all

    learning_rate: float = 2e-4  # peak, of AdamW
    num_train_epochs: float = 1.0  # a second epoch overfits
    max_steps: int | None = None  # stop after N optimizer steps
    batch_size: int = 16  # pairs per optimizer step, over all processes
    # tokens in the model at once; auto: what fits the card
    micro_batch_tokens: int | Literal["auto"] = "auto"
    warmup_ratio: float = 0.05  # share of the steps; then cosine decay to 0
    center_rewards_coefficient: float = 0.01  # keeps the scores near mean 0 (2312.09244)
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    # steps between evaluations of the test pairs; auto: up to ten; None: last only
    eval_steps: int | Literal["auto"] | None = "auto"
    save_minutes: float = 10.0  # minutes between states to resume from: the most a crash can cost
    save_steps: int | None = None  # save every N optimizer steps instead
    save_total_limit: int = 2  # how many states to keep
    # a tracker to log to, beside metrics.jsonl
    log_with: Literal["tensorboard", "trackio", "wandb"] | None = None
    seed: int = 0  # of initialisation and shuffling
    preset: Literal["demo"] | None = None  # a named set of values; flags override it


FIRST = (  # flags that --help shows first
    *("sft_checkpoint", "dataset", "columns", "output_dir", "overwrite", "resume", "dry_run"),
    *("max_length", "max_train_samples", "extra_data"),
    *("learning_rate", "num_train_epochs", "batch_size", "eval_steps"),
)
PRESETS = {
    "demo": Config(
        sft_checkpoint="runs/demo/sft",
        dataset="demo/data",
        output_dir="runs/demo/reward",
        max_length=192,
        role_layers=15,
        learning_rate=1e-3,
        num_train_epochs=1.0,
        batch_size=8,
        warmup_ratio=0.1,
    )
}


def main(config: Config) -> None:
    started = time.monotonic()
    check_training(config.log_with, config.dry_run, config.measure)
    check_numbers(vars(config))
    check_batch_size(config.batch_size)
    if config.eval_only:
        eval_only(config)
        return
    sft = foresee(config) if config.dry_run else read_run(config.sft_checkpoint, "sft")
    inputs = config.sft_checkpoint, sft["base"]["model"], config.base_model, config.dataset
    inputs += (config.extra_data,)
    check_output(config.output_dir, config.overwrite, *inputs, resume=config.resume)
    if config.resume and is_finished(config.output_dir, asdict(config)):
        return
    show(said_before({"sft": sft}))
    dtype = choose_dtype(config.dtype, device())
    base = same_base(sft, config.sft_checkpoint, config.base_model)
    prompt_format = format_of(config.sft_checkpoint, sft)

    # 1. Tokenise both responses of each pair.
    votes = load_votes(config.extra_data) if config.extra_data else None
    rows = config.max_train_samples, config.max_eval_samples, config.half
    train_pairs, eval_pairs = load_splits(config.dataset, "pair", config.columns, *rows)
    train_pairs += votes.train * config.extra_weight if votes else []
    trained_prompts = prompt_hashes(pair.turns for pair in train_pairs)
    seen = trained_by({"sft": config.sft_checkpoint}) | {"reward": trained_prompts}
    report_overlap(held_out_prompts(eval_pairs, votes), seen)
    if config.dry_run:
        dry_run(config, base, prompt_format, train_pairs, sft)
        return
    token_pairs = tokenize_pairs(train_pairs, prompt_format, config.max_length, "train")
    train_set = both_responses(token_pairs, prompt_format.eos_token_id)
    eval_sets = tokenize_eval(config, prompt_format, eval_pairs, votes)
    check_context(base, longest_text([*token_pairs, *sum(eval_sets.values(), [])]), "--max-length")

    # 2. The SFT adapter stays frozen below the reward model's own.
    longest = max(map(num_tokens, token_pairs))
    plan = make_plan(config, base, sft, longest)
    tokens = choose_size(plan, longest, vars(config), device(), dtype)
    shared = load_model(config, base, prompt_format, dtype)
    data = facts_of_data(config, train_pairs, len(train_set), votes)
    same = {
        "sft checkpoint": sft["adapter_sha256"],
        "dtype": str(dtype),
        "data": data["sha256"],
        "training text": fingerprint_tokens(token_pairs),
        "test text": fingerprint_tokens(chain(*eval_sets.values())),
    }

    with output_folder(config.output_dir, config.resume) as folder:
        # 3. Train.
        test_pairs = eval_sets["test pairs"]
        trainer = make_trainer(config, shared, prompt_format, train_set, test_pairs, dtype, folder)
        trainer.prepare(States(folder, asdict(config), same), "Reward model", tokens)
        shared.micro_batch = trainer.micro_batch
        start_run(folder, "reward", asdict(config), dtype, micro_batch_tokens=tokens)
        trainer.run()

        # 4. Score the test split.
        metrics = evaluate(config, shared, prompt_format, eval_sets, folder)
        trainer.log({name: metrics[name] for name in ("eval_loss", "eval_accuracy", "eval_margin")})
        facts = {"data": data, "metrics": metrics, "trained_prompts": trained_prompts}
        save(config, trainer, prompt_format, base, sft, started, **facts)
    console.print(f"Saved {config.output_dir} after {time.monotonic() - started:.0f} s.")
    show(metrics["warnings"])
    role = "gold" if config.half == "second" else "reward"
    console.print(f"Next: {next_command('ppo_train.py', vars(config), role)}")


def facts_of_data(
    config: Config, pairs: list[Pair], rows: int, votes: VotePairs | None
) -> dict[str, Any]:
    """What run.json says of the training pairs, of which `rows` were tokenised."""
    data = {
        **facts_of_source(config.dataset, config.columns),
        "half": config.half,
        "train_rows": rows,
        "sha256": fingerprint(pairs),
    }
    if votes:
        origin = {"source": config.extra_data, "weight": config.extra_weight}
        data["votes"] = votes.counts | origin
    return data


def load_model(
    config: Config, base: dict[str, Any], prompt_format: PromptFormat, dtype: torch.dtype
) -> SharedBase:
    """The base with the SFT adapter, and with an adapter and a head that learn."""
    set_seed(config.seed)
    model = load_base(base, dtype, prompt_format.pad_token_id, with_head=True)
    shared = SharedBase(model, config.sft_checkpoint, dtype)
    shared.add_role("reward", config.lora_rank, config.lora_alpha, config.role_layers)
    shared.heads["reward"] = model.score
    shared.train("reward")
    return shared


def save(
    config: Config,
    trainer: "Trainer",
    prompt_format: PromptFormat,
    base: dict[str, Any],
    sft: dict[str, Any],
    started: float,
    data: dict[str, Any],
    metrics: dict[str, Any],
    trained_prompts: np.ndarray,
) -> None:
    """What a finished run leaves: adapter and head, tokenizer, curves, run.json last."""
    save_stacked(trainer.folder, trainer.shared, "reward", prompt_format, base)
    if not is_main():
        return
    trainer.lines.curves.draw()
    write_run(
        trainer.folder,
        "reward",
        asdict(config),
        trainer.dtype,
        started,
        trained_prompts,
        base=base,
        prompt_format=sft["prompt_format"],
        parents={"sft": sft["adapter_sha256"]},
        data=data,
        steps=trainer.state.global_step,
        micro_batch_tokens=trainer.micro_batch.tokens,
        speed=trainer.speed(),
        metrics=in_short(metrics),
    )


def in_short(metrics: dict[str, Any]) -> dict[str, Any]:
    """The part of the evaluation that goes into run.json."""
    lists = [name for name, value in metrics.items() if isinstance(value, list)]
    return {name: metrics[name] for name in metrics if name == "warnings" or name not in lists}


def closed(ids: list[int], eos_token_id: int) -> list[int]:
    """A response closed by EOS, where the score is read. One that was cut to fit has none yet."""
    return ids if ids[-1] == eos_token_id else [*ids, eos_token_id]


def num_tokens(pair: TokenPair) -> int:
    """Tokens that go through the model: the prompt once, and both responses with EOS."""
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) + 2


def longest_text(pairs: list[TokenPair]) -> int:
    """Tokens of the longest prompt with one response and EOS."""
    return max(
        len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) + 1
        for pair in pairs
    )


def both_responses(pairs: list[TokenPair], eos_token_id: int) -> datasets.Dataset:
    """Token ids of prompt + chosen and of prompt + rejected."""
    rows = [
        {
            "chosen_ids": p.prompt_ids + closed(p.chosen_ids, eos_token_id),
            "rejected_ids": p.prompt_ids + closed(p.rejected_ids, eos_token_id),
        }
        for p in pairs
    ]
    return datasets.Dataset.from_list(rows)


def held_out_prompts(pairs: list[Pair], votes: VotePairs | None) -> list[Turns]:
    """The prompts of what is scored at the end."""
    return [pair.turns for pair in [*pairs, *(votes.held_out if votes else [])]]


def tokenize_eval(
    config: Config, prompt_format: PromptFormat, pairs: list[Pair], votes: VotePairs | None
) -> dict[str, list[TokenPair]]:
    """What is scored at the end: the test pairs, and held-out votes if there are any."""
    sets = {"test pairs": pairs} | (
        {"held-out votes": votes.held_out} if votes and votes.held_out else {}
    )
    return {
        what: tokenize_pairs(part, prompt_format, config.max_length, what)
        for what, part in sets.items()
    }


def foresee(config: Config) -> dict[str, Any]:
    """The SFT checkpoint's run.json, or what a plan needs of it if it is not there yet."""
    import sft_train

    folders = {"sft": config.sft_checkpoint}
    return earlier_runs(folders, {"sft": sft_train}, config.base_model, config.measure)["sft"]


def dry_run(
    config: Config,
    base: dict[str, Any],
    prompt_format: PromptFormat,
    pairs: list[Pair],
    sft: dict[str, Any],
) -> None:
    """Print rows, tokens, steps and the memory plan."""
    tokenized = tokenize_pairs(pairs, prompt_format, config.max_length, "train")
    lengths = list(map(num_tokens, tokenized))
    show_data("training pairs", lengths)
    steps = num_steps(len(lengths), config.batch_size, config.num_train_epochs, config.max_steps)
    console.print(f"optimizer steps: {steps} of {config.batch_size} pairs")
    check_between(0, read_shape(base, config.dtype).layers, role_layers=config.role_layers)
    longest = max(lengths)
    check_context(base, longest_text(tokenized), "--max-length")
    plan = make_plan(config, base, sft, longest)
    advice = less_memory(vars(config))
    show_plan(plan, config.micro_batch_tokens, longest, config.card_gb, advice)
    if config.measure:
        time_steps(main, config, steps)
    show_end(config.measure)


def make_plan(config: Config, base: dict[str, Any], sft: dict[str, Any], longest: int) -> Plan:
    """The memory plan by tokens of a micro-batch, for pairs of up to `longest` tokens."""
    shape = read_shape(base, config.dtype)
    rows = config.batch_size // num_processes()
    adapters = Lora.of(sft), Lora(config.lora_rank, config.role_layers)
    return partial(plan_reward, shape, *adapters, rows, longest, config.gradient_checkpointing)


class Trainer(Resumable, RewardTrainer):
    """TRL's, with states to resume from and steps in parts by tokens.

    Its loss is a mean over pairs.
    """

    panels = (
        Panel("Loss", "nats a pair", {"preference_loss": "training", "eval_loss": "test"}),
        Panel("Accuracy", "share of pairs", {"accuracy": "training", "eval_accuracy": "test"}),
        Panel("Margin", "chosen - rejected score", {"margin": "training", "eval_margin": "test"}),
    )
    means = ("loss", "preference_loss", "mean_reward", "accuracy", "margin")
    extremes = ("min_reward", "max_reward")
    shared: SharedBase
    eval_pairs: list[TokenPair]

    def tokens(self, row: Row) -> int:
        chosen = row["chosen_ids"]
        rejected = row["rejected_ids"]
        if sharded():  # each is read by itself, and padded
            return 2 * max(len(chosen), len(rejected))
        # The prompt is read once.
        return len(chosen) + len(rejected) - len(commonprefix([chosen, rejected]))

    def items(self, row: Row) -> int:
        return 1

    def part_loss(self, rows: list[Row]) -> dict[str, Tensor]:
        scores = self.shared.read_pairs([(row["chosen_ids"], row["rejected_ids"]) for row in rows])
        chosen, rejected = scores.chunk(2)
        return {
            "loss": self.pair_losses(chosen, rejected).sum(),
            "preference_loss": -F.logsigmoid(chosen - rejected).sum(),  # as for the test pairs
            "mean_reward": scores.sum() / 2,  # of both texts of a pair
            "accuracy": (chosen > rejected).sum(),
            "margin": (chosen - rejected).sum(),
            "min_reward": scores.min(),
            "max_reward": scores.max(),
        }

    def pair_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The Bradley-Terry loss, plus the term that keeps scores near mean 0 [pairs]."""
        centering = self.args.center_rewards_coefficient * (chosen + rejected).square()
        return centering - F.logsigmoid(chosen - rejected)

    def evaluation(self) -> dict[str, float]:
        """The same numbers as in the evaluation at the end."""
        pairs = score(self.shared, self.eval_pairs, self.processing_class.eos_token_id)
        loss = np.logaddexp(0, -pairs.margin)
        numbers = {"loss": loss, "accuracy": pairs.right, "margin": pairs.margin}
        return {name: float(values.mean()) for name, values in numbers.items()}


def make_trainer(
    config: Config,
    shared: SharedBase,
    prompt_format: PromptFormat,
    train_set: datasets.Dataset,
    eval_pairs: list[TokenPair],
    dtype: torch.dtype,
    folder: Path,
) -> Trainer:
    """The trainer of an adapter that is already in place; keeps adapter and head in float32."""
    rows = len(train_set)
    steps = num_steps(rows, config.batch_size, config.num_train_epochs, config.max_steps)
    args = RewardConfig(
        **trainer_options(dtype, folder),
        learning_rate=config.learning_rate,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size // num_processes(),
        warmup_steps=round(config.warmup_ratio * steps),
        center_rewards_coefficient=config.center_rewards_coefficient,
        max_grad_norm=config.max_grad_norm,
        report_to=config.log_with or "none",
        seed=config.seed,
        max_length=None,
    )
    trainer = Trainer(
        model=shared.peft,
        args=args,
        train_dataset=train_set,
        processing_class=prompt_format.tokenizer,
    )
    keep_fp32(trainer.model)
    trainer.shared = shared
    trainer.dtype = dtype
    trainer.eval_pairs = eval_pairs
    trainer.eval_steps = steps_between_evaluations(
        config.eval_steps, steps, config.batch_size, len(eval_pairs)
    )
    if sharded():
        if config.gradient_checkpointing:
            checkpoint_layers(trainer.model.get_base_model())
        return trainer
    shared.decoder.gradient_checkpointing = config.gradient_checkpointing
    trainer.work = Work.of(shared.decoder, shared.first_role_layer, None)
    trainer.add_callback(Restack(shared.decoder))
    return trainer


def evaluate(
    config: Config,
    shared: SharedBase,
    prompt_format: PromptFormat,
    eval_sets: dict[str, list[TokenPair]],
    folder: Path,
) -> dict[str, Any]:
    """Score the test pairs and held-out votes, print what the scores are worth, and write it down.

    Returns:
        the numbers of the test pairs; of the votes, in names that start with `votes_`; of the
        safety probe, in names that start with `probe_`; and `warnings`.
    Raises:
        UserError: the scores are not finite, or all the same.
    """
    scored = {
        what: score(shared, pairs, prompt_format.eos_token_id) for what, pairs in eval_sets.items()
    }
    judged = {what: judge(pairs) for what, pairs in scored.items()}
    metrics = judged["test pairs"]
    if not np.isfinite(metrics["score_std"]):
        raise UserError(
            "the reward model gives scores that are not finite: lower --learning-rate, or try "
            "--dtype fp32"
        )
    for what, numbers in judged.items():
        console.print(describe(numbers, what))
    if not metrics["score_std"] > 1e-3:
        raise UserError(
            "the reward model gives every text about the same score (standard deviation "
            f"{metrics['score_std']:.1e}): it has learned nothing; raise --learning-rate or train "
            "longer"
        )
    if "held-out votes" in judged:
        metrics |= {
            f"votes_{name.removeprefix('eval_')}": value
            for name, value in judged["held-out votes"].items()
        }
    metrics |= score_probe(config, shared, prompt_format)
    if said := describe_probe(metrics):
        console.print(said)
    metrics["warnings"] = reward_warnings(metrics)
    if is_main():
        names = ("dataset", "columns", "max_length", "extra_data")
        settings = {name: getattr(config, name) for name in names}
        write_evaluation(folder, settings | metrics, scored["test pairs"])
    return metrics


def score_probe(
    config: Config, shared: SharedBase, prompt_format: PromptFormat
) -> dict[str, float]:
    """What the reward model makes of those pairs of the safety probe that fit --max-length."""
    probe = load_probe(prompt_format, config.max_length)
    scores = {}
    for kind, pairs in probe.items():
        if pairs:
            scored = score(shared, pairs, prompt_format.eos_token_id)
            scores[kind] = scored.chosen, scored.rejected
    return judge_probe(scores)


def score(shared: SharedBase, pairs: list[TokenPair], eos_token_id: int) -> ScoredPairs:
    """Scores of pairs, with what else the evaluation needs. Each process reads its share.

    If the base is sharded, all processes read every text together.
    """
    answers = [[closed(ids, eos_token_id) for ids in (p.chosen_ids, p.rejected_ids)] for p in pairs]
    texts = [(p.prompt_ids + a, p.prompt_ids + b) for p, (a, b) in zip(pairs, answers, strict=True)]
    ours = texts if sharded() else share(texts)
    scores = shared.score_pairs(ours).T.tolist()
    chosen, rejected = np.array(scores if sharded() else gather(scores)).T
    tokens = np.array([[len(a), len(b)] for a, b in answers])
    turns = np.array([sum(role == "user" for role, _ in p.pair.turns) for p in pairs])
    return ScoredPairs(chosen, rejected, *tokens.T, turns)


def eval_only(config: Config) -> None:
    """Score the test split with a finished reward model, and rewrite its evaluation."""
    folder = Path(config.output_dir)
    if sharded():
        raise UserError("--eval-only under FSDP: start it in one process, without accelerate")
    if config.dry_run:
        raise UserError("--eval-only and --dry-run: give one of them")
    sft = read_run(config.sft_checkpoint, "sft")
    check_child(
        read_run(config.output_dir, "reward", "--output-dir"),
        config.output_dir,
        sft,
        config.sft_checkpoint,
    )
    if (folder / "evaluation.json").exists() and not config.overwrite:
        raise UserError(
            f"{folder}/evaluation.json exists: add --overwrite to replace it (nothing else is "
            "touched)"
        )
    base = same_base(sft, config.sft_checkpoint, config.base_model)
    prompt_format = load_format(config.sft_checkpoint, sft)
    test_pairs = load_pairs(config.dataset, "test", config.max_eval_samples, columns=config.columns)
    votes = load_votes(config.extra_data) if config.extra_data else None
    seen = trained_by({"sft": config.sft_checkpoint, "reward": config.output_dir})
    report_overlap(held_out_prompts(test_pairs, votes), seen)
    eval_sets = tokenize_eval(config, prompt_format, test_pairs, votes)
    check_context(base, longest_text(sum(eval_sets.values(), [])), "--max-length")
    dtype = choose_dtype(config.dtype, device())
    shared = SharedBase(
        load_base(base, dtype, prompt_format.pad_token_id), config.sft_checkpoint, dtype
    )
    shared.add_role("reward", **read_stacked(config.output_dir, shared))
    metrics = evaluate(config, shared, prompt_format, eval_sets, folder)
    console.print(f"Saved {folder}/evaluation.json and {folder}/evaluation.png.")
    show(metrics["warnings"])


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__, FIRST)
