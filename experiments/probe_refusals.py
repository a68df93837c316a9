"""What refusals among its pairs do to a reward model: trained without them, and with them.

    python experiments/probe_refusals.py     # after make demo

Both models start from the demo's SFT model and learn from the demo's pairs; the second also from
every other pair of the probe. Both are asked about the rest of the probe, which neither has seen.
Writes results/probe_refusals.json.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rlhf  # noqa: F401  before the libraries that it sets up

import reward_train
from rlhf.engine.adapters import read_stacked
from rlhf.engine.base import same_base
from rlhf.engine.loading import load_base
from rlhf.engine.roles import SharedBase
from rlhf.engine.tokenizers import load_format
from rlhf.reports import probe
from rlhf.runs.checkpoints import read_run
from rlhf.runs.cli import run
from rlhf.runs.device import choose_dtype, device
from rlhf.runs.metrics import read_jsonl
from rlhf.runs.terminal import console


@dataclass(frozen=True)
class Config:
    sft_checkpoint: str = "runs/demo/sft"
    dataset: str = "demo/data"  # a folder with train.jsonl and test.jsonl
    work: str = "runs/probe_refusals"  # a folder for the data and a checkpoint of each reward model
    output: str = "experiments/results/probe_refusals.json"
    max_steps: int | None = None  # of each; None: as many as in the demo
    seed: int = 0


def main(config: Config) -> None:
    found = {}
    for name, extra in (("without", []), ("with", read_jsonl(probe.PATH)[::2])):
        folder = Path(config.work) / name
        write_data(Path(config.dataset), folder / "data", extra)
        settings = replace(
            reward_train.PRESETS["demo"],
            sft_checkpoint=config.sft_checkpoint,
            dataset=str(folder / "data"),
            output_dir=str(folder / "reward"),
            overwrite=True,
            max_steps=config.max_steps,
            seed=config.seed,
        )
        reward_train.main(settings)
        trained = read_run(settings.output_dir, "reward")
        found[name] = {"pairs": trained["data"]["train_rows"], "steps": trained["steps"]}
        found[name] |= {"eval_accuracy": trained["metrics"]["eval_accuracy"]} | ask(settings)
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    Path(config.output).write_text(json.dumps(found, indent=2) + "\n")
    for name, m in found.items():
        about = f"{m['pairs']} pairs, accuracy {m['eval_accuracy']:.3f}"
        console.print(f"{name} refusals among its {about}:")
        console.print(probe.describe_probe(m))
    console.print(f"Saved {config.output}.")


def write_data(source: Path, folder: Path, extra: list[dict[str, str]]) -> None:
    """The data set with more training rows."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in extra)
    train = (source / "train.jsonl").read_text(encoding="utf-8")
    (folder / "train.jsonl").write_text(train + lines, encoding="utf-8")
    (folder / "test.jsonl").write_bytes((source / "test.jsonl").read_bytes())


def ask(settings: reward_train.Config) -> dict[str, Any]:
    """What a finished reward model makes of the half of the probe that nobody has trained on."""
    sft = read_run(settings.sft_checkpoint, "sft")
    prompt_format = load_format(settings.sft_checkpoint, sft)
    base = same_base(sft, settings.sft_checkpoint, None)
    dtype = choose_dtype("auto", device())
    shared = SharedBase(
        load_base(base, dtype, prompt_format.pad_token_id), settings.sft_checkpoint, dtype
    )
    shared.add_role("reward", **read_stacked(settings.output_dir, shared))
    scores = {}
    for kind, pairs in probe.load_probe(prompt_format, settings.max_length).items():
        scored = reward_train.score(shared, pairs[1::2], prompt_format.eos_token_id)
        scores[kind] = scored.chosen, scored.rejected
    return probe.judge_probe(scores)


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
