"""Two processes make what one makes, also with half the model each: same steps, same files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import OFFLINE, ROOT
from forked import Run
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaMLP

from rlhf.runs.checks import SHARDED

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
PPO = "--response-length 8 --max-prompt-length 64 --num-mini-batches 2 --num-ppo-epochs 2 "
PPO += "--total-episodes 40 --episodes-per-update 8 --rollout-batch-size 4 --max-eval-samples 5 "
PPO += "--eval-steps 2 --lora-rank 4 --lora-alpha 8 --role-layers 2 --learning-rate 1e-2 "
PPO += "--value-learning-rate 1e-2 --critic-warmup-updates 1 "
PPO += "--num-printed-samples 0 --no-gradient-checkpointing --dtype fp32 --save-steps 1"

LOGGED = {
    "loss",
    "grad_norm",
    "entropy",
    "mean_token_accuracy",
    "num_tokens",
    "eval_loss",
    "eval_entropy",
}
LOGGED |= {"min_reward", "mean_reward", "max_reward", "accuracy", "margin", "preference_loss"}
LOGGED |= {"eval_accuracy", "eval_margin"}
SUM = """
import os

import torch
from rlhf.runs.processes import sum_gradients, this_process

rank = this_process().process_index
weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
weights[0].grad = torch.tensor([1.0 + rank])
weights[1].grad = torch.tensor([5.0]) if rank else None
sum_gradients(weights[:2])
sum_gradients(weights[2:])
said = str([weight.grad if weight.grad is None else weight.grad.tolist() for weight in weights])
os.write(1, (said + chr(10)).encode())  # at once, as both processes write
"""

EPOCH = ["--max-steps", "None", "--num-train-epochs", "1", "--batch-size", "8"]


@pytest.fixture
def command(flags, trained, tiny_data):
    """Script and flags of a phase: five steps of 4 rows or pairs, or updates of 8 episodes."""

    def command(phase, folder, processes):
        parents = {
            "sft": [],
            "reward": ["--sft-checkpoint", trained.sft],
            "ppo": [
                "--sft-checkpoint",
                trained.sft,
                "--reward-checkpoint",
                trained.reward,
                "--dataset",
                tiny_data,
            ],
        }[phase]
        steps = ["--max-steps", 5, "--eval-steps", 2]
        own = PPO.split() if phase == "ppo" else [*flags[f"{phase}_train"], *steps]
        sizes = []
        return [f"{phase}_train.py", *map(str, [*own, *parents, *sizes, "--output-dir", folder])]

    return command


def launch(command, env=None, by=None):
    """Two processes on CPUs; with `launch_env` of configs/fsdp2.yaml they shard the model.

    `by`: a script of tests/ that runs the command.
    """
    script, *argv = command
    by = "fsdp_on_cpu.py" if "ACCELERATE_USE_FSDP" in (env or {}) else by
    scripts = [ROOT / "tests" / by, ROOT / script] if by else [ROOT / script]
    return Run([*scripts, *argv], CPU | (env or {}), processes=2)


def launch_env(config):
    """What `accelerate launch --config_file` tells the processes that it starts."""
    argv = ["--config_file", str(ROOT / "configs" / config), "sft_train.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(argv))
    env = prepare_multi_gpu_env(args)
    return {name: value for name, value in env.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def kill_one(run, folder, pid):
    """Kill the process `pid()`, once there is a state in `folder`: the others end, too."""
    deadline = time.monotonic() + 200
    while not list(folder.glob("step-*[0-9]")):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(pid(), signal.SIGKILL)
    run.communicate(timeout=120)
    assert run.returncode != 0


def rows(folder, name="metrics.jsonl", key=None):
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [line[key] for line in lines] if key else lines


@pytest.mark.parametrize("phase", ["sft", "reward", "ppo"])
def test_two_processes_make_what_one_makes(command, call_main, tmp_path, phase):
    one = tmp_path / "one"
    two = tmp_path / "two"
    script, *argv = command(phase, one, 1)
    assert call_main(script.removesuffix(".py"), argv).returncode == 0
    small = {"sft": "200", "reward": "400", "ppo": "100"}[phase]  # tokens, so that a step has parts
    run = launch(
        [*command(phase, two, 2), "--micro-batch-tokens", small], by="out_of_memory_once.py"
    )
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err[-6000:]
    assert out.count("Next: python") == 1 and out.count(" 1 of 5, ") == 1  # how far it is, once
    assert "out of memory" in out  # in one of the two, in one part of a step
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    for path in one.rglob("*.safetensors"):
        ours = load_file(path)
        theirs = load_file(two / path.relative_to(one))
        for name, weight in ours.items():
            weight = weight.double()  # prompts' hashes are integers
            # Of each weight as a whole: where a gradient is almost 0, Adam makes of its rounding a
            # visible part of a step.
            assert (theirs[name] - weight).norm() <= 1e-4 * weight.norm(), name
    if phase == "ppo":
        assert rows(one, "samples.jsonl", "response") == rows(two, "samples.jsonl", "response")
    names = (
        {"objective/scores", "objective/kl", "policy/approxkl_avg"} if phase == "ppo" else LOGGED
    )
    for mine, other in zip(rows(one), rows(two), strict=True):
        for name in names & {*mine}:
            assert mine[name] == pytest.approx(other[name], abs=1e-4), name


def test_a_gradient_that_only_one_process_has_is_summed(tmp_path):
    (tmp_path / "sum.py").write_text(SUM)
    run = launch([tmp_path / "sum.py"])
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0, err[-6000:]
    assert sorted(out.splitlines()) == ["[[3.0], [5.0], None]"] * 2


def test_no_row_comes_twice_in_an_epoch(command, tmp_path):
    """20 rows, 8 a step of both: 2 steps, not a third that repeats 4 of them."""
    run = launch([*command("sft", tmp_path / "two", 2), "--max-train-samples", "20", *EPOCH])
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err[-6000:]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["steps"] == 2


def test_a_killed_process_brings_the_run_down_and_it_goes_on(command, call_main, tmp_path):
    two = tmp_path / "two"
    run = subprocess.Popen(
        [*TORCHRUN, *command("ppo", two, 2)],
        cwd=ROOT,
        env={**os.environ, **OFFLINE, **CPU},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )

    def last_process():
        children = psutil.Process(run.pid).children()
        return max(p.pid for p in children if "ppo_train.py" in " ".join(p.cmdline()))

    kill_one(run, tmp_path / "two.partial", last_process)
    assert not two.exists()
    script, *argv = command("ppo", two, 2)
    alone = call_main(script.removesuffix(".py"), [*argv, "--resume"])
    assert alone.returncode == 2 and "another processes (2 there, None now)" in alone.stderr
    run = launch([*command("ppo", two, 2), "--resume"])
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err[-6000:]
    assert [row["update"] for row in rows(two) if "episode" in row] == [1, 2, 3, 4, 5]


# ---------------------------------------------------------------- FSDP


@pytest.mark.parametrize("phase", [pytest.param("sft", marks=pytest.mark.slow), "reward"])
def test_sharded_processes_killed_and_resumed_make_what_one_makes(
    command, call_main, tmp_path, phase
):
    one = tmp_path / "one"
    two = tmp_path / "two"
    partial = tmp_path / "two.partial"
    # Adam makes much of a gradient that is almost nothing, whose sign is the rounding's: a step is
    # small here.
    more = ["--learning-rate", "1e-3", "--save-steps", "1", "--gradient-checkpointing"]
    more += ["--micro-batch-tokens", "200"]  # so that the processes have different numbers of parts
    script, *argv = command(phase, one, 1)
    assert call_main(script.removesuffix(".py"), [*argv, *more]).returncode == 0
    sharded = [*command(phase, two, 2), *more]
    run = launch(sharded, launch_env("fsdp2.yaml"))
    kill_one(run, partial, lambda: run.pid)
    state = next(partial.glob("step-*[0-9]"))
    assert (state / "optimizer.bin").exists()  # FSDP's; without it there would be an optimizer.pt
    ends = load_file(one / "adapter_model.safetensors")
    for name, weight in load_file(state / "weights.safetensors").items():  # whole ones
        stacked = 2 if phase == "reward" and "lora" in name else 1  # on SFT's, of the same rank
        assert (
            stacked * weight.numel()
            == ends[name.replace(".default", "").replace(".reward", "")].numel()
        )
    run = launch([*sharded, "--resume"], launch_env("fsdp2.yaml"))
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err[-6000:]
    assert out.count("Next: python") == 1
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    saved = load_file(two / "adapter_model.safetensors")
    assert saved.keys() == ends.keys()
    for name, weight in ends.items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=1e-5)
    for mine, other in zip(rows(one), rows(two), strict=True):
        for name in {"loss", "accuracy", "margin", "grad_norm"} & {*mine}:
            assert mine[name] == pytest.approx(other[name], abs=1e-4), name

    if phase == "reward":
        mine, other = (
            json.loads((folder / "evaluation.json").read_text()) for folder in (one, two)
        )
        for name in ("eval_accuracy", "eval_margin", "score_mean"):
            assert mine[name] == pytest.approx(other[name], abs=1e-4), name

    kind = {"sft": AutoPeftModelForCausalLM, "reward": AutoPeftModelForSequenceClassification}[
        phase
    ]
    loaded = kind.from_pretrained(
        two, dtype=torch.float32, **({"num_labels": 1} if phase == "reward" else {})
    )
    for name, weight in get_peft_model_state_dict(loaded).items():
        assert torch.equal(weight, saved.pop(name)), name
    assert not saved


@pytest.mark.parametrize("phase, trained_layers", [("sft", 4), ("reward", 2)])
def test_checkpointing_computes_the_layers_that_train_twice(
    command, call_main, tmp_path, monkeypatch, phase, trained_layers
):
    forward = LlamaMLP.forward
    calls = []
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    )
    # one process has nothing to shard, and takes the same way
    for name, value in launch_env("fsdp2.yaml").items():
        monkeypatch.setenv(name, value)
    counts = []
    for flag in ("--no-gradient-checkpointing", "--gradient-checkpointing"):
        script, *argv = command(phase, tmp_path / flag, 1)
        assert (
            call_main(
                script.removesuffix(".py"), [*argv, flag, "--micro-batch-tokens", "10000"]
            ).returncode
            == 0
        )
        counts.append(len(calls))
        calls.clear()
    assert counts[1] - counts[0] == 5 * trained_layers  # in each of five steps


def test_what_fsdp_cannot_do_is_one_line(flags, trained, call_main, tmp_path, monkeypatch):
    for name, value in launch_env("fsdp2.yaml").items():
        monkeypatch.setenv(name, value)
    quantised = tmp_path / "quantised"
    shutil.copytree(trained.sft, quantised)
    run = json.loads((quantised / "run.json").read_text())
    run["base"]["load_in_4bit"] = True
    (quantised / "run.json").write_text(json.dumps(run))
    out = ["--output-dir", tmp_path / "out"]
    for script, argv, says in [
        ("sft_train", [*flags["sft_train"], "--load-in-4bit", *out], "add --no-load-in-4bit"),
        (
            "reward_train",
            [*flags["reward_train"], "--sft-checkpoint", quantised, *out],
            "add --no-load-in-4bit",
        ),
        ("reward_train", ["--eval-only", "--output-dir", trained.reward], "in one process"),
        ("ppo_train", out, "configs/ddp.yaml"),
    ]:
        result = call_main(script, argv)
        assert (
            result.returncode == 2 and says in result.stderr and result.stderr.count("\n") == 1
        ), script
    monkeypatch.setenv("FSDP_VERSION", "1")
    assert "fsdp_version must be 2" in call_main("sft_train", [*flags["sft_train"], *out]).stderr


def test_the_configs_of_accelerate_mean_what_they_say():
    ddp, fsdp = (
        load_config_from_file(str(ROOT / "configs" / name)) for name in ("ddp.yaml", "fsdp2.yaml")
    )
    assert (ddp.distributed_type, fsdp.distributed_type) == ("MULTI_GPU", "FSDP")
    for config in (ddp, fsdp):
        assert (config.num_processes, config.num_machines, config.mixed_precision) == (2, 1, "no")
        assert not config.use_cpu
    env = launch_env("fsdp2.yaml")
    assert {"ACCELERATE_USE_FSDP": "true", **SHARDED}.items() <= env.items()
    assert (env["FSDP_RESHARD_AFTER_FORWARD"], env["FSDP_OFFLOAD_PARAMS"]) == ("true", "false")
    assert (env["FSDP_AUTO_WRAP_POLICY"], env["FSDP_CPU_RAM_EFFICIENT_LOADING"]) == (
        "TRANSFORMER_BASED_WRAP",
        "true",
    )
    assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in env  # accelerate asks the model
    assert "ACCELERATE_USE_FSDP" not in launch_env("ddp.yaml")
