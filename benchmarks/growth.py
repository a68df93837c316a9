"""How time and memory of a PPO update grow with the batch, the length and the vocabulary.

    make demo     # trains the SFT and the reward model that this starts from
    make bench-growth

Each point is one update in a process of its own, after a small one to warm up: rollout, scores,
log-probabilities, values, and one PPO epoch, with `--preset demo`'s adapters. Responses have
exactly the given length (EOS is made a token that is never sampled) and prompts the same; rollouts
and micro-batches are of 8. The larger vocabulary is the model's own, padded. Memory is what the
process held at its peak, less what it held with everything loaded.

Writes results/growth.json and results/growth.png.
"""

import json
import math
import multiprocessing
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import rlhf  # noqa: F401  before the libraries that it sets up

import matplotlib
import numpy as np
import torch
from rich.table import Table
from torch.optim import Optimizer

import ppo_train
from rlhf.data.format import PromptFormat
from rlhf.engine.roles import SharedBase
from rlhf.engine.speed import Stopwatch
from rlhf.engine.tokenizers import load_format
from rlhf.ppo.batch import Old, make_batch
from rlhf.runs.checkpoints import read_run
from rlhf.runs.cli import quiet_libraries, run
from rlhf.runs.device import hardware
from rlhf.runs.errors import UserError
from rlhf.runs.terminal import console

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MICRO_BATCH = 8
BATCHES = (8, 16, 32, 64)  # rows
RESPONSES = (32, 64, 128, 256)  # tokens of the prompt, and of the response
BATCH = 16  # while responses vary
RESPONSE = 64  # while batches vary
PHASES = ("rollout", "measure", "optimise")


@dataclass(frozen=True)
class Config:
    sft_checkpoint: str = "runs/demo/sft"
    reward_checkpoint: str = "runs/demo/reward"
    dataset: str = "demo/data"
    vocabularies: tuple[int, ...] = (49_152, 128_256)  # the first is the model's
    output: str = "benchmarks/results/growth.json"


def main(config: Config) -> None:
    (ROOT / config.output).parent.mkdir(parents=True, exist_ok=True)
    sizes = sorted(
        {*((batch, RESPONSE) for batch in BATCHES), *((BATCH, response) for response in RESPONSES)}
    )
    points = []
    context = multiprocessing.get_context("spawn")
    for batch, response in sizes:
        for vocabulary in config.vocabularies:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=measure, args=(config, batch, response, vocabulary, theirs)
            )
            process.start()
            theirs.close()
            try:
                points.append(ours.recv())
            except EOFError:
                raise UserError(
                    f"batch {batch}, response {response}, vocabulary {vocabulary} failed"
                ) from None
            process.join()
            console.print(describe(points[-1]))
    results = {"hardware": hardware(), "points": points} | summary(points, config.vocabularies)
    (ROOT / config.output).write_text(json.dumps(results, indent=2) + "\n")
    plot(points, config.vocabularies, (ROOT / config.output).with_suffix(".png"))
    show(results, config.vocabularies)
    console.print(f"Saved {config.output} and its .png.")


# ---------------------------------------------------------------- a point


def measure(config: Config, batch: int, response: int, vocabulary: int, pipe) -> None:
    """One update of `batch` responses; sends its seconds by phase and its memory."""
    quiet_libraries()
    settings = replace(
        ppo_train.PRESETS["demo"],
        sft_checkpoint=config.sft_checkpoint,
        reward_checkpoint=config.reward_checkpoint,
        dataset=config.dataset,
        response_length=response,
        rollout_batch_size=MICRO_BATCH,
        episodes_per_update=batch,
        micro_batch_tokens=MICRO_BATCH * 2 * response,
        num_mini_batches=1,
        num_ppo_epochs=1,
        critic_warmup_updates=0,
        kl_stop=math.inf,
    )
    load = ppo_train.load_base

    def load_padded(*args):
        model = load(*args)
        own = model.config.vocab_size
        if vocabulary > own:
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
            model.get_input_embeddings().weight.data[own:].zero_()
        return model.requires_grad_(False)

    ppo_train.load_base = load_padded
    sft = read_run(settings.sft_checkpoint, "sft")
    prompt_format = load_format(settings.sft_checkpoint, sft)
    shared, _ = ppo_train.load_models(settings, sft, prompt_format)
    prompt_format.eos_token_id = prompt_format.pad_token_id
    prompt_format.stop_text = None
    prompts = ppo_train.load_prompts(settings, prompt_format).train
    flat = [token for prompt in prompts for token in prompt]
    prompts = [flat[i * response : (i + 1) * response] for i in range(batch)]
    groups = [{"name": name, "params": shared.parameters(name)} for name in ("policy", "value")]
    optimizer = torch.optim.AdamW(groups, lr=1e-6, fused=True)
    shared.decoder.follow(optimizer)
    update(
        replace(settings, response_length=8, episodes_per_update=8),
        shared,
        prompt_format,
        optimizer,
        prompts[:8],
    )
    with PeakMemory() as memory:
        seconds = update(settings, shared, prompt_format, optimizer, prompts)
    pipe.send(
        {
            "batch": batch,
            "response": response,
            "vocabulary": vocabulary,
            "tokens": 2 * batch * response,
            "seconds": seconds,
            "memory_gb": (memory.peak - memory.before) / 1e9,
            "loaded_gb": memory.before / 1e9,
            "embedding_gb": shared.lm_head_weight().nbytes / 1e9,
        }
    )


def update(
    settings,
    shared: SharedBase,
    prompt_format: PromptFormat,
    optimizer: Optimizer,
    prompts: list[list[int]],
) -> dict[str, float]:
    """Seconds of each phase of one update."""
    clock = Stopwatch(shared.device)
    responses = ppo_train.rollout(
        settings, shared, prompt_format, prompts, list(range(len(prompts)))
    )
    assert {len(response.ids) for response in responses} == {settings.response_length}
    clock.lap("rollout")
    batch = make_batch(
        prompts, responses, ppo_train.draw_minibatches(1, settings), prompt_format, shared.device
    )
    measured = ppo_train.measure(shared, batch, settings.temperature, 0.0)
    clock.lap("measure")
    old = Old.of(
        measured,
        *ppo_train.advantages_and_returns(batch, measured, 0.05, 0.0, settings),
        shared.device,
    )
    scaler = torch.amp.GradScaler(shared.device.type, enabled=False)
    ppo_train.optimise(settings, shared, batch, old, 0.0, optimizer, scaler, 1)
    clock.lap("optimise")
    return clock.seconds


class PeakMemory:
    """The most that this process holds within the context, looked at every 5 ms."""

    def __enter__(self):
        self.before = self.peak = resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.005):
            self.peak = max(self.peak, resident())

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


# ---------------------------------------------------------------- the report


def series(points: list[dict[str, Any]], vocabulary: int, what: str) -> list[dict[str, Any]]:
    """The points along the batch or the response length."""
    fixed, at = ("response", RESPONSE) if what == "batch" else ("batch", BATCH)
    return [p for p in points if p["vocabulary"] == vocabulary and p[fixed] == at]


def exponents(points: list[dict[str, Any]]) -> dict[str, float]:
    """The k of seconds ~ tokens^k, fitted in logarithms, of each phase and of the whole update."""
    tokens = np.log([p["tokens"] for p in points])
    seconds = {phase: [p["seconds"][phase] for p in points] for phase in PHASES} | {
        "update": list(map(total, points))
    }
    return {
        name: float(np.polyfit(tokens, np.log(column), 1)[0]) for name, column in seconds.items()
    }


def total(point: dict[str, Any]) -> float:
    return sum(point["seconds"].values())


def peak(point: dict[str, Any]) -> float:
    """GB of the process at its peak, less the embedding."""
    return point["loaded_gb"] + point["memory_gb"] - point["embedding_gb"]


def summary(points: list[dict[str, Any]], vocabularies: tuple[int, ...]) -> dict[str, Any]:
    peaks = {(p["batch"], p["response"], p["vocabulary"]): peak(p) for p in points}
    small = min(vocabularies)
    large = max(vocabularies)
    return {
        "exponents": {
            what: {str(v): exponents(series(points, v, what)) for v in vocabularies}
            for what in ("batch", "response")
        },
        "peak_of_larger_over_smaller_vocabulary": {
            f"{batch} x {response}": gb / peaks[batch, response, small]
            for (batch, response, v), gb in peaks.items()
            if v == large and large != small
        },
    }


def describe(p: dict[str, Any]) -> str:
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in p["seconds"].items())
    return (
        f"batch {p['batch']}, response {p['response']}, vocabulary {p['vocabulary']}: "
        f"{total(p):.1f} s ({seconds}), {p['memory_gb']:.2f} GB above {p['loaded_gb']:.2f}"
    )


def show(results: dict[str, Any], vocabularies: tuple[int, ...]) -> None:
    table = Table(
        "batch",
        "response",
        "tokens",
        *(f"s, V {v}" for v in vocabularies),
        *(f"GB, V {v}" for v in vocabularies),
    )
    rows: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for point in results["points"]:
        rows.setdefault((point["batch"], point["response"]), []).append(point)
    for (batch, response), row in rows.items():
        times = [f"{total(p):.1f}" for p in row]
        held = [f"{p['memory_gb']:.2f}" for p in row]
        table.add_row(str(batch), str(response), str(row[0]["tokens"]), *times, *held)
    console.print(table)
    for what, by in results["exponents"].items():
        for vocabulary, fits in by.items():
            line = ", ".join(f"{k:.2f} ({phase})" for phase, k in fits.items())
            console.print(f"along the {what}, V {vocabulary}: seconds ~ tokens^k, k = {line}")
    ratios = results["peak_of_larger_over_smaller_vocabulary"].values()
    console.print(
        f"peak of the larger vocabulary over the smaller's, less the embedding: {min(ratios):.2f} "
        f"to {max(ratios):.2f}"
    )


def plot(points: list[dict[str, Any]], vocabularies: tuple[int, ...], path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained", sharey="row")
    units = {
        "batch": f"responses of {RESPONSE} tokens",
        "response": f"tokens of each of {BATCH} responses, and of its prompt",
    }
    for column, what in enumerate(units):
        time_axis, memory_axis = axes[:, column]
        for vocabulary, marker in zip(vocabularies, "os^v", strict=False):
            row = series(points, vocabulary, what)
            x = [p[what] for p in row]
            label = f"vocabulary {vocabulary:,}"
            time_axis.loglog(x, [total(p) for p in row], f"-{marker}", label=label)
            memory_axis.plot(x, [p["memory_gb"] for p in row], f"-{marker}", label=label)
        first = series(points, vocabularies[0], what)
        line = [total(first[0]) * p[what] / first[0][what] for p in first]
        time_axis.loglog(x, line, ":", color="gray", label="linear")
        time_axis.set(
            xlabel=units[what],
            ylabel="seconds an update" if column == 0 else "",
            xticks=x,
            xticklabels=x,
        )
        time_axis.minorticks_off()
        time_axis.legend()
        memory_axis.set(
            xlabel=units[what], ylabel="GB above the loaded models" if column == 0 else ""
        )
    axes[0, 0].yaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_yticks([5, 10, 20, 50, 100])
    axes[1, 0].set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
