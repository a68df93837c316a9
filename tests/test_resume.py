"""A run stopped and resumed against the same run left alone: the same weights and metrics."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import CLOCKS, ROOT
from out_of_memory_once import run_out_once
from safetensors.torch import load_file, save_file

import ppo_train
import reward_train
import rlhf.engine.decoding
import rlhf.engine.trainer
import rlhf.ppo.state
import rlhf.runs.resume
import rlhf.runs.stop
import rlhf.runs.terminal
import sft_train
from rlhf.runs.resume import SaveClock, new_state, newest_state, read_facts, states

PHASES = ("sft", "reward", "ppo")


class Crash(Exception):
    """What the operating system would do."""


@pytest.fixture(scope="module")
def commands(flags, trained, tiny_data):
    """Script and flags of each phase, four steps or updates long, for an output folder."""
    ppo = "--response-length 8 --max-prompt-length 64 --episodes-per-update 4"
    ppo += (
        " --num-mini-batches 2 --num-ppo-epochs 2 --total-episodes 16 --rollout-batch-size 4 "
        "--max-eval-samples 3"
    )
    ppo += (
        " --eval-steps 2 --lora-rank 4 --lora-alpha 8 --role-layers 2 --learning-rate 1e-2 "
        "--value-learning-rate 1e-2"
    )
    ppo += " --critic-warmup-updates 1 --num-printed-samples 0 --no-gradient-checkpointing"

    def command(phase, folder, dtype="fp32"):
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
        own = ppo.split() if phase == "ppo" else [*flags[f"{phase}_train"], "--eval-steps", "2"]
        own = [*own, "--save-steps", "1"]
        return f"{phase}_train", [*own, *parents, "--output-dir", folder, "--dtype", dtype]

    return command


@pytest.fixture(scope="module")
def left_alone(commands, call_main, tmp_path_factory):
    """The folder of a run that nothing happened to; the same for all tests, to be read only."""
    parent = tmp_path_factory.mktemp("alone")

    def left_alone(phase, dtype="fp32"):
        folder = parent / f"{phase}-{dtype}"
        if folder.exists():
            return folder
        script, argv = commands(phase, folder, dtype)
        result = call_main(script, argv)
        assert result.returncode == 0, result.stderr
        return folder

    return left_alone


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if not key.startswith(CLOCKS)} for row in rows
    ]


def check_same_run(one, other):
    """All weights to the bit, all rows, and the same files."""
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*"))
    assert names == sorted(str(path.relative_to(other)) for path in other.rglob("*"))
    assert metrics(one) == metrics(other)
    for path in one.rglob("*.safetensors"):
        ours = load_file(path)
        theirs = load_file(other / path.relative_to(one))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), path
    if (one / "samples.jsonl").exists():
        assert (one / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    mine, his = (
        json.loads((folder / "run.json").read_text())["metrics"] for folder in (one, other)
    )
    assert mine == his


def at_call(monkeypatch, module, name, number, do):
    """Have the `number`-th call of a function begin with `do()`."""
    original = getattr(module, name)
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            do()
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)


def crash():
    raise Crash


def ask_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)


MOMENTS = [  # phase, module, function, which call
    ("sft", rlhf.engine.trainer.Resumable, "training_step", 3),
    ("sft", rlhf.runs.resume, "sync", 4),
    ("reward", rlhf.engine.trainer.Resumable, "training_step", 4),
    ("reward", rlhf.runs.resume, "sync", 3),
    ("ppo", ppo_train, "generate", 4),
    ("ppo", ppo_train, "measure", 3),
    ("ppo", ppo_train, "value_loss", 14),
    ("ppo", rlhf.runs.resume, "sync", 3),
    ("ppo", rlhf.runs.resume, "sync", 4),
    ("reward", reward_train.Trainer, "evaluation", 1),
]


@pytest.mark.parametrize(("phase", "module", "function", "call"), MOMENTS)
def test_a_crash_costs_nothing_but_time(
    commands, call_main, left_alone, tmp_path, phase, module, function, call
):
    alone = left_alone(phase)
    script, argv = commands(phase, tmp_path / "cut")
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, module, function, call, crash)
        with pytest.raises(Crash):
            call_main(script, argv)
    assert not (tmp_path / "cut").exists()
    assert call_main(script, argv).returncode == 2  # not thrown away unasked
    result = call_main(script, [*argv, "--resume"])
    assert result.returncode == 0, result.stderr
    check_same_run(alone, tmp_path / "cut")
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_ends_the_run_where_it_can_go_on(commands, call_main, left_alone, tmp_path, phase):
    alone = left_alone(phase, "bf16")
    script, argv = commands(phase, tmp_path / "cut", "bf16")
    argv += ["--save-steps", "100"]
    with pytest.MonkeyPatch.context() as patch:
        module, function = (
            (ppo_train, "generate")
            if phase == "ppo"
            else (rlhf.engine.trainer.Resumable, "training_step")
        )
        at_call(patch, module, function, 5 if phase == "ppo" else 2, ask_to_stop)
        result = call_main(script, argv)
    assert result.returncode == 128 + signal.SIGTERM
    assert (
        "SIGTERM" in result.stderr
        and "--resume" in result.stderr
        and "Traceback" not in result.stderr
    )
    state = newest_state(tmp_path / "cut.partial")
    assert state.name == "step-00000002"
    result = call_main(script, [*argv, "--resume"])
    assert result.returncode == 0, result.stderr
    check_same_run(alone, tmp_path / "cut")


@pytest.mark.parametrize("phase", ["sft", "reward"])
def test_states_come_as_often_as_the_resumed_run_says(
    commands, call_main, tmp_path, phase, monkeypatch
):
    """And after a crash the terminal is free again."""
    bars = []
    bar = rlhf.runs.terminal.bar
    monkeypatch.setattr(rlhf.runs.terminal, "bar", lambda: bars.append(bar()) or bars[-1])
    monkeypatch.setattr(rlhf.runs.terminal.console, "_force_terminal", True)
    monkeypatch.setenv("TERM", "xterm")
    script, argv = commands(phase, tmp_path / "cut")
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, rlhf.engine.trainer.Resumable, "training_step", 2, ask_to_stop)
        assert call_main(script, [*argv, "--save-steps", "100"]).returncode == 128 + signal.SIGTERM
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, rlhf.engine.trainer.Resumable, "training_step", 2, crash)
        with pytest.raises(Crash):
            call_main(script, [*argv, "--save-steps", "1", "--resume"])
    assert newest_state(tmp_path / "cut.partial").name == "step-00000003"
    assert [bar.live.is_started for bar in bars] == [False, False]


def test_a_second_signal_stops_at_once():
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException), rlhf.runs.stop.stop_when_asked():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGTERM


@pytest.fixture
def cut(commands, call_main, tmp_path):
    """A PPO run that was cut short in its third update: its script, flags and partial folder."""
    script, argv = commands("ppo", tmp_path / "cut")
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, ppo_train, "generate", 5, crash)
        with pytest.raises(Crash):
            call_main(script, argv)
    return script, argv, tmp_path / "cut.partial"


@pytest.mark.parametrize("phase", ["sft", "reward"])
def test_other_test_rows_are_refused(commands, call_main, tiny_data, tmp_path, monkeypatch, phase):
    """A curve of two sets of test rows would show nothing."""
    script, argv = commands(phase, tmp_path / "cut")
    data = shutil.copytree(tiny_data, tmp_path / "data")
    argv = [*argv, "--dataset", data]
    with monkeypatch.context() as patch:
        at_call(patch, rlhf.engine.trainer.Resumable, "training_step", 3, crash)
        with pytest.raises(Crash):
            call_main(script, argv)
    test = data / "test.jsonl"
    test.write_text("\n".join(test.read_text().splitlines()[1:]) + "\n")
    result = call_main(script, [*argv, "--resume"])
    assert result.returncode == 2 and "another test text" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [
        ("--learning-rate", "2e-2", "learning_rate (0.01 there, 0.02 now)"),
        ("--seed", "1", "seed (0 there, 1 now)"),
        ("--max-train-samples", "7", "max_train_samples (None there, 7 now)"),
        ("--dtype", "bf16", "dtype (fp32 there, bf16 now)"),
    ],
)
def test_other_settings_are_refused_with_both_values(cut, call_main, flag, value, named):
    script, argv, partial = cut
    before = sorted(partial.rglob("*"))
    result = call_main(script, [*argv, "--resume", flag, value])
    assert (
        result.returncode == 2 and named in result.stderr and len(result.stderr.splitlines()) == 1
    )
    assert sorted(partial.rglob("*")) == before


def test_other_data_and_other_parents_are_refused(cut, call_main, tiny_data, tmp_path):
    script, argv, _ = cut
    shutil.copytree(tiny_data, tmp_path / "other")
    rows = (tmp_path / "other" / "train.jsonl").read_text().splitlines()
    (tmp_path / "other" / "train.jsonl").write_text("\n".join(rows[1:]) + "\n")
    result = call_main(script, [*argv, "--resume", "--dataset", tmp_path / "other"])
    assert result.returncode == 2 and "prompts" in result.stderr


@pytest.mark.parametrize("moment", [MOMENTS[0], MOMENTS[4]])
def test_another_number_of_processes_is_refused(commands, call_main, tmp_path, monkeypatch, moment):
    """Its steps would have other rows."""
    phase, module, function, call = moment
    script, argv = commands(phase, tmp_path / "cut")
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, module, function, call + 1, crash)
        with pytest.raises(Crash):
            call_main(script, argv)
    monkeypatch.setattr("rlhf.runs.resume.world", lambda: {"processes": 2})
    result = call_main(script, [*argv, "--resume"])
    assert result.returncode == 2 and "another processes (None there, 2 now)" in result.stderr


def test_a_run_that_goes_on_may_be_longer(cut, call_main, tmp_path):
    script, argv, _ = cut
    result = call_main(
        script, [*argv, "--resume", "--total-episodes", "24", "--num-printed-samples", "1"]
    )
    assert result.returncode == 0, result.stderr
    assert [row["update"] for row in metrics(tmp_path / "cut") if "episode" in row] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_a_damaged_state_is_named_and_an_older_one_taken(cut, call_main, left_alone, tmp_path):
    alone = left_alone("ppo")
    script, argv, partial = cut
    newest = states(partial)[0]
    with (newest / "weights.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    result = call_main(script, [*argv, "--resume"])
    assert result.returncode == 0, result.stderr
    assert newest.name in result.stdout and "weights.safetensors" in result.stdout
    check_same_run(alone, tmp_path / "cut")


def test_states_are_kept_to_their_limit_and_the_newest_whole_one_is_found(tmp_path):
    for step in range(1, 6):
        with new_state(tmp_path, step, {"update": step}, keep=2) as folder:
            save_file({"weight": torch.full((3,), float(step))}, folder / "weights.safetensors")
    assert [path.name for path in states(tmp_path)] == ["step-00000005", "step-00000004"]
    (tmp_path / "step-00000005" / "manifest.json").unlink()
    (tmp_path / "step-00000009.partial").mkdir()  # a crash while saving
    assert newest_state(tmp_path).name == "step-00000004"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000004",
        "step-00000005.damaged",
    ]


def test_a_finished_run_has_nothing_to_resume(commands, call_main, left_alone, tmp_path):
    folder = shutil.copytree(left_alone("sft"), tmp_path / "alone")
    script, argv = commands("sft", folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    result = call_main(script, [*argv, "--resume"])
    assert result.returncode == 0 and "finished" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    folder.rename(tmp_path / "alone.partial")  # a crash just before the last rename
    assert call_main(script, [*argv, "--resume"]).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone"]
    result = call_main(script, [*argv, "--resume", "--learning-rate", "0.5"])
    assert result.returncode == 2 and "learning_rate (0.01 there, 0.5 now)" in result.stderr
    (tmp_path / "alone" / "run.json").write_text("{}")
    result = call_main(script, [*argv, "--resume"])
    assert result.returncode == 2 and "run.json is damaged" in result.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True
    )
    if mount.returncode:
        pytest.skip("a tmpfs can be mounted by root only")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("phase", PHASES)
def test_a_disk_that_is_full(commands, call_main, left_alone, small_disk, phase):
    """It fills before the third state is written; when there is room again the run goes on."""
    alone = left_alone(phase)
    (script, argv) = commands(phase, small_disk / "cut")
    partial = small_disk / "cut.partial"
    ballast = small_disk / "ballast"

    def fill():
        with ballast.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 12))

    with pytest.MonkeyPatch.context() as patch:
        module, function = (
            (rlhf.ppo.state, "save_file") if phase == "ppo" else (rlhf.engine.trainer, "save_file")
        )
        at_call(patch, module, function, 5 if phase == "ppo" else 3, fill)
        result = call_main(script, argv)
    assert (
        result.returncode == 2
        and "the disk is full" in result.stderr
        and "--resume" in result.stderr
    ), result.stderr
    assert result.stderr.count("\n") == 1 and ballast.exists()
    assert not (small_disk / "cut").exists() and newest_state(partial).name == "step-00000002"
    ballast.unlink()
    result = call_main(script, [*argv, "--resume"])
    assert result.returncode == 0, result.stderr
    check_same_run(alone, small_disk / "cut")
    assert [path.name for path in small_disk.iterdir()] == ["cut"]


@pytest.mark.parametrize("phase", ["sft", "reward"])
def test_a_loss_that_is_not_finite_ends_the_run(commands, call_main, tmp_path, monkeypatch, phase):
    trainer = {"sft": sft_train.Trainer, "reward": reward_train.Trainer}[phase]
    calls = []
    part_loss = trainer.part_loss

    def spoiled(self, rows):
        found = part_loss(self, rows)
        calls.append(self.model.training)
        return found | {"loss": found["loss"] * float("nan")} if sum(calls) == 3 else found

    monkeypatch.setattr(trainer, "part_loss", spoiled)
    script, argv = commands(phase, tmp_path / "out")
    # All rows of a step in one part, so that the third part is the third step's.
    result = call_main(script, [*argv, "--micro-batch-tokens", "4096"])
    assert result.returncode == 2 and "step 3: the loss is not finite" in result.stderr
    assert "the last good state is " in result.stderr and "step-00000002;" in result.stderr
    assert "rows " in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("function", "spoil", "named"),
    [
        (
            "score",
            lambda scores: scores.index_fill(0, torch.tensor([1]), float("nan")),
            "scores not finite at texts ",
        ),
        ("token_values", lambda values: values / 0, "values not finite at texts "),
    ],
)
def test_ppo_ends_at_what_is_not_finite(
    commands, call_main, tmp_path, monkeypatch, function, spoil, named
):
    """From the third update on."""
    original = getattr(ppo_train, function)

    def spoiled(*args):
        result = original(*args)
        return spoil(result) if (tmp_path / "out.partial" / "step-00000002").exists() else result

    monkeypatch.setattr(ppo_train, function, spoiled)
    script, argv = commands("ppo", tmp_path / "out")
    result = call_main(script, argv)
    assert result.returncode == 2 and result.stderr.startswith(f"error: update 3: {named}"), (
        result.stderr
    )
    assert result.stderr.count("\n") == 1 and "step-00000002" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tokens", [100, 200])
def test_a_micro_batch_that_does_not_fit_is_halved_and_nothing_else_changes(
    commands, call_main, tmp_path, tokens
):
    """Memory runs out in the second update's backward and later in a rollout: the same run.

    With 100 tokens a minibatch has two micro-batches: it is the second one's backward, and the
    first has left gradients.
    """
    alone = tmp_path / "alone"
    (script, argv) = commands("ppo", tmp_path / "cut")
    argv += ["--micro-batch-tokens", str(tokens)]
    result = call_main(script, [*argv, "--output-dir", alone])
    assert result.returncode == 0, result.stderr

    def out_of_memory():
        raise torch.OutOfMemoryError("out of memory")

    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, ppo_train, "value_loss", 6, out_of_memory)
        at_call(patch, rlhf.engine.decoding.Decoding, "step", 30, out_of_memory)
        result = call_main(script, argv)
    assert result.returncode == 0, result.stderr
    assert f"a micro-batch has {tokens // 2} tokens from now on" in result.stdout
    assert "2 responses at a time from now on" in result.stdout
    for ours, theirs in zip(metrics(alone), metrics(tmp_path / "cut"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    for part in ("adapter_model.safetensors", "value/adapter_model.safetensors"):
        ours, theirs = (load_file(folder / part) for folder in (alone, tmp_path / "cut"))
        for name in ours:
            torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("phase", ["sft", "reward"])
def test_a_part_that_does_not_fit_is_halved_and_nothing_else_changes(
    commands, call_main, left_alone, tmp_path, monkeypatch, phase
):
    """Memory runs out once, in the second step, when a part before has left gradients."""
    alone = left_alone(phase)
    (script, argv) = commands(phase, tmp_path / "cut")
    run_out_once(monkeypatch)
    result = call_main(script, [*argv, "--micro-batch-tokens", "250"])
    assert result.returncode == 0, result.stderr
    assert "a micro-batch has 125 tokens from now on, not 250" in result.stdout
    for ours, theirs in zip(metrics(alone), metrics(tmp_path / "cut"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors") for folder in (alone, tmp_path / "cut")
    )
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=1e-4)


def test_the_tokens_of_a_micro_batch_are_kept_unless_others_are_asked_for(
    commands, call_main, tmp_path
):
    """So that a run that goes on is the same to the bit."""
    script, argv = commands("sft", tmp_path / "cut")

    def recorded():
        return json.loads((tmp_path / "cut.partial" / "run.json").read_text())

    kept = lambda: read_facts(newest_state(tmp_path / "cut.partial"))["micro_batch_tokens"]  # noqa: E731
    for call, tokens, then in ((2, "250", 250), (2, "auto", 250), (2, "300", 300)):
        with pytest.MonkeyPatch.context() as patch:
            at_call(patch, rlhf.engine.trainer.Resumable, "training_step", call, crash)
            said = io.StringIO()
            patch.setattr(rlhf.runs.resume.console, "_file", said)  # `file` would stay set
            with pytest.raises(Crash):
                call_main(script, [*argv, "--resume", "--micro-batch-tokens", tokens])
        assert kept() == recorded()["micro_batch_tokens"] == then
        assert recorded()["finished"] is None
        assert ("A micro-batch has 300 tokens from now on, not 250." in said.getvalue()) == (
            then == 300
        )
    assert call_main(script, [*argv, "--resume"]).returncode == 0
    run = json.loads((tmp_path / "cut" / "run.json").read_text())
    assert run["micro_batch_tokens"] == 300 and run["finished"]


def test_a_run_without_a_state_goes_on_with_the_tokens_it_began_with(commands, call_main, tmp_path):
    script, argv = commands("ppo", tmp_path / "cut")
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, ppo_train, "generate", 1, crash)
        with pytest.raises(Crash):
            call_main(script, [*argv, "--micro-batch-tokens", "77"])
    unfinished = call_main(
        "reward_train",
        ["--sft-checkpoint", tmp_path / "cut.partial", "--output-dir", tmp_path / "r"],
    )
    assert unfinished.returncode == 2 and "is not finished: add --resume" in unfinished.stderr
    assert call_main(script, [*argv, "--resume"]).returncode == 0
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["micro_batch_tokens"] == 77


def test_a_state_is_due_by_the_clock_or_by_the_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("rlhf.runs.resume.time.monotonic", lambda: now[0])
    clock = SaveClock(save_minutes=10, save_steps=None)
    due = []
    for step in range(1, 8):
        now[0] += 240
        due.append(clock.due(step))
        if due[-1]:
            clock.saved()
    assert due == [False, False, True, False, False, True, False]
    assert [step for step in range(1, 8) if SaveClock(10, 3).due(step)] == [3, 6]


def test_killed_at_random_moments_nothing_is_lost():
    """The short form of `make torture`."""
    command = [sys.executable, str(ROOT / "tests" / "torture.py"), "--kills", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.stdout.splitlines()[-1:] == ["kills 3, lost 0, identical yes"], (
        done.stdout + done.stderr[-3000:]
    )
    assert done.returncode == 0


@pytest.mark.parametrize("phase", ["sft", "reward"])
def test_a_signal_in_the_last_step(commands, call_main, left_alone, tmp_path, phase):
    """All steps are made: what is left is to evaluate and to save."""
    alone = left_alone(phase)
    (script, argv) = commands(phase, tmp_path / "cut")
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, rlhf.engine.trainer.Resumable, "training_step", 4, ask_to_stop)
        assert call_main(script, argv).returncode == 128 + signal.SIGTERM
    assert newest_state(tmp_path / "cut.partial").name == "step-00000004"
    result = call_main(script, [*argv, "--resume"])
    assert result.returncode == 0, result.stderr
    check_same_run(alone, tmp_path / "cut")
