"""Two processes make what one makes: the same samples, the same steps, one set of files."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import OFFLINE, ROOT
from safetensors.torch import load_file

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PPO = "--response-length 8 --max-prompt-length 64 --num-mini-batches 2 --num-ppo-epochs 2 --total-episodes 40 "
PPO += "--gradient-accumulation-steps 2 --rollout-batch-size 4 --max-eval-samples 5 --eval-steps 2 --lora-rank 4 "
PPO += "--lora-alpha 8 --role-layers 2 --learning-rate 1e-2 --value-learning-rate 1e-2 --critic-warmup-updates 1 "
PPO += "--num-printed-samples 0 --no-gradient-checkpointing --dtype fp32"

EPOCH = ["--max-steps", "None", "--num-train-epochs", "1", "--per-device-train-batch-size", "4"]


@pytest.fixture
def command(flags, trained, tiny_data):
    """Script and flags of a phase, five steps or updates of 8 rows, or pairs, each for `processes` processes."""

    def command(phase, folder, processes):
        parents = {
            "sft": [],
            "reward": ["--sft-checkpoint", trained.sft],
            "ppo": ["--sft-checkpoint", trained.sft, "--reward-checkpoint", trained.reward, "--dataset", tiny_data],
        }[phase]
        rows = (2 if phase == "ppo" else 4) // processes
        own = PPO.split() if phase == "ppo" else [*flags[f"{phase}_train"], "--max-steps", 5]
        sizes = ["--per-device-train-batch-size", rows]
        return [f"{phase}_train.py", *map(str, [*own, *parents, *sizes, "--output-dir", folder])]

    return command


def launch(command, **more):
    script, *argv = command
    env = {**os.environ, **OFFLINE, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.Popen(
        [*LAUNCH, str(ROOT / script), *argv], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def rows(folder, name="metrics.jsonl", key=None):
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [line[key] for line in lines] if key else lines


@pytest.mark.parametrize("phase", ["sft", "reward", "ppo"])
def test_two_processes_make_what_one_makes(command, call_main, tmp_path, phase):
    one, two = tmp_path / "one", tmp_path / "two"
    script, *argv = command(phase, one, 1)
    assert call_main(script.removesuffix(".py"), argv).returncode == 0
    run = launch(command(phase, two, 2))
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err[-6000:]
    assert out.count("Next: python") == 1
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    for path in one.rglob("*.safetensors"):
        ours, theirs = load_file(path), load_file(two / path.relative_to(one))
        for name, weight in ours.items():
            torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-5)
    if phase == "ppo":
        assert rows(one, "samples.jsonl", "response") == rows(two, "samples.jsonl", "response")
    for mine, other in zip(rows(one), rows(two), strict=True):
        for name in {"loss", "accuracy", "objective/scores", "objective/kl", "policy/approxkl_avg"} & {*mine}:
            assert mine[name] == pytest.approx(other[name], abs=1e-4), name


def test_no_row_comes_twice_in_an_epoch(command, tmp_path):
    """20 rows, 8 a step of both: 2 steps, not a third that repeats 4 of them."""
    run = launch([*command("sft", tmp_path / "two", 2), "--max-train-samples", "20", *EPOCH])
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err[-6000:]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["steps"] == 2


def test_a_killed_process_brings_the_run_down_and_it_goes_on(command, call_main, tmp_path):
    two = tmp_path / "two"
    run = launch(command("ppo", two, 2))
    deadline = time.monotonic() + 200
    while not list((tmp_path / "two.partial").glob("step-*[0-9]")):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    victim = max(
        child.pid for child in psutil.Process(run.pid).children() if "ppo_train.py" in " ".join(child.cmdline())
    )
    os.kill(victim, signal.SIGKILL)
    run.communicate(timeout=120)
    assert run.returncode != 0 and not two.exists()
    run = launch([*command("ppo", two, 2), "--resume"])
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err[-6000:]
    assert [row["update"] for row in rows(two) if "episode" in row] == [1, 2, 3, 4, 5]
