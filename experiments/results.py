"""Evidence that it learns: reward models and PPO on real preferences, judged on held-out data.

    # on Dahoas/rm-static; many hours on a CPU
    make results
    # on a local copy or a slice of it, two steps at a time
    make results DATA=path/to/rm-static RESULTS="--jobs 2"

It prints what it will cost (with --dry-run that alone), then works through the steps below in
runs/results. Each leaves a small record of what it found and of the command that made it; what has
one is not done again, so it can be stopped and started, and a training run goes on from its last
state. A step whose folder is gone is run again when another needs it, and keeps its record. Every
seed of PPO is a whole chain: its own SFT model, its own reward model of the first half of the
pairs, its own gold one of the second half. It ends by writing docs/results.json, which holds all
records, docs/results.md, made of it (by results_page.py), and the plots beside them. What was not
run again keeps the record that is published there.

PPO beside RLOO, GRPO and best-of-n (rivals.py) is some of these steps; they alone, and the chains
that they rest on:

    make results RESULTS="--only rivals --jobs 2"
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import rlhf  # noqa: F401  before the libraries that it sets up

import ppo_ablation
import results_page
import reward_ablation
import rivals
import rivals_page
import torch
from results_page import ABLATION_SEEDS, PERCENTILES, PICTURES, PLOTS, SEEDS
from rich.table import Table

from rlhf.runs.checkpoints import git_commit
from rlhf.runs.checks import check_at_least_one
from rlhf.runs.cli import run
from rlhf.runs.device import cpu_name
from rlhf.runs.errors import UserError
from rlhf.runs.terminal import console

# Sizes that the slice of 4,119 training and 480 test rows has, so that the whole data set does not
# take days.
SFT = {"max_length": 256, "max_train_samples": 1500, "max_eval_samples": 480}
REWARD = {
    "max_length": 256,
    "max_train_samples": 2048,
    "max_eval_samples": 480,
    "num_train_epochs": 1,
    "learning_rate": 1e-3,
}
PPO = {"max_train_samples": 4096, "max_eval_samples": 128, "total_episodes": 1536}
PROMPTS = 480  # held-out prompts of the win rates


@dataclass(frozen=True)
class Config:
    base_model: str = "models/SmolLM2-135M-Instruct"
    dataset: str = "Dahoas/rm-static"
    work: str = "runs/results"
    output: str = "docs"
    jobs: int = 1  # steps at a time, each with its share of the cores
    # a regular expression: do only the steps whose names begin like it, and what they need
    only: str = ""
    dry_run: bool = False  # print what there is to do and its cost, and stop
    only_report: bool = False  # write the report of what is finished, and train nothing


@dataclass(frozen=True)
class Step:
    name: str  # its record is records/NAME.json in the work folder
    folder: str  # what it leaves there for the steps that need it
    minutes: int  # of one core of an AMD EPYC with AVX512-BF16; it varies by a factor of two
    command: str
    record: Callable[[Path], dict[str, Any]]  # makes the record of the folder
    needs: tuple[str, ...] = ()  # names of the steps whose folders it reads
    after: tuple[str, ...] = ()  # names of the steps whose records it reads
    on_card: bool = False  # only a machine with a CUDA card can do it
    alone: bool = False  # it measures time: nothing else runs beside it


def steps(config: Config) -> list[Step]:
    """All steps, each after those it needs."""
    work = config.work
    data = f"--dataset {shlex.quote(config.dataset)}"
    todo = []
    for seed in SEEDS:
        sft = f"sft_{seed}"
        reward = f"reward_{seed}"
        gold = f"gold_{seed}"
        ppo = f"ppo_{seed}"
        command = (
            f"sft_train.py --preset demo {data} --seed {seed} --overwrite --base-model "
            f"{shlex.quote(config.base_model)} "
        )
        command += f"{flags(SFT)} --output-dir {work}/{sft}"
        todo.append(Step(sft, sft, 30, command, trained))
        # Seeds that differ, else both would start from the same head and LoRA A, and share what
        # that makes of a text.
        for name, half, own in ((reward, "first", seed), (gold, "second", seed + 1)):
            command = (
                f"reward_train.py --preset demo {data} --seed {own} --overwrite --sft-checkpoint "
                f"{work}/{sft} "
            )
            command += f"{flags(REWARD)} --half {half} --output-dir {work}/{name}"
            todo.append(Step(name, name, 25, command, trained, (sft,)))
        command = (
            f"ppo_train.py --preset demo {data} --seed {seed} --overwrite --sft-checkpoint "
            f"{work}/{sft} "
        )
        command += (
            f"--reward-checkpoint {work}/{reward} --gold-checkpoint {work}/{gold} "
            f"{flags(ppo_ablation.PPO)} "
        )
        command += f"{flags(PPO)} --output-dir {work}/{ppo}"
        todo.append(Step(ppo, ppo, 60, command, ppo_ablation.trained, (sft, reward, gold)))
        judged = (
            f"compare_outputs.py --preset demo --sft-checkpoint {work}/{sft} --reward-checkpoint "
            f"{work}/{gold} "
        )
        judged += (
            f"--ppo-checkpoint {work}/{ppo} --max-prompt-length 160 --temperature 0.7 --batch-size "
            "16 --show 0 "
        )
        command = (
            f"{judged}--overwrite {data} --num-test-prompts {PROMPTS} --output-dir "
            f"{work}/compare_{seed}"
        )
        todo.append(
            Step(f"compare_{seed}", f"compare_{seed}", 20, command, comparison, (sft, gold, ppo))
        )
        if seed == SEEDS[0]:
            command = (
                f"{judged}--overwrite --dataset demo/data --num-test-prompts 80 --output-dir "
                f"{work}/samples"
            )
            todo.append(Step("samples", "samples", 4, command, samples, (sft, gold, ppo)))
    for seed in SEEDS:
        sft = f"sft_{seed}"
        reward = f"reward_{seed}"
        todo.append(ablation("reward", "half", seed, 6, data, work, (sft, reward)))
    for seed in SEEDS:
        for variant in (
            reward_ablation.VARIANTS if seed in ABLATION_SEEDS else ("recipe", "head_zero")
        ):
            todo.append(ablation("reward", variant, seed, 16, data, work, ("sft_0",)))
    averaged = tuple(f"reward_head_zero_{seed}" for seed in range(reward_ablation.AVERAGED))
    todo.append(ablation("reward", "averaged", 0, 6, data, work, ("sft_0", *averaged)))
    todo.append(ablation("reward", "stock_epoch", 0, 40, data, work, ("sft_0",)))
    for seed in SEEDS:
        needed = ("sft_0", f"reward_recipe_{seed}", "reward_stock_epoch_0")
        todo.append(ablation("reward", "stock", seed, 12, data, work, needed))
    for seed in SEEDS:
        for variant in ppo_ablation.VARIANTS:
            todo.append(
                ablation("ppo", variant, seed, 17, data, work, ("sft_0", "reward_0", "gold_0"))
            )
    return todo + rival_steps(data, work)


def rival_steps(data: str, work: str) -> list[Step]:
    """What each method costs, the search of its learning rate, and its runs, a chain a seed."""

    def step(name: str, seed: int, minutes: int, flags: str, **more: Any) -> Step:
        chain = tuple(f"{phase}_{seed}" for phase in ("sft", "reward", "gold"))
        command = f"experiments/rivals.py {flags} {data} --work {work}/rivals"
        for need in chain:
            command += f" --{need.split('_')[0]}-checkpoint {work}/{need}"
        return Step(f"rivals_{name}", f"rivals/{name}", minutes, command, from_file, chain, **more)

    todo = [
        step("cost", 0, 30, "--phase cost", alone=True),
        step("cost_card", 0, 5, "--phase cost_card", alone=True, on_card=True),
    ]
    for method in rivals.TRAINED:
        for rate in rivals.RATES:
            flags = f"--phase search --method {method} --learning-rate {rate:g}"
            todo.append(step(f"search_{method}_{rate:g}", 0, 14, flags))
    for seed in SEEDS:
        for method in rivals.METHODS:
            flags = f"--method {method} --seed {seed} --records {work}/records"
            trained = method in rivals.TRAINED
            # How long a run is rests on what `kl_stop` left of PPO's updates, too.
            searches = [
                f"rivals_search_{searched}_{rate:g}"
                for searched in dict.fromkeys(("ppo", method))
                for rate in rivals.RATES
            ]
            rests_on = ("rivals_cost", *searches) if trained else ()
            minutes = 60 if trained else 80
            todo.append(step(f"{method}_{seed}", seed, minutes, flags, after=rests_on))
    return todo


def ablation(
    what: str, variant: str, seed: int, minutes: int, data: str, work: str, needs: tuple[str, ...]
) -> Step:
    """A run of reward_ablation.py or ppo_ablation.py, from the first checkpoints of `needs`."""
    name = f"{variant}_{seed}"
    folder = f"{what}_ablation"
    command = (
        f"experiments/{what}_ablation.py --variant {variant} --seed {seed} {data} --work "
        f"{work}/{folder}"
    )
    for need in needs:
        phase = need.split("_")[0]
        if need == f"{phase}_{need[-1]}":  # of a chain
            command += f" --{phase}-checkpoint {work}/{need}"
    return Step(f"{what}_{name}", f"{folder}/{name}", minutes, command, from_file, needs)


def flags(settings: dict[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())


# ---------------------------------------------------------------- doing them


def main(config: Config) -> None:
    check_at_least_one(jobs=config.jobs)
    shown = {step.name: step.command for step in steps(replace(config, **public(config)))}
    if not any(re.match(config.only, name) for name in shown):
        raise UserError(f"--only {config.only}: no step's name begins so")
    if not config.only_report:
        todo = to_do(config, shown)
        show_cost(config, todo)
        if config.dry_run:
            return
        do_all(config, todo, shown)
    output = ROOT / config.output
    records = published(config) | {
        step.name: json.loads(path.read_text())
        for step in steps(config)
        if (path := path_of(config, step)).exists()
    }
    if not records:
        raise UserError(f"there is no record in {config.work}/records to report")
    rows = {"train": 2 * REWARD["max_train_samples"], "test": REWARD["max_eval_samples"]}
    report = {
        "dataset": Path(config.dataset).name,
        "rows": rows,
        "steps": shown,
        "records": {name: records[name] for name in shown if name in records},
    }
    report["summary"] = results_page.summary(records)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(report, allow_nan=False) + "\n")
    made = {step.name for step in steps(config) if path_of(config, step).exists()}
    for plot, name in PLOTS.items():
        if plot.split("/")[0] in made and (ROOT / config.work / plot).exists():
            shutil.copyfile(ROOT / config.work / plot, output / name)
    if rivals_page.can_plot(report["summary"]):
        rivals_page.plot(report["summary"]["rivals"], output / rivals_page.PLOT)
    plots = [name for name in PICTURES if (output / name).exists()]
    (output / "results.md").write_text(results_page.markdown(report, plots))
    console.print(f"Saved {config.output}/results.md and {config.output}/results.json.")


def published(config: Config) -> dict[str, Any]:
    """The records of the report that is there, if it is of the same data."""
    path = ROOT / config.output / "results.json"
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    return report["records"] if report["dataset"] == Path(config.dataset).name else {}


def public(config: Config) -> dict[str, str]:
    """The config's paths as they may be published: of this machine's own, only the name."""
    places = {name: getattr(config, name) for name in ("base_model", "dataset", "work")}
    return {
        name: f"path/to/{Path(place).name}" if Path(place).is_absolute() else place
        for name, place in places.items()
    }


def path_of(config: Config, step: Step) -> Path:
    return ROOT / config.work / "records" / f"{step.name}.json"


def is_done(config: Config, step: Step, shown: str) -> bool:
    """Whether there is a record of that very command."""
    path = path_of(config, step)
    return path.exists() and json.loads(path.read_text())["command"] == shown


def to_do(config: Config, shown: dict[str, str]) -> list[Step]:
    """The steps to do, in order.

    Those without a record, those whose records these read and that have none, and those whose
    folders these need and that are gone.
    """
    every = steps(config)
    left = {step.name for step in every if not is_done(config, step, shown[step.name])}
    names = {
        step.name
        for step in every
        if step.name in left
        and re.match(config.only, step.name)
        and (torch.cuda.is_available() or not step.on_card)
    }
    folders = {step.name: ROOT / config.work / step.folder for step in every}
    for step in reversed(every):
        if step.name in names:
            names |= {need for need in step.needs if not folders[need].exists()}
            names |= left & {*step.after}
    return [step for step in every if step.name in names]


def show_cost(config: Config, todo: list[Step]) -> None:
    """What there is to do and about how long it takes."""
    table = Table("step", "minutes, about", title="On one core of an AMD EPYC with AVX512-BF16")
    for step in todo:
        table.add_row(step.name, str(step.minutes))
    table.add_row(
        "all, with --jobs on as many cores", str(sum(step.minutes for step in todo) // config.jobs)
    )
    hours = sum(step.minutes for step in todo) / 60
    table.caption = f"{hours:.1f} hours of a core in all"
    console.print(table)


def do_all(config: Config, todo: list[Step], shown: dict[str, str]) -> None:
    """Do the steps, `jobs` at a time, each when those it needs are done."""
    left = list(todo)
    running = dict[Future, Step]()
    with ThreadPoolExecutor(config.jobs) as pool:
        while left or running:
            unfinished = {step.name for step in [*left, *running.values()]}
            ready = [step for step in left if not unfinished & {*step.needs, *step.after}]
            for step in ready:
                beside = list(running.values())
                measured = any(other.alone for other in beside)
                if len(beside) == config.jobs or measured or (beside and step.alone):
                    break
                left.remove(step)
                running[pool.submit(do, config, step, shown[step.name])] = step
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                future.result()


def do(config: Config, step: Step, shown: str) -> None:
    """Run a step and write its record."""
    work = ROOT / config.work
    started = time.monotonic()
    threads = max(1, len(os.sched_getaffinity(0)) // config.jobs)
    log = work / "logs" / f"{step.name}.log"
    for folder in (log.parent, work / "records"):
        folder.mkdir(parents=True, exist_ok=True)
    console.print(f"{time.strftime('%H:%M')} {step.name}: see {os.path.relpath(log, ROOT)}")
    command = step.command
    if (
        any((work / f"{step.folder}.partial").glob("step-*/manifest.json"))
        and "--overwrite" in command
    ):
        command = command.replace("--overwrite", "--resume")
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, *shlex.split(command)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise UserError(
            f"{step.name} failed (see {log}); mend it and start again: what is finished is kept"
        )
    # Only its folder was wanted; what others made of it rests on what the record tells of.
    wanted = re.match(config.only, step.name)
    if is_done(config, step, shown) or (not wanted and step.name in published(config)):
        return
    how = {"command": shown, "commit": git_commit(), "cpu": cpu_name(), "threads": threads}
    how["minutes"] = round((time.monotonic() - started) / 60, 1)
    record = json.dumps(how | step.record(work / step.folder), allow_nan=False)
    path_of(config, step).write_text(record + "\n")
    console.print(f"{time.strftime('%H:%M')} {step.name}: done in {how['minutes']:.0f} min")


# ---------------------------------------------------------------- records


def trained(folder: Path) -> dict[str, Any]:
    """Of SFT or a reward model: its metrics, and its whole evaluation."""
    found = {"metrics": json.loads((folder / "run.json").read_text())["metrics"]}
    evaluation = folder / "evaluation.json"
    if evaluation.exists():
        whole = json.loads(evaluation.read_text())
        found["evaluation"] = {
            name: whole[name] for name in ("calibration", "by_length", "by_turns")
        }
    return found


def from_file(folder: Path) -> dict[str, Any]:
    """What an ablation's run wrote beside its folder."""
    return json.loads(folder.with_name(f"{folder.name}.json").read_text())


def comparison(folder: Path) -> dict[str, Any]:
    """Win rates, means, and each model's gold scores, lengths and endings, without any text."""
    report = json.loads((folder / "compare.json").read_text())
    answers = {
        name: {
            "score": [entry["answers"][name]["score"] for entry in report["prompts"]],
            "tokens": [entry["answers"][name]["tokens"] for entry in report["prompts"]],
            "ended": [
                entry["answers"][name]["ended_by"] != "length" for entry in report["prompts"]
            ],
        }
        for name in report["models"]
    }
    return {"pairs": report["pairs"], "summary": report["summary"], "answers": answers}


def samples(folder: Path) -> dict[str, Any]:
    """The prompts at PERCENTILES of the gold gain over SFT, with all answers."""
    entries = json.loads((folder / "compare.json").read_text())["prompts"]
    entries.sort(
        key=lambda entry: entry["answers"]["PPO"]["score"] - entry["answers"]["SFT"]["score"]
    )
    return {
        "shown": [
            {"percentile": p, **entries[round(p / 100 * (len(entries) - 1))]} for p in PERCENTILES
        ]
    }


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
