"""One reward model of the ablation: the recipe with one change, or TRL's stock trainer; what it gets right goes to a record.

    python benchmarks/reward_ablation.py --variant recipe --seed 0 --dataset Dahoas/rm-static

`make results` runs them all and makes the table. Every run trains on the same pairs, those of the first half of the
dialogues, and is scored on the same test pairs and on the same validation pairs, training rows of the other half that no
SFT model has seen: choose a recipe by these, so that the test pairs still say what it is worth. Variants that
reward_train.py has no flag for are made here, around it: what is not worth a flag is not in the script.

`averaged` is one model, the mean of the adapters of `head_zero`, runs that differ in seed but start from one head (WARM,
2401.12187). `half` trains nothing: it scores a finished reward model, --reward-checkpoint. `stock_epoch` is the `trl reward`
command at its defaults, with LoRA of the same rank but on all layers, on the same pairs, from the same SFT model merged into its
base; `stock` is that for as long as `recipe` trained, at the pace of `stock_epoch`'s seed 0.
"""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import reward_train  # noqa: E402
from rlhf.checkpoints import read_run, sha256  # noqa: E402
from rlhf.cli import UserError, run  # noqa: E402
from rlhf.data import PromptFormat, load_pairs, tokenize_pairs  # noqa: E402
from rlhf.modeling import (  # noqa: E402
    SharedBase,
    choose_dtype,
    load_base,
    load_format,
    load_tokenizer,
    pad_right,
    read_stacked,
)
from rlhf.reporting import console  # noqa: E402
from rlhf.reward_eval import ScoredPairs, judge  # noqa: E402
from rlhf.training import device  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


@dataclass(frozen=True)
class Variant:
    """One change of the recipe."""

    changes: dict[str, Any] = field(default_factory=dict)  # of reward_train.Config
    label_smoothing: float = 0.0  # the share of labels taken to be wrong
    balance_lengths: bool = False  # pairs weigh so that longer and shorter winners count alike
    head_std: float | None = None  # of the head's initialisation; None: 1 / sqrt(H + 1)
    without_sft: bool = False  # straight on the base


STOCK = ("stock_epoch", "stock")  # TRL's trainer: for an epoch, and for as long as `recipe` trained
STOCK_BATCH = 8  # pairs, as the `trl reward` command has it
AVERAGED = 3  # seeds of head_zero
VARIANTS = {
    "recipe": Variant(),
    "all_layers": Variant({"role_layers": 0}),
    "not_centred": Variant({"center_rewards_coefficient": 0.0}),
    "head_zero": Variant(head_std=0.0),
    "smoothed": Variant(label_smoothing=0.1),
    "balanced": Variant(balance_lengths=True),
    "without_sft": Variant(without_sft=True),
    "low_lr": Variant({"learning_rate": 2e-4}),
}


@dataclass(frozen=True)
class Config:
    variant: str = "recipe"  # of VARIANTS, or averaged, half, stock_epoch, stock
    seed: int = 0
    sft_checkpoint: str = "runs/results/sft_0"
    reward_checkpoint: str = "runs/results/reward_0"  # what `half` scores
    dataset: str = "Dahoas/rm-static"
    pairs: int = 1000  # the first so many training pairs of the first half
    validation_pairs: int = 600  # the last so many of the second half
    test_pairs: int = 480  # at most
    max_length: int = 256  # tokens
    work: str = "runs/results/reward_ablation"  # a folder VARIANT_SEED and a file VARIANT_SEED.json of each run


def recipe(config: Config) -> reward_train.Config:
    """The settings of a run: the demo's, but one epoch, and a higher learning rate."""
    variant = VARIANTS[config.variant]
    changes = {"learning_rate": 1e-3, "num_train_epochs": 1.0} | variant.changes
    sources = {
        "sft_checkpoint": config.sft_checkpoint,
        "dataset": config.dataset,
        "half": "first",
        "output_dir": str(folder(config)),
    }
    sizes = {
        "max_length": config.max_length,
        "max_train_samples": config.pairs,
        "max_eval_samples": config.test_pairs,
    }
    return replace(
        reward_train.PRESETS["demo"],
        **sources,
        **sizes,
        overwrite=True,
        seed=config.seed,
        **changes,
    )


def main(config: Config) -> None:
    if config.variant not in {*VARIANTS, *STOCK, "averaged", "half"}:
        raise UserError(f"--variant is one of {', '.join([*VARIANTS, 'averaged', 'half', *STOCK])}")
    here = folder(config)
    shutil.rmtree(here, ignore_errors=True)
    here.parent.mkdir(parents=True, exist_ok=True)
    if config.variant in VARIANTS:
        train(config)
    elif config.variant == "averaged":
        parts = [folder(config, "head_zero", seed) for seed in range(AVERAGED)]
        judge_average(config, parts, sum(map(train_seconds, parts)))
    elif config.variant == "half":
        made = read_run(config.reward_checkpoint, "reward")
        judge_average(
            config, [Path(config.reward_checkpoint)], train_seconds(Path(config.reward_checkpoint))
        )
        config = replace(config, pairs=made["data"]["train_rows"])
    else:
        stock(config)
    output = here.with_name(f"{here.name}.json")
    output.write_text(json.dumps(record(config), allow_nan=False) + "\n")
    console.print(f"Saved {output}.")


def folder(config: Config, variant: str | None = None, seed: int | None = None) -> Path:
    return (
        Path(config.work) / f"{variant or config.variant}_{config.seed if seed is None else seed}"
    )


def record(config: Config) -> dict[str, Any]:
    """What the run got right, pair by pair (2 right, 1 a tie, 0 wrong), with its other numbers."""
    here = folder(config)
    settings = asdict(config) | {"dataset": Path(config.dataset).name}
    found: dict[str, Any] = {
        "config": settings,
        "pairs": pairs_seen(config),
        "seconds": train_seconds(here),
    }
    for what in ("validation", "scores"):
        if (here / f"{what}.json").exists():
            pairs = read_scores(here / f"{what}.json")
            numbers = {
                key: value for key, value in judge(pairs).items() if not isinstance(value, list)
            }
            marks = {
                key: "".join(f"{2 * x:.0f}" for x in getattr(pairs, key))
                for key in ("right", "longer")
            }
            found["test" if what == "scores" else what] = numbers | marks
    return found


def pairs_seen(config: Config) -> int:
    """The pairs that the run was trained on: all, if it was not cut short."""
    if config.variant != "stock":
        return config.pairs
    return min(
        config.pairs, STOCK_BATCH * json.loads((folder(config) / "run.json").read_text())["steps"]
    )


# ---------------------------------------------------------------- our runs


def train(config: Config) -> None:
    """reward_train.py with a variant's changes, and the scores of test and validation pairs beside its checkpoint."""
    variant, here = VARIANTS[config.variant], folder(config)
    blank = here.with_name(f"{here.name}.no_sft")
    if variant.without_sft:
        blank_sft(config.sft_checkpoint, blank)

    class Trainer(reward_train.Trainer):
        def part_loss(self, rows):
            signs = [np.sign(len(row["chosen_ids"]) - len(row["rejected_ids"])) for row in rows]
            self.weights = self.weight_of_sign[np.array(signs) + 1].to(self.args.device)
            return super().part_loss(rows)

        def pair_losses(self, chosen, rejected):
            losses, margin = super().pair_losses(chosen, rejected), chosen - rejected
            if variant.balance_lengths:
                losses = losses + (self.weights - 1) * -F.logsigmoid(margin)
            if (
                variant.label_smoothing
            ):  # -(1 - e) logsigmoid(m) - e logsigmoid(-m) = -logsigmoid(m) + e m
                losses = losses + variant.label_smoothing * margin
            return losses

    def make_trainer(settings, shared, form, train_set, *rest):
        head = shared.heads["reward"].weight
        if variant.head_std is not None:
            torch.nn.init.normal_(head, std=variant.head_std)
        trainer = original(settings, shared, form, train_set, *rest)
        longer = [np.sign(len(row["chosen_ids"]) - len(row["rejected_ids"])) for row in train_set]
        counts = [max(1, longer.count(sign)) for sign in (-1, 0, 1)]
        half = (counts[0] + counts[2]) / 2
        trainer.weight_of_sign = torch.tensor([half / counts[0], 1.0, half / counts[2]])
        return trainer

    def write_evaluation(folder, metrics, pairs):
        write(folder, metrics, pairs)
        save_scores(folder / "scores.json", pairs)

    def evaluate(settings, shared, form, eval_sets, folder):
        save_validation(config, shared, form, folder)
        return judge_test(settings, shared, form, eval_sets, folder)

    original, write, judge_test = (
        reward_train.make_trainer,
        reward_train.write_evaluation,
        reward_train.evaluate,
    )
    changes = {
        "Trainer": Trainer,
        "make_trainer": make_trainer,
        "write_evaluation": write_evaluation,
    }
    changes["evaluate"] = evaluate
    with mock.patch.multiple(reward_train, **changes):
        settings = recipe(config)
        reward_train.main(
            replace(settings, sft_checkpoint=str(blank)) if variant.without_sft else settings
        )
    shutil.rmtree(blank, ignore_errors=True)


def blank_sft(folder: str, blank: Path) -> None:
    """The SFT checkpoint with LoRA B at 0: the base itself, in the place of an SFT model."""
    shutil.rmtree(blank, ignore_errors=True)
    shutil.copytree(folder, blank)
    weights = blank / "adapter_model.safetensors"
    save_file(
        {name: w * ("lora_B" not in name) for name, w in load_file(weights).items()},
        weights,
        {"format": "pt"},
    )
    facts = json.loads((blank / "run.json").read_text()) | {"adapter_sha256": sha256(weights)}
    (blank / "run.json").write_text(json.dumps(facts))


def judge_average(config: Config, folders: list[Path], seconds: float) -> None:
    """Score the mean of these reward models' adapters and heads, as one reward model."""
    shared, form = open_base(config)
    parts = [read_stacked(str(part), shared) for part in folders]
    state = {
        key: torch.cat([part["state"][key] for part in parts], 1 if "lora_B" in key else 0)
        / (len(parts) if "lora_B" in key else 1)
        for key in parts[0]["state"]
    }
    rank = sum(part["rank"] for part in parts)
    head = torch.stack([part["head"] for part in parts]).mean(0)
    shared.add_role("reward", rank, rank, parts[0]["num_layers"], state, head)
    here = folder(config)
    here.mkdir(exist_ok=True)
    save_validation(config, shared, form, here)
    tokens = tokenize_pairs(
        load_pairs(config.dataset, "test", config.test_pairs), form, config.max_length, "test"
    )
    save_scores(here / "scores.json", reward_train.score(shared, tokens, form.eos_token_id))
    (here / "run.json").write_text(json.dumps({"seconds": seconds}))


def open_base(config: Config) -> tuple[SharedBase, PromptFormat]:
    sft = read_run(config.sft_checkpoint, "sft")
    form = load_format(config.sft_checkpoint, sft)
    dtype = choose_dtype("auto", device())
    return SharedBase(
        load_base(sft["base"], dtype, form.pad_token_id), config.sft_checkpoint, dtype
    ), form


def save_validation(config: Config, shared: SharedBase, form: PromptFormat, folder: Path) -> None:
    pairs = load_pairs(config.dataset, "train", None, "second")[-config.validation_pairs :]
    tokens = tokenize_pairs(pairs, form, config.max_length, "validation")
    save_scores(folder / "validation.json", reward_train.score(shared, tokens, form.eos_token_id))


def save_scores(path: Path, pairs: ScoredPairs) -> None:
    path.write_text(json.dumps({name: array.tolist() for name, array in vars(pairs).items()}))


def read_scores(path: Path) -> ScoredPairs:
    return ScoredPairs(
        **{name: np.array(values) for name, values in json.loads(path.read_text()).items()}
    )


# ---------------------------------------------------------------- TRL's


def stock(config: Config) -> None:
    """Train and score TRL's stock reward model."""
    here = folder(config)
    sources = here.with_name(f"{here.name}.sources")  # the merged SFT model and the pairs
    shutil.rmtree(sources, ignore_errors=True)
    tokenizer = load_tokenizer(config.sft_checkpoint)
    form = PromptFormat(read_run(config.sft_checkpoint, "sft")["prompt_format"], tokenizer)
    model = AutoPeftModelForCausalLM.from_pretrained(config.sft_checkpoint, dtype=torch.float32)
    model.merge_and_unload().to(torch.bfloat16).save_pretrained(sources / "merged")
    tokenizer.save_pretrained(sources / "merged")
    pairs = write_texts(config, form, sources / "pairs")
    steps = math.ceil(pairs / STOCK_BATCH)
    if config.variant == "stock":
        whole = json.loads((folder(config, "stock_epoch", 0) / "run.json").read_text())
        steps = max(
            1, round(train_seconds(folder(config, "recipe")) / whole["seconds"] * whole["steps"])
        )
    stock_run(config, form, sources, steps)
    shutil.rmtree(sources)


def write_texts(config: Config, form: PromptFormat, folder: Path) -> int:
    """The pairs as the stock command takes them: the very tokens of ours, as text. Returns their number."""
    folder.mkdir()
    pairs = load_pairs(config.dataset, "train", config.pairs, "first")
    rows = []
    for p in tokenize_pairs(pairs, form, config.max_length, "train"):
        answers = [
            ids[:-1] if ids[-1] == form.eos_token_id else ids
            for ids in (p.chosen_ids, p.rejected_ids)
        ]
        chosen, rejected = (form.tokenizer.decode(p.prompt_ids + ids) for ids in answers)
        rows.append(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
    (folder / "train.jsonl").write_text("".join(rows))
    return len(rows)


def stock_run(config: Config, form: PromptFormat, sources: Path, steps: int) -> None:
    here = folder(config)
    log = here.with_suffix(".log")
    command = [
        *[
            str(Path(sys.executable).with_name("trl")),
            "reward",
            "--model_name_or_path",
            f"{sources}/merged",
        ],
        *[
            "--dataset_name",
            f"{sources}/pairs",
            "--output_dir",
            str(here),
            "--max_steps",
            str(steps),
        ],
        *[
            "--use_peft",
            "--lora_r",
            "16",
            "--lora_alpha",
            "32",
            "--lora_target_modules",
            "all-linear",
        ],
        *[
            "--lora_task_type",
            "SEQ_CLS",
            "--save_strategy",
            "no",
            "--gradient_checkpointing",
            "False",
        ],
        *["--report_to", "none", "--seed", str(config.seed)],
        *(["--use_cpu", "True"] if device().type == "cpu" else []),
    ]
    with log.open("w") as file:
        if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode:
            raise UserError(f"the stock trainer failed; see {log}")
    seconds = float(re.findall(r"'train_runtime': '?([\d.e+]+)", log.read_text())[-1])
    (here / "run.json").write_text(json.dumps({"seconds": seconds, "steps": steps}))
    save_scores(here / "scores.json", stock_scores(config, form, here))


@torch.no_grad()
def stock_scores(config: Config, form: PromptFormat, folder: Path) -> ScoredPairs:
    """What the stock model says of the test pairs: their very tokens, padded on the right, eight pairs at a time."""
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=form.pad_token_id, dtype=torch.float32
    ).eval()
    pairs = tokenize_pairs(
        load_pairs(config.dataset, "test", config.test_pairs), form, config.max_length, "test"
    )
    eos, scores = form.eos_token_id, []
    answers = [
        [reward_train.closed(ids, eos) for ids in (p.chosen_ids, p.rejected_ids)] for p in pairs
    ]
    for start in range(0, len(pairs), 8):
        part = range(start, min(start + 8, len(pairs)))
        ids = pad_right(
            [pairs[i].prompt_ids + answer for i in part for answer in answers[i]],
            form.pad_token_id,
            "cpu",
        )
        scores.append(
            model(ids, attention_mask=(ids != form.pad_token_id).long()).logits.float().view(-1, 2)
        )
    chosen, rejected = torch.cat(scores).double().numpy().T
    tokens = np.array([[len(a), len(b)] for a, b in answers])
    turns = np.array([sum(role == "user" for role, _ in p.pair.turns) for p in pairs])
    return ScoredPairs(chosen, rejected, *tokens.T, turns)


def train_seconds(folder: Path) -> float:
    """What training alone took, without loading and scoring."""
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        return json.loads((folder / "run.json").read_text())["seconds"]  # of the stock trainer
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return next(row["train_runtime"] for row in rows if "train_runtime" in row)


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
