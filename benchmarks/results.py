"""Evidence that it learns: reward models and PPO on real preferences, judged by what they were not trained on.

    make results                         # on Dahoas/rm-static; hours on a CPU
    make results DATA=path/to/rm-static  # on a local copy or a slice of it

It prints what it will cost, then works through the steps below in runs/results; what is finished there is kept, so it
can be stopped and started again. It ends by writing docs/results.json, which holds every number, docs/results.md, made of
it, and the plots beside them.
"""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from compare_outputs import SPEAKERS, fenced  # noqa: E402
from rlhf.checkpoints import git_commit  # noqa: E402
from rlhf.cli import UserError, run  # noqa: E402
from rlhf.reporting import bootstrap, console, preference  # noqa: E402

import numpy as np  # noqa: E402
from ppo_ablation import PPO  # noqa: E402
from ppo_vs_trl import hardware  # noqa: E402
from rich.table import Table  # noqa: E402

SEEDS = (0, 1, 2)  # of PPO
REWARD = {"max_length": 256, "num_train_epochs": 1, "learning_rate": 1e-3}
PROMPTS = 480  # held-out prompts of the win rates at most
PERCENTILES = (100, 90, 50, 10, 0)  # of the gold gain over SFT: the samples that are shown


@dataclass(frozen=True)
class Config:
    base_model: str = "models/SmolLM2-135M-Instruct"
    dataset: str = "Dahoas/rm-static"
    work: str = "runs/results"
    output: str = "docs"
    only_report: bool = False  # write the report of what is finished, and train nothing


@dataclass(frozen=True)
class Step:
    name: str
    minutes: int  # on two cores of an AMD EPYC with AVX512-BF16
    folder: str  # in the work folder
    done: str  # the file that a finished step leaves in its folder
    command: str


def steps(config: Config) -> list[Step]:
    """All steps in order."""
    work, data = config.work, f"--dataset {config.dataset}"
    sft, reward, gold = f"{work}/sft", f"{work}/reward_model", f"{work}/gold"
    train = f"reward_train.py --preset demo {data} --sft-checkpoint {sft} {flags(REWARD)}"
    parents = f"--sft-checkpoint {sft} --reward-checkpoint {reward} --gold-checkpoint {gold}"
    compare = (
        f"compare_outputs.py --preset demo --sft-checkpoint {sft} --reward-checkpoint {gold} --max-prompt-length 160 "
    )
    compare += "--temperature 0.7 --batch-size 16 --show 0 --overwrite"
    todo = [
        (
            "SFT on 1,500 chosen responses",
            15,
            "sft",
            "run.json",
            f"sft_train.py --preset demo {data} --base-model {config.base_model} --max-length 256 --max-train-samples 1500 --output-dir {sft} --overwrite",
        ),
        (
            "reward models: what helps, beside TRL's stock trainer",
            230,
            "reward",
            "ablation.json",
            f"benchmarks/reward_ablation.py {data} --sft-checkpoint {sft} --work {work}/reward --output {work}/reward/ablation.json",
        ),
        (
            "reward model of the first half of the pairs",
            10,
            "reward_model",
            "run.json",
            f"{train} --half first --output-dir {reward} --overwrite",
        ),
        (
            "gold reward model of the second half",
            10,
            "gold",
            "run.json",
            f"{train} --half second --seed 1 --output-dir {gold} --overwrite",
        ),
    ]
    for seed in SEEDS:
        ppo = f"ppo_train.py --preset demo {data} {parents} {flags(PPO)} --total-episodes 1536 --max-eval-samples 128"
        todo.append(
            (
                f"PPO, seed {seed}",
                25,
                f"ppo_{seed}",
                "run.json",
                f"{ppo} --seed {seed} --output-dir {work}/ppo_{seed} --overwrite",
            )
        )
    for seed in SEEDS:
        todo.append(
            (
                f"win rates by the gold model, seed {seed}",
                6,
                f"compare_{seed}",
                "compare.json",
                f"{compare} {data} --num-test-prompts {PROMPTS} --ppo-checkpoint {work}/ppo_{seed} --output-dir {work}/compare_{seed}",
            )
        )
    todo += [
        (
            "answers to the demo's prompts",
            2,
            "samples",
            "compare.json",
            f"{compare} --dataset demo/data --num-test-prompts 80 --ppo-checkpoint {work}/ppo_{SEEDS[0]} --output-dir {work}/samples",
        ),
        (
            "PPO: what each stabiliser is worth",
            110,
            "ppo_ablation",
            "ablation.json",
            f"benchmarks/ppo_ablation.py {data} {parents} --work {work}/ppo_ablation --output {work}/ppo_ablation/ablation.json",
        ),
    ]
    return [Step(*step) for step in todo]


def flags(settings: dict[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())


def main(config: Config) -> None:
    work = ROOT / config.work
    work.mkdir(parents=True, exist_ok=True)
    todo = [step for step in steps(config) if not (work / step.folder / step.done).exists()]
    show_cost(config, todo)
    if config.only_report:
        todo = []
    for step in todo:
        console.rule(step.name)
        if subprocess.run([sys.executable, *shlex.split(step.command)], cwd=ROOT).returncode:
            raise UserError(f"{step.name} failed; mend it and run `make results` again: what is finished is kept")
    report = json.loads(
        json.dumps(collect(config)).replace(config.dataset, Path(config.dataset).name)
    )  # no local paths
    output = ROOT / config.output
    output.mkdir(exist_ok=True)
    (output / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    copy_plots(work, output)
    (output / "results.md").write_text(markdown(report))
    console.print(f"Saved {config.output}/results.md and {config.output}/results.json.")


def show_cost(config: Config, todo: list[Step]) -> None:
    """What there is to do and about how long it takes."""
    table = Table("step", "minutes, about", title="On two cores of an AMD EPYC with AVX512-BF16")
    for step in steps(config):
        table.add_row(step.name, str(step.minutes) if step in todo else "done")
    table.add_row("to do", str(sum(step.minutes for step in todo)))
    console.print(table)


def seconds(folder: Path) -> float:
    """What the runs in a step's folder took, loading, evaluating and saving included."""
    return sum(
        json.loads(path.read_text()).get("seconds", 0)
        for path in [*folder.glob("run.json"), *folder.glob("*/run.json")]
    )


# ---------------------------------------------------------------- what came out


def collect(config: Config) -> dict[str, Any]:
    """Every number of the report, from the files that the steps left."""
    work = ROOT / config.work

    def read(path: str) -> Any:
        return json.loads((work / path).read_text())

    def done(*folders: str) -> bool:
        return all((work / step.folder / step.done).exists() for step in steps(config) if step.folder in folders)

    finished = [step for step in steps(config) if done(step.folder)]
    report = {
        "hardware": hardware(),
        "commit": git_commit(),
        "config": asdict(config),
        "steps": [
            {"name": step.name, "command": f"python {step.command}", "minutes": seconds(work / step.folder) / 60}
            for step in finished
        ],
    }
    if done("reward"):
        report["reward"] = read("reward/ablation.json")
    if done("reward_model", "gold"):
        report["judges"] = {name: read(f"{name}/evaluation.json") for name in ("reward_model", "gold")}
    if done(*(f"ppo_{seed}" for seed in SEEDS)):
        report["ppo"] = [read(f"ppo_{seed}/run.json")["metrics"] for seed in SEEDS]
    if done(*(f"compare_{seed}" for seed in SEEDS)):
        compared = [read(f"compare_{seed}/compare.json") for seed in SEEDS]
        report["win_rates"] = [
            {"prompts": len(c["prompts"]), "pairs": c["pairs"], "summary": c["summary"]} for c in compared
        ]
        report["win_rate_over_seeds"] = over_seeds(compared)
        report["length_correlation"] = length_correlation(compared)
    if done("samples"):
        report["samples"] = samples(read("samples/compare.json"))
    if done("ppo_ablation"):
        report["ppo_ablation"] = read("ppo_ablation/ablation.json")
    return report


def over_seeds(compared: list[dict[str, Any]]) -> dict[str, float]:
    """PPO's win rate over SFT by the gold model, the mean over seeds for each prompt; interval over prompts."""

    def scores(report: dict[str, Any], name: str) -> list[float]:
        return [entry["answers"][name]["score"] for entry in report["prompts"]]

    wins = np.mean([preference(scores(report, "PPO"), scores(report, "SFT")) for report in compared], axis=0)
    low, high = np.quantile(bootstrap(wins), [0.025, 0.975])
    return {"prompts": len(wins), "win_rate": float(wins.mean()), "low": float(low), "high": float(high)}


def length_correlation(compared: list[dict[str, Any]]) -> float:
    """Correlation of gold gain and length gain, PPO over SFT, over all prompts and seeds."""
    points = np.array(
        [
            [
                entry["answers"]["PPO"]["score"] - entry["answers"]["SFT"]["score"],
                entry["answers"]["PPO"]["tokens"] - entry["answers"]["SFT"]["tokens"],
            ]
            for report in compared
            for entry in report["prompts"]
        ]
    )
    return float(np.corrcoef(points.T)[0, 1])


def samples(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The prompts at PERCENTILES of the gold gain over SFT, with all answers."""
    entries = sorted(
        report["prompts"], key=lambda entry: entry["answers"]["PPO"]["score"] - entry["answers"]["SFT"]["score"]
    )
    return [{"percentile": p, **entries[round(p / 100 * (len(entries) - 1))]} for p in PERCENTILES]


# ---------------------------------------------------------------- the page


def markdown(r: dict[str, Any]) -> str:
    """docs/results.md: a part for each key of the report that is there."""
    parts = {
        "reward": reward_part,
        "judges": judges_part,
        "ppo": ppo_part,
        "win_rates": win_part,
        "ppo_ablation": ablation_part,
        "samples": sample_part,
    }
    blocks = [*header(r), *(block for key, part in parts.items() if key in r for block in part(r)), *how_part(r)]
    return "\n\n".join(blocks) + "\n"


def header(r: dict[str, Any]) -> list[str]:
    lines = [
        "# Does it learn?",
        f"SmolLM2-135M-Instruct on rm-static ({r['config']['dataset']}), on a CPU: {r['hardware']}. Everything here was made by "
        "`make results`; every number is in [results.json](results.json). Intervals are 95 %.",
    ]
    if "reward" in r:
        reward = r["reward"]
        recipe, stock = reward["variants"]["recipe"], reward["variants"]["stock"]
        lines.append(
            f"- Reward model: test accuracy {share(recipe, 'accuracy')} on {reward['config']['pairs']} training pairs, mean of "
            f'{reward["config"]["seeds"]} seeds. "The longer response wins" gets {reward["longer_wins"]:.3f} (difference '
            f"{signed(recipe, 'above_longer_wins', '.3f')}), TRL's stock trainer in the same time {stock['accuracy']:.3f} "
            f"(difference {signed(recipe, 'above_stock', '.3f')})."
        )
    if "ppo" in r and "win_rates" in r:
        wins = r["win_rate_over_seeds"]
        gold, tokens = (span([m[key] for m in r["ppo"]]) for key in ("gold_gain", "ppo_response_length"))
        lines.append(
            f"- PPO, {len(r['ppo'])} seeds: by a gold reward model, trained on other pairs, its answers win against SFT's on "
            f"{wins['win_rate']:.0%} of {wins['prompts']} held-out prompts ({wins['low']:.0%} to {wins['high']:.0%}); gold gain "
            f"{gold}, response length {tokens} tokens against SFT's {r['ppo'][0]['sft_response_length']:.1f}."
        )
    return lines


def reward_part(r: dict[str, Any]) -> list[str]:
    reward = r["reward"]
    head = ("", "validation", "against the recipe", "test", "against the recipe", "length-balanced", "loss")
    head += ("calibration error", "correlation with length", "seconds")
    rows = []
    for name, v in reward["variants"].items():
        cells = []
        for prefix in ("validation_", ""):
            cells.append(share(v, f"{prefix}accuracy") if f"{prefix}accuracy" in v else "")
            cells.append(signed(v, f"{prefix}above_recipe", ".3f") if f"{prefix}above_recipe" in v else "")
        cells += [f"{v[key]:.3f}" for key in ("length_balanced_accuracy", "eval_loss", "calibration_error")]
        cells.append(f"{v['score_length_correlation']:.2f}")
        rows.append((name, *cells, f"{v['seconds']:.0f}" if "seconds" in v else ""))
    return [
        "## Reward models",
        f"One change at a time, {reward['config']['seeds']} seeds each, on the same {reward['config']['pairs']} pairs of up to "
        f"{reward['config']['max_length']} tokens. Validation: {reward['config']['validation_pairs']} training rows of other dialogues, by which the recipe was chosen; what follows "
        "is of the test pairs. Intervals are over seeds and pairs, differences paired over the pairs. Length-balanced: pairs whose "
        "longer response was chosen and those whose shorter one was weigh alike, so that length alone gets 0.5. `averaged` is one "
        "model, the mean of `head_zero`'s adapters over the seeds. `stock` is `trl reward` at its defaults for as long as the "
        "recipe took, `stock_epoch` for all pairs. What each variant changes stands in `benchmarks/reward_ablation.py`.",
        table(head, rows),
    ]


def judges_part(r: dict[str, Any]) -> list[str]:
    head = ("", "accuracy", "longer wins", "length-balanced", "calibration error", "correlation with length")
    rows = [
        (
            name,
            share(m, "eval_accuracy"),
            f"{m['longer_wins_accuracy']:.3f}",
            f"{m['length_balanced_accuracy']:.3f}",
            f"{m['calibration_error']:.3f}",
            f"{m['score_length_correlation']:.2f}",
        )
        for name, m in r["judges"].items()
    ]
    return [
        "## The reward model that PPO trains against, and the gold one",
        "Each learned from its half of all pairs; both are scored on the test pairs.",
        table(head, rows),
        "![the reward model's evaluation](reward_evaluation.png)",
    ]


def ppo_part(r: dict[str, Any]) -> list[str]:
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
    rows = []
    for seed, m in zip(SEEDS, r["ppo"], strict=True):
        rows.append(
            (
                str(seed),
                signed(m, "score_gain"),
                f"{m['score_gain'] / m['sft_score_std']:.2f}",
                signed(m, "gold_gain"),
                signed(m, "gold_gain_at_equal_length"),
                f"{m['ppo_kl']:.1f}",
                *(f"{m[f'sft_{key}']:.1f} -> {m[f'ppo_{key}']:.1f}" for key in ("response_length",)),
                *(f"{m[f'sft_{key}']:.0%} -> {m[f'ppo_{key}']:.0%}" for key in ("eos_rate",)),
                *(
                    f"{m[f'sft_{key}']:.2f} -> {m[f'ppo_{key}']:.2f}"
                    for key in ("entropy", "repeated_3grams", "distinct_2")
                ),
            )
        )
    warned = [f"seed {seed}: {text}" for seed, m in zip(SEEDS, r["ppo"], strict=True) for text in m["warnings"]]
    return [
        "## PPO",
        f"Against the first reward model; the gold one only judges. {r['ppo'][0]['eval_prompts']} held-out prompts, the same "
        "sampling seeds before and after.",
        table(head, rows),
        "Warnings of the runs: " + ("; ".join(warned) if warned else "none") + ".",
        *(f"![score against KL, seed {seed}](ppo_frontier_{seed}.png)" for seed in SEEDS),
    ]


def win_part(r: dict[str, Any]) -> list[str]:
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
        for seed, wins in zip(SEEDS, r["win_rates"], strict=True)
        for p in wins["pairs"]
    ]
    return [
        f"Win rates by the gold model on {r['win_rates'][0]['prompts']} held-out prompts:",
        table(("PPO seed", "", "win rate", "at equal length", "in words"), rows),
        f"Over all seeds and prompts the gain in gold score and the gain in length correlate by {r['length_correlation']:.2f}.",
    ]


def ablation_part(r: dict[str, Any]) -> list[str]:
    ablation = r["ppo_ablation"]
    rows = [
        (
            name,
            ", ".join(f"{x:.2f}" for x in v["score_gain"]),
            ", ".join(f"{x:.2f}" for x in v["gold_gain"]),
            *(f"{np.mean(v[key]):.1f}" for key in ("ppo_kl", "ppo_response_length")),
            f"{np.mean(v['ppo_entropy']):.2f}",
        )
        for name, v in ablation["variants"].items()
        if v["score_gain"]
    ]
    failed = [name for name, v in ablation["variants"].items() if v["failed"]]
    first = next(iter(ablation["variants"].values()))
    return [
        "## What each stabiliser is worth",
        f"{ablation['config']['total_episodes']} episodes, {ablation['config']['seeds']} seeds, gains on "
        f"{ablation['config']['max_eval_samples']} held-out prompts. A gain's own interval is about +-{first['score_gain_half_width']:.2f} "
        f"(score) and +-{first['gold_gain_half_width']:.2f} (gold) over prompts; what differs by less, or less than seeds "
        "differ among themselves, is not told apart.",
        table(("", "score gain, by seed", "gold gain, by seed", "KL", "tokens", "entropy"), rows),
        "Runs that broke off: " + (", ".join(failed) if failed else "none") + ".",
    ]


def sample_part(r: dict[str, Any]) -> list[str]:
    parts = [
        "## Samples",
        "Prompts of the demo's test split (rm-static's rows are not ours to print), sorted by the gold score of PPO's answer "
        f"less that of SFT's, seed {SEEDS[0]}; shown are the ones at these percentiles: {', '.join(map(str, PERCENTILES))}.",
    ]
    for sample in r["samples"]:
        answers = sample["answers"]
        gain = answers["PPO"]["score"] - answers["SFT"]["score"]
        lines = [f"{SPEAKERS[role]}: {text}" for role, text in sample["turns"]]
        for name in ("base", "SFT", "PPO"):
            lines.append(f"[{name}, gold score {answers[name]['score']:.2f}] {answers[name]['text']}")
        parts += [f"Percentile {sample['percentile']}, gain {gain:+.2f}:", fenced("\n\n".join(lines))]
    return parts


def how_part(r: dict[str, Any]) -> list[str]:
    rows = [(step["name"], f"{step['minutes']:.0f}", f"`{step['command']}`") for step in r["steps"]]
    total = sum(step["minutes"] for step in r["steps"])
    return [
        "## How it was made",
        f"`make results` at commit {r['commit']}, {total / 60:.1f} hours in all:",
        table(("step", "minutes", "command"), rows),
    ]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def share(m: dict[str, Any], key: str) -> str:
    return f"{m[key]:.3f} ({m[f'{key}_low']:.3f} to {m[f'{key}_high']:.3f})"


def signed(m: dict[str, Any], key: str, form: str = ".2f") -> str:
    return f"{m[key]:+{form}} ({m[f'{key}_low']:+{form}} to {m[f'{key}_high']:+{form}})"


def span(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def copy_plots(work: Path, output: Path) -> None:
    plots = {"reward_model/evaluation.png": "reward_evaluation.png"}
    plots |= {f"ppo_{seed}/frontier.png": f"ppo_frontier_{seed}.png" for seed in SEEDS}
    for plot, name in plots.items():
        if (work / plot).exists():
            shutil.copyfile(work / plot, output / name)


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
