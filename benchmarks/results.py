"""Evidence that it learns: reward models and PPO on real preferences, judged by what they were not trained on.

    make results                         # on Dahoas/rm-static; many hours on a CPU
    make results DATA=path/to/rm-static  # on a local copy or a slice of it

It prints what it will cost, then works through the steps below in runs/results. Each leaves a small record of what it
found, and what has one is not done again, so it can be stopped and started. Every seed of PPO is a whole chain: its own
SFT model, its own reward model of the first half of the pairs, its own gold one of the second half. It ends by writing
docs/results.json, which holds all records, docs/results.md, made of it, and the plots beside them.
"""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from compare_outputs import fenced  # noqa: E402
from rlhf.checkpoints import git_commit  # noqa: E402
from rlhf.cli import UserError, run  # noqa: E402
from rlhf.reporting import SPEAKERS, bootstrap, console, preference  # noqa: E402

import numpy as np  # noqa: E402
import ppo_ablation  # noqa: E402
import reward_ablation  # noqa: E402
from ppo_vs_trl import hardware  # noqa: E402
from rich.table import Table  # noqa: E402

SEEDS = (0, 1, 2)  # of the chains and of the reward models' ablation
ABLATION_SEEDS = (0, 1)  # of PPO's
REWARD = {"max_length": 256, "num_train_epochs": 1, "learning_rate": 1e-3}
PROMPTS = 480  # held-out prompts of the win rates at most
PERCENTILES = (100, 90, 50, 10, 0)  # of the gold gain over SFT: the samples that are shown
PLOTS = {"reward_0/evaluation.png": "reward_evaluation.png"} | {
    f"ppo_{seed}/frontier.png": f"ppo_frontier_{seed}.png" for seed in SEEDS
}


@dataclass(frozen=True)
class Config:
    base_model: str = "models/SmolLM2-135M-Instruct"
    dataset: str = "Dahoas/rm-static"
    work: str = "runs/results"
    output: str = "docs"
    only_report: bool = False  # write the report of what is finished, and train nothing


@dataclass(frozen=True)
class Step:
    name: str  # its record is records/NAME.json in the work folder
    folder: str  # what it leaves there for the steps that need it
    minutes: int  # of one core of an AMD EPYC with AVX512-BF16; it varies by a factor of two
    command: str
    needs: tuple[str, ...] = ()  # names of the steps whose folders it reads
    record: Callable[[Path], Any] | None = None  # makes the record of its folder; None: the command writes it


def steps(config: Config) -> list[Step]:
    """All steps in order."""
    work, data = config.work, f"--dataset {config.dataset}"
    todo = []
    for seed in SEEDS:
        sft, reward, gold = f"sft_{seed}", f"reward_{seed}", f"gold_{seed}"
        source = f"{data} --seed {seed} --overwrite"
        todo.append(
            Step(
                *(sft, sft, 20),
                f"sft_train.py --preset demo {source} --base-model {config.base_model} --max-length 256 "
                f"--max-train-samples 1500 --output-dir {work}/{sft}",
                record=metrics,
            )
        )
        # Seeds that differ, else both would start from the same head and LoRA A, and share what that makes of a text.
        for name, half, own in ((reward, "first", seed), (gold, "second", seed + 1)):
            command = f"reward_train.py --preset demo {data} --seed {own} --overwrite --sft-checkpoint {work}/{sft} "
            command += f"{flags(REWARD)} --half {half} --output-dir {work}/{name}"
            todo.append(Step(name, name, 25, command, (sft,), metrics))
        parents = f"--sft-checkpoint {work}/{sft} --reward-checkpoint {work}/{reward} --gold-checkpoint {work}/{gold}"
        command = f"ppo_train.py --preset demo {source} {parents} {flags(ppo_ablation.PPO)} --total-episodes 1536"
        command += f" --max-eval-samples 128 --output-dir {work}/ppo_{seed}"
        todo.append(Step(f"ppo_{seed}", f"ppo_{seed}", 60, command, (sft, reward, gold), metrics))
        judged = f"compare_outputs.py --preset demo --sft-checkpoint {work}/{sft} --reward-checkpoint {work}/{gold} "
        judged += (
            f"--ppo-checkpoint {work}/ppo_{seed} --max-prompt-length 160 --temperature 0.7 --batch-size 16 --show 0"
        )
        needed = (sft, gold, f"ppo_{seed}")
        command = f"{judged} --overwrite {data} --num-test-prompts {PROMPTS} --output-dir {work}/compare_{seed}"
        todo.append(Step(f"compare_{seed}", f"compare_{seed}", 20, command, needed, comparison))
        if seed == SEEDS[0]:
            command = f"{judged} --overwrite --dataset demo/data --num-test-prompts 80 --output-dir {work}/samples"
            todo.append(Step("samples", "samples", 4, command, needed, samples))
    for seed in SEEDS:
        for variant in reward_ablation.VARIANTS:
            todo.append(ablation("reward", variant, seed, 10, data, work, ("sft_0",)))
    todo.append(ablation("reward", "stock_epoch", 0, 40, data, work, ("sft_0",)))
    for seed in SEEDS:
        needed = ("sft_0", f"reward_recipe_{seed}", "reward_stock_epoch_0")
        todo.append(ablation("reward", "stock", seed, 12, data, work, needed))
    averaged = tuple(f"reward_head_zero_{seed}" for seed in range(reward_ablation.AVERAGED))
    todo.append(ablation("reward", "averaged", 0, 3, data, work, ("sft_0", *averaged)))
    for seed in ABLATION_SEEDS:
        for variant in ppo_ablation.VARIANTS:
            todo.append(ablation("ppo", variant, seed, 17, data, work, ("sft_0", "reward_0", "gold_0")))
    return todo


def ablation(what: str, variant: str, seed: int, minutes: int, data: str, work: str, needs: tuple[str, ...]) -> Step:
    name, folder = f"{what}_{variant}_{seed}", f"{what}_ablation"
    command = f"benchmarks/{what}_ablation.py --variant {variant} --seed {seed} {data} --sft-checkpoint {work}/sft_0 "
    if what == "ppo":
        command += f"--reward-checkpoint {work}/reward_0 --gold-checkpoint {work}/gold_0 "
    command += f"--work {work}/{folder} --output {work}/records/{name}.json"
    return Step(name, f"{folder}/{variant}_{seed}", minutes, command, needs)


def flags(settings: dict[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())


def main(config: Config) -> None:
    todo = [] if config.only_report else [step for step in steps(config) if not path_of(config, step).exists()]
    show_cost(config)
    for step in todo:
        do(config, step)
    records = {
        path.stem: json.loads(path.read_text()) for path in sorted((ROOT / config.work / "records").glob("*.json"))
    }
    report = {"hardware": hardware(), "commit": git_commit(), "dataset": Path(config.dataset).name}
    report |= {"steps": {step.name: command_of(config, step) for step in steps(config)}, "records": records}
    report["summary"] = summary(records)
    output = ROOT / config.output
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    for plot, name in PLOTS.items():
        if (ROOT / config.work / plot).exists():
            shutil.copyfile(ROOT / config.work / plot, output / name)
    (output / "results.md").write_text(markdown(report))
    console.print(f"Saved {config.output}/results.md and {config.output}/results.json.")


def path_of(config: Config, step: Step) -> Path:
    return ROOT / config.work / "records" / f"{step.name}.json"


def command_of(config: Config, step: Step) -> str:
    return f"python {step.command}".replace(config.dataset, Path(config.dataset).name)  # no local paths


def do(config: Config, step: Step) -> None:
    """Run a step, after those whose folders it needs and that are not here any more."""
    by_name = {step.name: step for step in steps(config)}
    for name in step.needs:
        if not (ROOT / config.work / by_name[name].folder).exists():
            do(config, by_name[name])
    console.rule(step.name)
    if subprocess.run([sys.executable, *shlex.split(step.command)], cwd=ROOT).returncode:
        raise UserError(f"{step.name} failed; mend it and run `make results` again: what is finished is kept")
    if step.record:
        path = path_of(config, step)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(step.record(ROOT / config.work / step.folder)) + "\n")


def show_cost(config: Config) -> None:
    """What there is to do and about how long it takes."""
    table = Table("step", "minutes, about", title="On one core of an AMD EPYC with AVX512-BF16")
    left = 0
    for step in steps(config):
        done = path_of(config, step).exists()
        table.add_row(step.name, "done" if done else str(step.minutes))
        left += 0 if done else step.minutes
    table.add_row("left", str(left))
    console.print(table)


# ---------------------------------------------------------------- records


def metrics(folder: Path) -> dict[str, Any]:
    """Of a training run: its metrics, and seconds with loading, evaluating and saving."""
    found = json.loads((folder / "run.json").read_text())
    return {"metrics": found["metrics"], "seconds": found["seconds"]}


def comparison(folder: Path) -> dict[str, Any]:
    """Of a comparison: win rates, means, and of each model's answers the gold scores and tokens, without any text."""
    report = json.loads((folder / "compare.json").read_text())
    answers = {
        name: {key: [entry["answers"][name][key] for entry in report["prompts"]] for key in ("score", "tokens")}
        for name in report["models"]
    }
    return {"pairs": report["pairs"], "summary": report["summary"], "answers": answers}


def samples(folder: Path) -> dict[str, Any]:
    """The prompts at PERCENTILES of the gold gain over SFT, with all answers."""
    entries = json.loads((folder / "compare.json").read_text())["prompts"]
    entries.sort(key=lambda entry: entry["answers"]["PPO"]["score"] - entry["answers"]["SFT"]["score"])
    return {"shown": [{"percentile": p, **entries[round(p / 100 * (len(entries) - 1))]} for p in PERCENTILES]}


# ---------------------------------------------------------------- what came out


def summary(records: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the page that are worked out from several records."""
    found: dict[str, Any] = {}
    if all(f"reward_recipe_{seed}" in records for seed in SEEDS):
        found["reward"] = reward_summary(records)
    compared = [records[f"compare_{seed}"]["answers"] for seed in SEEDS if f"compare_{seed}" in records]
    if compared:
        found["win_rate"] = over_seeds(compared)
        gains = [
            np.array([np.subtract(c["PPO"][key], c["SFT"][key]) for c in compared]).ravel()
            for key in ("score", "tokens")
        ]
        found["length_correlation"] = float(np.corrcoef(gains)[0, 1])
    return found


def over_seeds(compared: list[dict[str, Any]]) -> dict[str, float]:
    """PPO's win rate over SFT by the gold model, the mean over seeds for each prompt; interval over prompts."""
    wins = np.mean([preference(c["PPO"]["score"], c["SFT"]["score"]) for c in compared], axis=0)
    low, high = np.quantile(bootstrap(wins), [0.025, 0.975])
    return {
        "seeds": len(compared),
        "prompts": len(wins),
        "win_rate": float(wins.mean()),
        "win_rate_low": float(low),
        "win_rate_high": float(high),
    }


def reward_summary(records: dict[str, Any]) -> dict[str, Any]:
    """For each variant the means over its seeds, with intervals, beside the recipe's."""
    rows: dict[str, dict[str, Any]] = {}
    names = [*reward_ablation.VARIANTS, "averaged", *reward_ablation.STOCK]
    runs = {name: [records[key] for seed in SEEDS if (key := f"reward_{name}_{seed}") in records] for name in names}
    runs = {name: found for name, found in runs.items() if found}
    for part, prefix in (("validation", "validation_"), ("test", "")):
        right = {name: marks([run[part] for run in found], "right") for name, found in runs.items() if part in found[0]}
        longer = marks([runs["recipe"][0][part]], "longer")
        for name, values in right.items():
            found = interval("accuracy", values) | interval("above_longer_wins", values, longer)
            found |= {} if name == "recipe" else interval("above_recipe", values, right["recipe"])
            for key in ("length_balanced_accuracy", "eval_loss", "calibration_error", "score_length_correlation"):
                found[key] = float(np.mean([run[part][key] for run in runs[name]]))
            rows.setdefault(name, {}).update({f"{prefix}{key}": value for key, value in found.items()})
        if part == "test":
            for name in reward_ablation.STOCK:
                rows["recipe"] |= interval(f"above_{name}", right["recipe"], right[name]) if name in right else {}
    for name, found in runs.items():
        rows[name] |= {"seeds": len(found), "seconds": float(np.mean([run["seconds"] for run in found]))}
    config = {key: runs["recipe"][0]["config"][key] for key in ("pairs", "validation_pairs", "max_length")}
    return config | {"longer_wins": float(longer.mean()), "variants": rows}


def marks(parts: list[dict[str, Any]], key: str) -> np.ndarray:
    """[runs, pairs]: 1 right, 0.5 a tie, 0 wrong."""
    return np.array([[int(mark) / 2 for mark in part[key]] for part in parts])


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


# ---------------------------------------------------------------- the page


def markdown(r: dict[str, Any]) -> str:
    """docs/results.md: of what there is a record."""
    records, found = r["records"], r["summary"]
    blocks = header(r)
    if "reward" in found:
        blocks += reward_part(found["reward"])
    chains = {seed: records[f"ppo_{seed}"]["metrics"] for seed in SEEDS if f"ppo_{seed}" in records}
    if chains:
        blocks += chains_part(records, chains)
    if "win_rate" in found:
        blocks += win_part(records, found)
    if any(name.startswith("ppo_as_it_comes") for name in records):
        blocks += ablation_part(records)
    if "samples" in records:
        blocks += sample_part(records["samples"]["shown"])
    return "\n\n".join([*blocks, *how_part(r)]) + "\n"


def header(r: dict[str, Any]) -> list[str]:
    found, records = r["summary"], r["records"]
    lines = [
        "# Does it learn?",
        f"SmolLM2-135M-Instruct on rm-static ({r['dataset']}), on a CPU. Everything here was made by `make results`; "
        "every number is in [results.json](results.json). Intervals are 95 %.",
    ]
    if "reward" in found:
        reward = found["reward"]
        recipe = reward["variants"]["recipe"]
        line = (
            f"- Reward model: test accuracy {share(recipe, 'accuracy')} on {reward['pairs']} training pairs, mean of "
            f'{recipe["seeds"]} seeds. "The longer response wins" gets {reward["longer_wins"]:.3f} (difference '
            f"{signed(recipe, 'above_longer_wins', '.3f')})"
        )
        for name, what in (("stock", "in the same time"), ("stock_epoch", "in a whole epoch")):
            if name in reward["variants"]:
                line += f", TRL's stock trainer {what} {reward['variants'][name]['accuracy']:.3f} (difference "
                line += f"{signed(recipe, f'above_{name}', '.3f')})"
        lines.append(line + ".")
    if "win_rate" in found:
        wins = found["win_rate"]
        runs = [records[f"ppo_{seed}"]["metrics"] for seed in SEEDS if f"ppo_{seed}" in records]
        gold, tokens, sft = (span(runs, key) for key in ("gold_gain", "ppo_response_length", "sft_response_length"))
        lines.append(
            f"- PPO, {len(runs)} seeds, each with its own SFT, reward and gold model: by the gold model, trained on other "
            f"pairs, its answers win against SFT's on {wins['win_rate']:.0%} of {wins['prompts']} held-out prompts "
            f"({wins['win_rate_low']:.0%} to {wins['win_rate_high']:.0%}); gold gain {gold}, response length {tokens} tokens "
            f"against SFT's {sft}."
        )
    return lines


def reward_part(reward: dict[str, Any]) -> list[str]:
    head = ("", "seeds", "validation", "against the recipe", "test", "against the recipe", "length-balanced", "loss")
    head += ("calibration error", "correlation with length", "seconds")
    rows = []
    for name, v in reward["variants"].items():
        cells = [str(v["seeds"])]
        for prefix in ("validation_", ""):
            cells.append(share(v, f"{prefix}accuracy") if f"{prefix}accuracy" in v else "")
            cells.append(signed(v, f"{prefix}above_recipe", ".3f") if f"{prefix}above_recipe" in v else "")
        cells += [f"{v[key]:.3f}" for key in ("length_balanced_accuracy", "eval_loss", "calibration_error")]
        rows.append((name, *cells, f"{v['score_length_correlation']:.2f}", f"{v['seconds']:.0f}"))
    return [
        "## What makes a better reward model",
        f"One change at a time on the same {reward['pairs']} pairs of up to {reward['max_length']} tokens. Validation: "
        f"{reward['validation_pairs']} training rows of other dialogues, by which the recipe was chosen; what follows is of the "
        "test pairs. Intervals are over seeds and pairs, differences paired over the pairs. Length-balanced: pairs whose longer "
        "response was chosen and those whose shorter one was weigh alike, so that length alone gets 0.5. `averaged` is one model, "
        "the mean of `head_zero`'s adapters over the seeds. `stock` is `trl reward` at its defaults for as long as the recipe "
        "took, `stock_epoch` for all pairs. What each variant changes stands in `benchmarks/reward_ablation.py`.",
        table(head, rows),
    ]


def chains_part(records: dict[str, Any], chains: dict[int, dict[str, Any]]) -> list[str]:
    judges = ("model", "accuracy", "longer wins", "length-balanced", "calibration error", "correlation with length")
    rows = [
        (
            f"{name} {seed}",
            share(m, "eval_accuracy"),
            *(f"{m[key]:.3f}" for key in ("longer_wins_accuracy", "length_balanced_accuracy", "calibration_error")),
            f"{m['score_length_correlation']:.2f}",
        )
        for seed in chains
        for name in ("reward", "gold")
        for m in [records[f"{name}_{seed}"]["metrics"]]
    ]
    head = (
        "seed",
        "score gain",
        "in SFT's std",
        "gold gain",
        "gold, at equal length",
        "KL",
        "tokens",
        "EOS",
        "entropy",
    )
    head += ("repeated 3-grams", "distinct-2")
    runs = [
        (
            str(seed),
            signed(m, "score_gain"),
            f"{m['score_gain'] / m['sft_score_std']:.2f}",
            signed(m, "gold_gain"),
            signed(m, "gold_gain_at_equal_length"),
            f"{m['ppo_kl']:.1f}",
            f"{m['sft_response_length']:.1f} -> {m['ppo_response_length']:.1f}",
            f"{m['sft_eos_rate']:.0%} -> {m['ppo_eos_rate']:.0%}",
            *(
                f"{m[f'sft_{key}']:.2f} -> {m[f'ppo_{key}']:.2f}"
                for key in ("entropy", "repeated_3grams", "distinct_2")
            ),
        )
        for seed, m in chains.items()
    ]
    warned = [f"seed {seed}: {text}" for seed, m in chains.items() for text in m["warnings"]]
    return [
        "## PPO",
        "Reward models of the first half of all pairs, which PPO trains against, and gold ones of the second half, on the test pairs:",
        table(judges, rows),
        "![the evaluation of reward model 0](reward_evaluation.png)",
        f"PPO against the first; the gold one only judges. {next(iter(chains.values()))['eval_prompts']} held-out prompts, the same "
        "sampling seeds before and after.",
        table(head, runs),
        "Warnings of the runs: " + ("; ".join(warned) if warned else "none") + ".",
        *(f"![score against KL, seed {seed}](ppo_frontier_{seed}.png)" for seed in chains),
    ]


def win_part(records: dict[str, Any], found: dict[str, Any]) -> list[str]:
    compared = {seed: records[f"compare_{seed}"] for seed in SEEDS if f"compare_{seed}" in records}
    rows = [
        (
            str(seed),
            f"{p['first']} against {p['second']}",
            *(
                f"{p[key]:.0%} ({p[f'{key}_low']:.0%} to {p[f'{key}_high']:.0%})"
                for key in ("win_rate", "at_equal_length")
            ),
            p["verdict"],
        )
        for seed, wins in compared.items()
        for p in wins["pairs"]
    ]
    return [
        f"Win rates by the gold model on {found['win_rate']['prompts']} held-out prompts, at temperature 0.7:",
        table(("seed", "", "win rate", "at equal length", "in words"), rows),
        "Over all seeds and prompts PPO's gain in gold score over SFT and its gain in length correlate by "
        f"{found['length_correlation']:.2f}.",
    ]


def ablation_part(records: dict[str, Any]) -> list[str]:
    rows, failed, width = [], [], {}
    for variant in ppo_ablation.VARIANTS:
        found = [records[key] for seed in ABLATION_SEEDS if (key := f"ppo_{variant}_{seed}") in records]
        failed += [f"{variant} ({run['failed']})" for run in found if "failed" in run]
        runs = [run["metrics"] for run in found if "metrics" in run]
        if runs:
            gains = (", ".join(f"{m[key]:.2f}" for m in runs) for key in ("score_gain", "gold_gain"))
            means = (
                f"{np.mean([m[key] for m in runs]):.2f}" for key in ("ppo_kl", "ppo_response_length", "ppo_entropy")
            )
            rows.append((variant, *gains, *means))
        if variant == "as_it_comes":
            config = found[0]["config"]
            for key in ("score_gain", "gold_gain"):
                width[key] = np.mean([(m[f"{key}_high"] - m[f"{key}_low"]) / 2 for m in runs])
    return [
        "## What each stabiliser is worth",
        f"One taken away at a time, {config['total_episodes']} episodes, gains on {config['max_eval_samples']} held-out prompts. "
        f"A gain's own interval is about +-{width['score_gain']:.2f} (score) and +-{width['gold_gain']:.2f} (gold) over "
        "prompts; what differs by less, or by less than the seeds differ among themselves, is not told apart.",
        table(("", "score gain, by seed", "gold gain, by seed", "KL", "tokens", "entropy"), rows),
        "Runs that broke off: " + (", ".join(failed) if failed else "none") + ".",
    ]


def sample_part(shown: list[dict[str, Any]]) -> list[str]:
    parts = [
        "## Samples",
        "Prompts of the demo's test split (rm-static's rows are not ours to print), sorted by the gold score of PPO's answer "
        f"less that of SFT's, seed {SEEDS[0]}; shown are the ones at these percentiles: {', '.join(map(str, PERCENTILES))}.",
    ]
    for sample in shown:
        answers = sample["answers"]
        gain = answers["PPO"]["score"] - answers["SFT"]["score"]
        lines = [f"{SPEAKERS[role]}: {text}" for role, text in sample["turns"]]
        for name in ("base", "SFT", "PPO"):
            lines.append(f"[{name}, gold score {answers[name]['score']:.2f}] {answers[name]['text']}")
        parts += [f"Percentile {sample['percentile']}, gain {gain:+.2f}:", fenced("\n\n".join(lines))]
    return parts


def how_part(r: dict[str, Any]) -> list[str]:
    rows = []
    for name, command in r["steps"].items():
        if name in r["records"]:
            seconds = r["records"][name].get("seconds")
            rows.append((name, "" if seconds is None else f"{seconds / 60:.0f}", f"`{command}`"))
    left = [name for name in r["steps"] if name not in r["records"]]
    return [
        "## How it was made",
        f"`make results`, written at commit {r['commit']} on {r['hardware']}. Minutes are of one core, several runs side by side; an "
        "ablation's are of training alone.",
        table(("step", "minutes", "command"), rows),
        *([f"Not run yet: {', '.join(left)}."] if left else []),
    ]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def share(m: dict[str, Any], key: str) -> str:
    return f"{m[key]:.3f} ({m[f'{key}_low']:.3f} to {m[f'{key}_high']:.3f})"


def signed(m: dict[str, Any], key: str, form: str = ".2f") -> str:
    return f"{m[key]:+{form}} ({m[f'{key}_low']:+{form}} to {m[f'{key}_high']:+{form}})"


def span(runs: list[dict[str, Any]], key: str) -> str:
    values = [run[key] for run in runs]
    return f"{min(values):.2f} to {max(values):.2f}"


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
