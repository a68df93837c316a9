"""Kill the three training scripts at random, resume them, and compare with runs left alone.

    make torture

Children are forked from one process that has everything imported, so that a start takes no time;
each is a process of its own and ends by SIGKILL. A third of the kills wait until a state is being
written.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])

import rlhf  # noqa: F401  before the libraries that it sets up

import torch
from conftest import CLOCKS, make_model, read_demo, run_main, write_jsonl
from safetensors.torch import load_file

import ppo_train  # noqa: F401  the children are forked with all of it
import reward_train  # noqa: F401
import sft_train  # noqa: F401
from rlhf.runs.resume import MANIFEST

SMALL = "--dtype {dtype} --lora-rank 4 --lora-alpha 8 --no-gradient-checkpointing --save-steps 1 "
SMALL += "--dataset {data} --output-dir {folder} "
TRAINER = "--batch-size 4 --max-length 256 --max-steps {steps} --learning-rate 1e-2 "
FLAGS = {
    "sft": TRAINER + "--base-model {base} --no-load-in-4bit",
    "reward": TRAINER + "--role-layers 2 --sft-checkpoint {alone}/sft",
    "ppo": "--role-layers 2 --sft-checkpoint {alone}/sft --reward-checkpoint {alone}/reward "
    "--max-prompt-length 64 --response-length 8 --episodes-per-update 8 --num-mini-batches 2 "
    "--num-ppo-epochs 2 --total-episodes {episodes} --rollout-batch-size 8 --max-eval-samples 3 "
    "--eval-steps 5 --learning-rate 1e-2 --value-learning-rate 1e-2 --num-printed-samples 0",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="in each phase")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(torture(Path(folder), options.kills, options.dtype, options.seed))


def torture(work: Path, kills: int, dtype: str, seed: int) -> int:
    """Exit code 0 if nothing was lost and all weights and metrics are the same."""
    chance = random.Random(seed)
    killed = 0
    lost = 0
    odd = []
    data = work / "data"
    base = work / "base"
    steps = 12 + 7 * kills
    data.mkdir()
    write_jsonl(data / "train.jsonl", read_demo("train")[:24])
    write_jsonl(data / "test.jsonl", read_demo("test")[:8])
    finish(start(make_model, base))
    places = {
        "data": data,
        "base": base,
        "alone": work / "alone",
        "dtype": dtype,
        "steps": steps,
        "episodes": 8 * steps,
    }
    for phase, flags in FLAGS.items():
        alone = work / "alone" / phase
        cut = work / "cut" / phase
        partial = cut.with_name(f"{phase}.partial")
        mine = 0
        finish(start(script, phase, (SMALL + flags).format(**places, folder=alone).split()))
        argv = [*(SMALL + flags).format(**places, folder=cut).split(), "--resume"]
        while not cut.exists():
            child = start(script, phase, argv)
            if mine == kills or not wait_for_a_moment(chance, partial, child):
                finish(child)
                break
            before = newest(partial)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            mine += 1
            lost += newest(partial) < before and not cut.exists()
        finish(start(script, phase, argv))  # if the last kill came at the very end
        killed += mine
        odd += differences(alone, cut)
    for difference in odd:
        print(difference)
    print(f"kills {killed}, lost {lost}, identical {'no' if odd else 'yes'}")
    return int(bool(lost or odd))


def script(phase: str, argv: list[str]) -> None:
    result = run_main(f"{phase}_train", argv, seconds=3600)
    if result.returncode:
        raise RuntimeError(
            f"{phase} ended with exit code {result.returncode}: {result.stderr[-2000:]}"
        )


def start(function: Callable, *args: Any) -> int:
    """Fork a child that calls it; its exit code is 1 if that raised."""
    child = os.fork()
    if child:
        return child
    try:
        function(*args)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def finish(child: int) -> None:
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit("a run failed")


def wait_for_a_moment(chance: random.Random, folder: Path, child: int) -> bool:
    """Wait until it is time to kill; False if the child ended before."""
    saving = chance.random() < 1 / 3
    at = time.monotonic() + chance.expovariate(1 / 0.6)
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() >= at and (not saving or list(folder.glob("step-*.partial"))):
            return True
        time.sleep(0.0005 if saving else 0.005)
    return False


def newest(folder: Path) -> int:
    """The number of the newest whole state."""
    return max(
        (int(path.parent.name[5:]) for path in folder.glob(f"step-????????/{MANIFEST}")), default=0
    )


def differences(alone: Path, cut: Path) -> list[str]:
    """What is not the same in the two finished runs: files, weights, rows."""
    names = [
        {str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (alone, cut)
    ]
    odd = [f"{cut.name}: {name} is in one of the two only" for name in names[0] ^ names[1]]
    odd += [f"stray: {path}" for path in cut.parent.iterdir() if path.name not in FLAGS]
    for path in alone.rglob("*.safetensors"):
        ours = load_file(path)
        theirs = load_file(cut / path.relative_to(alone))
        odd += [
            f"{path.name}: {name} differs"
            for name in ours
            if not torch.equal(ours[name], theirs[name])
        ]
    if rows(alone) != rows(cut):
        odd.append(f"{cut.name}: metrics.jsonl differs")
    if (alone / "samples.jsonl").exists() and (alone / "samples.jsonl").read_bytes() != (
        cut / "samples.jsonl"
    ).read_bytes():
        odd.append(f"{cut.name}: samples.jsonl differs")
    return odd


def rows(folder: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in lines]


if __name__ == "__main__":
    main()
