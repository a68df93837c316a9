"""What crosses the wire when two processes share a step: bytes counted on the loopback interface.

    python benchmarks/wire.py       # after `make demo`, whose checkpoints it starts from; Linux

Each phase runs twice, in two processes that differ in nothing but the number of steps: the bytes
between them, over the steps between them, are what a step costs. Beside it stands what the
gradients alone make: 4 bytes for each weight that is trained, once from each of the two processes,
times the optimizer steps.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rlhf  # noqa: F401  before the libraries that it sets up

from rich.table import Table
from safetensors import safe_open

from rlhf.runs.cli import run
from rlhf.runs.errors import UserError
from rlhf.runs.metrics import read_jsonl
from rlhf.runs.terminal import console

PROCESSES = 2
SAME = "--max-eval-samples 8 --save-steps 1000 --overwrite"
PPO = (
    "--episodes-per-update 32 --num-mini-batches 4 --num-ppo-epochs 2 --kl-stop 1000 "
    "--response-length 16 --critic-warmup-updates 0 --eval-steps 1000 --rollout-batch-size 16"
)


@dataclass(frozen=True)
class Config:
    work: str = "runs/wire"  # where the runs go
    output: str = "benchmarks/results/wire.json"


def main(config: Config) -> None:
    if not (ROOT / "runs/demo/reward/run.json").exists():
        raise UserError("there is no demo to start from: run `make demo` first")
    results = {phase: measure(config, phase) for phase in ("sft", "reward", "ppo")}
    (ROOT / config.output).write_text(json.dumps(results, indent=2) + "\n")
    table = Table(
        "", "bytes a step or update", "of gradients", "trained weights", "optimizer steps in it"
    )
    for phase, r in results.items():
        cells = (f"{r[key]:,.0f}" for key in ("bytes", "gradient_bytes", "trained_weights"))
        table.add_row(phase, *cells, f"{r['optimizer_steps']:g}")
    console.print(table)
    console.print(f"Saved {config.output}.")


def measure(config: Config, phase: str) -> dict[str, float]:
    """Bytes of a step (of an update in PPO) on the wire, of both processes together."""
    few, many = (2, 6) if phase != "ppo" else (1, 3)
    counted = []
    folder = ROOT / config.work / phase
    for steps in (few, many):
        before = loopback_bytes()
        launch(phase, folder, steps)
        counted.append(loopback_bytes() - before)
    trained = trained_weights(phase, folder)
    optimizer_steps = 1
    if phase == "ppo":
        rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "episode" in row]
        optimizer_steps = sum(row["policy/optimizer_steps"] for row in rows) / len(rows)
    shutil.rmtree(folder)
    return {
        "bytes": (counted[1] - counted[0]) / (many - few),
        "gradient_bytes": 4 * trained * PROCESSES * optimizer_steps,
        "trained_weights": trained,
        "optimizer_steps": optimizer_steps,
    }


def launch(phase: str, folder: Path, steps: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(PROCESSES)]
    command += [f"{phase}_train.py", "--preset", "demo", "--output-dir", str(folder)]
    command += SAME.split()
    if phase == "ppo":
        command += [*PPO.split(), "--total-episodes", str(steps * 32)]
    else:
        command += ["--max-steps", str(steps)]
    env = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    if subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"{phase}_train.py failed")


def loopback_bytes() -> int:
    """Bytes that the loopback interface has received since the machine started."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(
        int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:")
    )


def trained_weights(phase: str, folder: Path) -> int:
    """Weights whose gradients the processes sum: the phase's own adapter, and the head."""
    run_json = json.loads((folder / "run.json").read_text())
    count = size_of(folder / "adapter_model.safetensors")
    sft = size_of(ROOT / "runs/demo/sft/adapter_model.safetensors")
    if phase == "ppo":  # the policy's and the value's, each saved together with SFT's
        return count + size_of(folder / "value" / "adapter_model.safetensors") - 2 * sft
    return count - (sft if run_json["parents"] else 0)


def size_of(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
