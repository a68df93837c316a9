"""What helps a reward model that has few pairs: one change at a time, several seeds each, beside TRL's stock trainer.

    python benchmarks/reward_ablation.py --sft-checkpoint runs/results/sft --dataset Dahoas/rm-static

Every run trains on the same pairs, those of the first half of the dialogues, and is scored on the same test pairs and
on the same validation pairs, training rows of the other half: choose a recipe by these, so that the test pairs still say
what it is worth. Intervals are bootstraps over seeds and pairs; differences are paired over pairs. Finished runs are kept
in --work and not done again. Variants that reward_train.py has no flag for are made here, around it: what is not worth a
flag is not in the script.

`averaged` is one model, the mean of the adapters of `head_zero`, runs that differ in seed but start from one head (WARM,
2401.12187). `stock` is the `trl reward` command at its defaults, with the same LoRA on the same pairs, from the same SFT
model merged into its base: once for as long as `recipe` trained, and once for a whole epoch (`stock_epoch`).
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
from rlhf.modeling import SharedBase, choose_dtype, load_base, load_format, load_tokenizer, pad_right, read_stacked  # noqa: E402
from rlhf.reporting import console  # noqa: E402
from rlhf.reward_eval import ScoredPairs, judge  # noqa: E402
from rlhf.training import device  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification  # noqa: E402
from rich.table import Table  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


@dataclass(frozen=True)
class Variant:
    """One change of the recipe."""

    changes: dict[str, Any] = field(default_factory=dict)  # of reward_train.Config
    label_smoothing: float = 0.0  # the share of labels taken to be wrong
    balance_lengths: bool = False  # pairs weigh so that longer and shorter winners count alike
    head_std: float | None = None  # of the head's initialisation; None: 1 / sqrt(H + 1)
    without_sft: bool = False  # straight on the base


STOCK = ("stock", "stock_epoch")  # TRL's trainer, for as long as `recipe` trained, and for an epoch
MEANS = ("length_balanced_accuracy", "eval_loss", "calibration_error", "score_length_correlation")
VARIANTS = {
    "recipe": Variant(),
    "double_lr": Variant({"learning_rate": 2e-3}),
    "all_layers": Variant({"role_layers": 0}),
    "two_epochs": Variant({"num_train_epochs": 2.0}),
    "not_centred": Variant({"center_rewards_coefficient": 0.0}),
    "head_zero": Variant(head_std=0.0),
    "smoothed": Variant(label_smoothing=0.1),
    "balanced": Variant(balance_lengths=True),
    "without_sft": Variant(without_sft=True),
    "low_lr": Variant({"learning_rate": 2e-4}),
}


@dataclass(frozen=True)
class Config:
    sft_checkpoint: str = "runs/results/sft"
    dataset: str = "Dahoas/rm-static"
    pairs: int = 1000  # the first so many training pairs of the first half
    validation_pairs: int = 600  # the first so many of the second half
    max_length: int = 256  # tokens
    variants: tuple[str, ...] = tuple(VARIANTS)
    stock: bool = True  # TRL's stock trainer, too
    seeds: int = 3
    work: str = "runs/results/reward"  # a folder a run; what is there is not trained again
    output: str = "runs/results/reward/ablation.json"


def recipe(config: Config, name: str, seed: int) -> reward_train.Config:
    """The settings of a run: the demo's, but one epoch, and a higher learning rate."""
    changes = {"learning_rate": 1e-3, "num_train_epochs": 1.0} | VARIANTS[name].changes
    folder = Path(config.work) / f"{name}_{seed}"
    sft = str(Path(config.work) / "no_sft") if VARIANTS[name].without_sft else config.sft_checkpoint
    sources = {"sft_checkpoint": sft, "dataset": config.dataset, "half": "first", "output_dir": str(folder)}
    sizes = {"max_length": config.max_length, "max_train_samples": config.pairs, "max_eval_samples": None}
    return replace(reward_train.PRESETS["demo"], **sources, **sizes, overwrite=True, seed=seed, **changes)


def main(config: Config) -> None:
    unknown = set(config.variants) - set(VARIANTS)
    if unknown or "recipe" not in config.variants or config.seeds < 1:
        raise UserError(f"--variants are recipe and any of {', '.join(VARIANTS)}; --seeds at least 1")
    work = Path(config.work)
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    keep_config(work, config, ("sft_checkpoint", "dataset", "pairs", "validation_pairs", "max_length"))
    if any(VARIANTS[name].without_sft for name in config.variants):
        blank_sft(config.sft_checkpoint, work / "no_sft")
    for seed in range(config.seeds):
        for name in config.variants:
            if not (work / f"{name}_{seed}" / "scores.json").exists():
                console.print(f"{name}, seed {seed} ...")
                try:
                    train(config, name, seed)
                except UserError as error:  # it diverged, or learned nothing: that is a result
                    raise UserError(f"{name}, seed {seed}: {error}; leave it out of --variants") from None
    names = list(config.variants)
    if "head_zero" in names and config.seeds > 1:
        average(config)
        names.append("averaged")
    if config.stock:
        names += stock(config)
    results = summary(config, names)
    Path(config.output).write_text(json.dumps(results, indent=2) + "\n")
    show(results)
    console.print(f"Saved {config.output}.")


# ---------------------------------------------------------------- our runs


def train(config: Config, name: str, seed: int) -> None:
    """reward_train.py with a variant's changes, and the scores of test and validation pairs beside its checkpoint."""
    variant = VARIANTS[name]

    class Trainer(reward_train.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            margin = chosen - rejected
            if variant.balance_lengths:
                a, b = inputs["attention_mask"].sum(1).chunk(2)
                weights = self.weight_of_sign.to(margin.device)[(a - b).sign() + 1]
                loss = loss + ((weights - 1) * -F.logsigmoid(margin)).mean()
            if variant.label_smoothing:  # -(1 - e) logsigmoid(m) - e logsigmoid(-m) = -logsigmoid(m) + e m
                loss = loss + variant.label_smoothing * margin.mean()
            return (loss, outputs) if return_outputs else loss

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

    def evaluate(settings, shared, form, eval_set, folder):
        save_validation(config, shared, form, folder)
        return judge_test(settings, shared, form, eval_set, folder)

    original, write, judge_test = reward_train.make_trainer, reward_train.write_evaluation, reward_train.evaluate
    changes = {"Trainer": Trainer, "make_trainer": make_trainer, "write_evaluation": write_evaluation}
    changes["evaluate"] = evaluate
    with mock.patch.multiple(reward_train, **changes):
        reward_train.main(recipe(config, name, seed))


def blank_sft(folder: str, blank: Path) -> None:
    """The SFT checkpoint with LoRA B at 0: the base itself, in the place of an SFT model."""
    if blank.exists():
        return
    partial = blank.with_name(f"{blank.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder, partial)
    weights = partial / "adapter_model.safetensors"
    save_file({name: w * ("lora_B" not in name) for name, w in load_file(weights).items()}, weights, {"format": "pt"})
    facts = json.loads((partial / "run.json").read_text()) | {"adapter_sha256": sha256(weights)}
    (partial / "run.json").write_text(json.dumps(facts))
    partial.rename(blank)


def average(config: Config) -> None:
    """The mean of the adapters and heads of `head_zero` over the seeds, as one reward model."""
    folder = Path(config.work) / f"averaged_{config.seeds}"
    if (folder / "scores.json").exists():
        return
    shared, form = open_base(config)
    parts = [read_stacked(f"{config.work}/head_zero_{seed}", shared) for seed in range(config.seeds)]
    state = {
        key: torch.cat([part["state"][key] for part in parts], 1 if "lora_B" in key else 0)
        / (len(parts) if "lora_B" in key else 1)
        for key in parts[0]["state"]
    }
    rank = sum(part["rank"] for part in parts)
    head = torch.stack([part["head"] for part in parts]).mean(0)
    shared.add_role("reward", rank, rank, parts[0]["num_layers"], state, head)
    folder.mkdir(exist_ok=True)
    save_validation(config, shared, form, folder)
    tokens = tokenize_pairs(load_pairs(config.dataset, "test"), form, config.max_length, "test")
    save_scores(folder / "scores.json", reward_train.score(shared, tokens, form.eos_token_id, 16))


def open_base(config: Config) -> tuple[SharedBase, PromptFormat]:
    sft = read_run(config.sft_checkpoint, "sft")
    form = load_format(config.sft_checkpoint, sft)
    dtype = choose_dtype("auto", device())
    return SharedBase(load_base(sft["base"], dtype, form.pad_token_id), config.sft_checkpoint, dtype), form


def keep_config(work: Path, config: Any, names: tuple[str, ...]) -> None:
    """Note what all runs in `work` share. Raises UserError when runs of other settings are there."""
    work.mkdir(parents=True, exist_ok=True)
    settings, path = {name: getattr(config, name) for name in names}, work / "config.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise UserError(f"{work} holds runs of other settings ({path.read_text()}): choose another --work")
    path.write_text(json.dumps(settings))


def save_validation(config: Config, shared: SharedBase, form: PromptFormat, folder: Path) -> None:
    pairs = load_pairs(config.dataset, "train", config.validation_pairs, "second")
    tokens = tokenize_pairs(pairs, form, config.max_length, "validation")
    save_scores(folder / "validation.json", reward_train.score(shared, tokens, form.eos_token_id, 16))


def save_scores(path: Path, pairs: ScoredPairs) -> None:
    path.write_text(json.dumps({name: array.tolist() for name, array in vars(pairs).items()}))


def read_scores(path: Path) -> ScoredPairs:
    return ScoredPairs(**{name: np.array(values) for name, values in json.loads(path.read_text()).items()})


# ---------------------------------------------------------------- TRL's


def stock(config: Config) -> list[str]:
    """Train and score TRL's stock reward models; the names of those that are there."""
    work = Path(config.work)
    tokenizer = load_tokenizer(config.sft_checkpoint)
    form = PromptFormat(read_run(config.sft_checkpoint, "sft")["prompt_format"], tokenizer)
    if not (work / "merged").exists():
        model = AutoPeftModelForCausalLM.from_pretrained(config.sft_checkpoint, dtype=torch.float32)
        model.merge_and_unload().to(torch.bfloat16).save_pretrained(work / "merged.partial")
        tokenizer.save_pretrained(work / "merged.partial")
        (work / "merged.partial").rename(work / "merged")
    if not (work / "pairs").exists():
        write_texts(config, form)
    for seed in range(config.seeds):
        if not (work / f"stock_epoch_{seed}" / "scores.json").exists():
            stock_run(config, form, f"stock_epoch_{seed}", seed, [])
        if not (work / f"stock_{seed}" / "scores.json").exists():
            whole = json.loads((work / f"stock_epoch_{seed}" / "run.json").read_text())
            steps = max(1, round(train_seconds(work / f"recipe_{seed}") / whole["seconds"] * whole["steps"]))
            stock_run(config, form, f"stock_{seed}", seed, ["--max_steps", str(steps)])
    return list(STOCK)


def write_texts(config: Config, form: PromptFormat) -> None:
    """The pairs as the stock command takes them: the very tokens of ours, as text."""
    partial = Path(config.work) / "pairs.partial"
    partial.mkdir(exist_ok=True)
    pairs = load_pairs(config.dataset, "train", config.pairs, "first")
    rows = []
    for p in tokenize_pairs(pairs, form, config.max_length, "train"):
        answers = [ids[:-1] if ids[-1] == form.eos_token_id else ids for ids in (p.chosen_ids, p.rejected_ids)]
        chosen, rejected = (form.tokenizer.decode(p.prompt_ids + ids) for ids in answers)
        rows.append(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
    (partial / "train.jsonl").write_text("".join(rows))
    partial.rename(Path(config.work) / "pairs")


def stock_run(config: Config, form: PromptFormat, name: str, seed: int, more: list[str]) -> None:
    console.print(f"{name} ...")
    folder = Path(config.work) / name
    log = folder.with_suffix(".log")
    command = [
        *[str(Path(sys.executable).with_name("trl")), "reward", "--model_name_or_path", f"{config.work}/merged"],
        *["--dataset_name", f"{config.work}/pairs", "--output_dir", str(folder), "--num_train_epochs", "1"],
        *["--use_peft", "--lora_r", "16", "--lora_alpha", "32", "--lora_target_modules", "all-linear"],
        *["--lora_task_type", "SEQ_CLS", "--save_strategy", "no", "--gradient_checkpointing", "False"],
        *["--report_to", "none", "--seed", str(seed), *more],
        *(["--use_cpu", "True"] if device().type == "cpu" else []),
    ]
    with log.open("w") as file:
        if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode:
            raise UserError(f"the stock trainer failed; see {log}")
    seconds = float(re.findall(r"'train_runtime': '?([\d.e+]+)", log.read_text())[-1])
    pairs = len((Path(config.work) / "pairs" / "train.jsonl").read_text().splitlines())
    steps = int(more[1]) if more else math.ceil(pairs / 8)
    (folder / "run.json").write_text(json.dumps({"seconds": seconds, "steps": steps}))
    save_scores(folder / "scores.json", stock_scores(config, form, folder))


@torch.no_grad()
def stock_scores(config: Config, form: PromptFormat, folder: Path) -> ScoredPairs:
    """What the stock model says of the test pairs: their very tokens, padded on the right, eight pairs at a time."""
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=form.pad_token_id, dtype=torch.float32
    ).eval()
    pairs = tokenize_pairs(load_pairs(config.dataset, "test"), form, config.max_length, "test")
    eos, scores = form.eos_token_id, []
    answers = [[reward_train.closed(ids, eos) for ids in (p.chosen_ids, p.rejected_ids)] for p in pairs]
    for start in range(0, len(pairs), 8):
        part = range(start, min(start + 8, len(pairs)))
        ids = pad_right([pairs[i].prompt_ids + answer for i in part for answer in answers[i]], form.pad_token_id, "cpu")
        scores.append(model(ids, attention_mask=(ids != form.pad_token_id).long()).logits.float().view(-1, 2))
    chosen, rejected = torch.cat(scores).double().numpy().T
    tokens = np.array([[len(a), len(b)] for a, b in answers])
    turns = np.array([sum(role == "user" for role, _ in p.pair.turns) for p in pairs])
    return ScoredPairs(chosen, rejected, *tokens.T, turns)


# ---------------------------------------------------------------- the table


def summary(config: Config, names: list[str]) -> dict[str, Any]:
    """For each variant the means over its seeds, with intervals, beside the recipe's."""
    work, rows = Path(config.work), {name: {} for name in names}
    seeds = {name: [config.seeds] if name == "averaged" else range(config.seeds) for name in names}
    for file, prefix in (("validation.json", "validation_"), ("scores.json", "")):
        scored = {
            name: [read_scores(work / f"{name}_{seed}" / file) for seed in seeds[name]]
            for name in names
            if file == "scores.json" or name not in STOCK
        }
        right = {name: np.array([pairs.right for pairs in runs]) for name, runs in scored.items()}  # [seeds, pairs]
        longer = scored["recipe"][0].longer[None]
        for name, runs in scored.items():
            judged = [judge(pairs) for pairs in runs]
            numbers = {
                "accuracy_by_seed": [j["eval_accuracy"] for j in judged],
                **interval("accuracy", right[name]),
                **interval("above_longer_wins", right[name], longer),
                **({} if name == "recipe" else interval("above_recipe", right[name], right["recipe"])),
                **{key: float(np.mean([j[key] for j in judged if j[key] is not None])) for key in MEANS},
            }
            rows[name] |= {f"{prefix}{key}": value for key, value in numbers.items()}
    for name in names:
        if name != "averaged":
            rows[name]["seconds"] = float(np.mean([train_seconds(work / f"{name}_{seed}") for seed in seeds[name]]))
        if name in STOCK:
            rows["recipe"] |= interval(f"above_{name}", right["recipe"], right[name])
    return {"config": asdict(config), "longer_wins": float(longer.mean()), "variants": rows}


def interval(name: str, values: np.ndarray, against: np.ndarray | None = None, samples: int = 2000) -> dict[str, float]:
    """Mean of `values` [seeds, pairs], less that of `against`; bootstrap over the seeds of each, and over the pairs."""
    random, draws = np.random.default_rng(0), []
    for _ in range(samples):
        pairs = random.integers(0, values.shape[1], values.shape[1])
        means = [
            part[random.integers(0, len(part), len(part))].mean(0)[pairs].mean()
            for part in (values, against)
            if part is not None
        ]
        draws.append(means[0] - sum(means[1:]))
    low, high = np.quantile(draws, [0.025, 0.975])
    mean = values.mean() - (0 if against is None else against.mean())
    return {name: float(mean), f"{name}_low": float(low), f"{name}_high": float(high)}


def train_seconds(folder: Path) -> float:
    """What training alone took, without loading and scoring."""
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        return json.loads((folder / "run.json").read_text())["seconds"]  # of the stock trainer
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return next(row["train_runtime"] for row in rows if "train_runtime" in row)


def show(results: dict[str, Any]) -> None:
    table = Table("", "validation (95 %)", "above recipe", "loss", "test (95 %)", "by seed", "above recipe", "loss")
    for name in ("length-balanced", "length corr.", "s"):
        table.add_column(name)
    for name, r in results["variants"].items():
        cells = []
        for prefix in ("validation_", ""):
            if f"{prefix}accuracy" not in r:
                cells += ["", "", ""]
                continue
            cells.append(span(r, f"{prefix}accuracy", ".3f"))
            cells += [" ".join(f"{value:.3f}" for value in r["accuracy_by_seed"])] if not prefix else []
            cells.append("" if name == "recipe" else span(r, f"{prefix}above_recipe", "+.3f"))
            cells.append(f"{r[f'{prefix}eval_loss']:.3f}")
        cells += [f"{r[key]:.3f}" for key in ("length_balanced_accuracy", "score_length_correlation")]
        table.add_row(name, *cells, f"{r['seconds']:.0f}" if "seconds" in r else "")
    console.print(table)
    console.print(f'"the longer response wins" gets {results["longer_wins"]:.3f} on the test pairs')


def span(r: dict[str, Any], key: str, form: str) -> str:
    return f"{r[key]:{form}} ({r[f'{key}_low']:{form}} to {r[f'{key}_high']:{form}})"


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
