"""What a user gets wrong: exit code 2, one line that says what and where, and nothing lost."""

import dataclasses
import errno
import http.server
import importlib
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import threading
import typing
from pathlib import Path

import pytest
from conftest import OFFLINE, ROOT, make_model, write_jsonl
from safetensors import SafetensorError

from rlhf.runs.advice import USUAL, next_command
from rlhf.runs.advice import flag as flag_of
from rlhf.runs.checks import ABOVE_ZERO, AT_LEAST_ONE, NOT_NEGATIVE, SHARES
from rlhf.runs.cli import parse, quiet_libraries
from rlhf.runs.errors import UserError
from rlhf.runs.folders import check_output, output_folder
from rlhf.runs.hub import say_once

GOOD_ROW = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello!", "rejected": " Go away."}


def snapshot(folder: Path) -> dict[str, bytes] | None:
    if not folder.exists():
        return None
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_one_line(code, stderr, *names):
    assert code == 2
    assert stderr.startswith("error: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert stderr.endswith("\n"), stderr
    for name in names:
        assert str(name) in stderr


@pytest.fixture
def refused(call_main, flags, tmp_path):
    """`refused(script, flags, *names)`: one line holds all `names`, and the output folder stays.

    Runs twice: with no output folder, and with --overwrite over one that holds an earlier result.
    """

    def refused(script: str, more: list, *names: str) -> None:
        absent = tmp_path / "absent"
        full = tmp_path / "full"
        full.mkdir()
        (full / "adapter_model.safetensors").write_bytes(b"an earlier result")
        (full / "run.json").write_text('{"phase": "sft"}')
        for folder, overwrite in ((absent, []), (full, ["--overwrite"])):
            before = snapshot(folder)
            result = call_main(script, [*flags[script], "--output-dir", folder, *overwrite, *more])
            assert_one_line(result.returncode, result.stderr, *names)
            assert snapshot(folder) == before
            assert "Saved" not in result.stdout

    return refused


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        (["--learning-rat", "1e-4"], "--learning-rat"),  # abbreviated
        (["--nonsense", "1"], "--nonsense"),
        (["--learning–rate", "1e-4"], "–rate"),  # a dash that a word processor put there
        (["--pres", "demo"], "--pres"),
        (["--preset", "nonsense"], "nonsense"),
        (["--max-length", "many"], "many"),
        (["--dtype", "int3"], "int3"),
    ],
)
@pytest.mark.parametrize("script", ["sft_train", "reward_train"])
def test_a_flag_that_does_not_exist(call_main, tmp_path, script, flag, name):
    result = call_main(script, ["--output-dir", tmp_path / "out", *flag])
    assert result.returncode == 2
    assert name in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "script", ["sft_train", "reward_train", "ppo_train", "compare_outputs", "rlhf.chat"]
)
def test_every_number_has_one_range(script):
    """`role_layers` is checked against the base's layers."""
    ranges = [*AT_LEAST_ONE, *ABOVE_ZERO, *NOT_NEGATIVE, *SHARES, "seed", "role_layers"]
    assert len(set(ranges)) == len(ranges)
    for field in dataclasses.fields(importlib.import_module(script).Config):
        types = typing.get_args(field.type) or (field.type,)
        if {int, float} & {*types}:
            assert field.name in ranges


@pytest.mark.parametrize("script", ["sft_train", "reward_train", "ppo_train"])
def test_a_tracker_that_is_not_installed(call_main, tmp_path, monkeypatch, script):
    monkeypatch.setattr("rlhf.runs.checks.find_spec", lambda name: None)
    result = call_main(script, ["--log-with", "wandb", "--output-dir", tmp_path / "out"])
    assert_one_line(result.returncode, result.stderr, "--log-with wandb", "pip install wandb")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["sft_train", "reward_train"])
def test_a_batch_that_the_processes_cannot_share(refused, trained, monkeypatch, script):
    for module in ("rlhf.engine.trainer", "rlhf.runs.checks"):
        monkeypatch.setattr(f"{module}.num_processes", lambda: 3)
    more = ["--sft-checkpoint", trained.sft] if script == "reward_train" else []
    refused(
        script,
        ["--batch-size", "8"],
        "--batch-size 8 is not a multiple of 3 processes: the nearest is 9",
    )
    shutil.rmtree("full")
    few = [
        "--batch-size",
        "9",
        "--max-train-samples",
        "8",
    ]  # and 6 is the most that three can share
    refused(
        script, [*few, *more], "8 training rows do not fill one batch of 9: lower --batch-size to 6"
    )
    shutil.rmtree("full")
    few = ["--batch-size", "9", "--max-train-samples", "2"]
    refused(script, [*few, *more], "2 training rows", "start fewer processes than 3")


def test_a_script_of_its_own_process_ends_the_same(run_script, tmp_path):
    done = run_script("reward_train.py", "--dataset", "x", cwd=tmp_path)
    assert_one_line(done.returncode, done.stderr, "checkpoints/sft", "python sft_train.py")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the output folder


def test_a_folder_beside_the_output_is_left_alone(tmp_path):
    """Whoever sets a model aside as NAME.old or NAME.bak finds it after NAME is replaced."""
    for name in ("ppo", "ppo.old", "ppo.bak"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(name)
    with output_folder(str(tmp_path / "ppo")) as folder:
        (folder / "run.json").write_text("new")
    found = {path.name: (path / "run.json").read_text() for path in tmp_path.iterdir()}
    assert found == {"ppo": "new", "ppo.old": "ppo.old", "ppo.bak": "ppo.bak"}


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_another_run_is_writing_to(tmp_path, resume):
    with output_folder(str(tmp_path / "sft")) as folder:
        (folder / "metrics.jsonl").write_text("theirs")
        another = pytest.raises(UserError, match="another run is writing to .*sft.partial")
        with another, output_folder(str(tmp_path / "sft"), resume):
            pass
    assert snapshot(tmp_path) == {"sft/metrics.jsonl": b"theirs"}
    with pytest.raises(RuntimeError), output_folder(str(tmp_path / "sft")):
        raise RuntimeError("what a crash leaves holds nothing")
    with output_folder(str(tmp_path / "sft"), resume) as folder:
        (folder / "metrics.jsonl").write_text("ours")
    assert snapshot(tmp_path) == {"sft/metrics.jsonl": b"ours"}


def test_an_output_folder_that_holds_something(call_main, trained, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("x")
    for script, argv in (("sft_train", trained.sft_flags), ("reward_train", trained.reward_flags)):
        result = call_main(script, [*argv, "--output-dir", out])
        assert_one_line(result.returncode, result.stderr, out, "--overwrite")
    assert snapshot(tmp_path) == {"out/precious.txt": b"x"}


def test_an_output_folder_that_is_a_mount_point(call_main, flags, tmp_path, monkeypatch):
    """As a volume of a container: it cannot be replaced when the result is finished."""
    out = tmp_path / "volume"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    for more in ([], ["--overwrite"]):
        result = call_main("sft_train", [*flags["sft_train"], "--output-dir", out, *more])
        assert_one_line(result.returncode, result.stderr, out, "a folder inside it")
    result = call_main("sft_train", [*flags["sft_train"], "--output-dir", out / "sft", "--dry-run"])
    assert result.returncode == 0


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_folder_that_is_a_file(call_main, flags, tmp_path, place):
    (tmp_path / "file").write_text("x")
    result = call_main("sft_train", [*flags["sft_train"], "--output-dir", tmp_path / place])
    assert_one_line(result.returncode, result.stderr, "--output-dir", tmp_path / "file")
    assert snapshot(tmp_path) == {"file": b"x"}


@pytest.mark.parametrize("place", [".", ""])
def test_an_output_folder_without_a_name(call_main, flags, tmp_path, place):
    result = call_main("sft_train", [*flags["sft_train"], "--output-dir", place])
    assert_one_line(result.returncode, result.stderr, "--output-dir")
    assert snapshot(tmp_path) == {}


def test_an_output_folder_that_is_an_input(call_main, trained, tmp_path):
    """--overwrite replaces an earlier result, never the SFT checkpoint that the run reads."""
    sft = Path(shutil.copytree(trained.sft, tmp_path / "sft"))
    before = snapshot(sft)
    argv = [*trained.reward_flags, "--sft-checkpoint", sft, "--output-dir", sft, "--overwrite"]
    result = call_main("reward_train", argv)
    assert snapshot(sft) == before
    assert_one_line(result.returncode, result.stderr, "--output-dir", sft)


@pytest.mark.parametrize("dangling", [False, True])
def test_an_output_folder_that_is_a_link(tmp_path, dangling):
    """Finished or not, results are written where it leads; a second run replaces the first."""
    disk = tmp_path / "disk" / "runs"
    if not dangling:
        (disk / "sft").mkdir(parents=True)
    (tmp_path / "sft").symlink_to(disk / "sft")
    for text in ("first", "second"):
        check_output("sft", overwrite=text == "second")
        with output_folder("sft") as folder:
            assert folder == disk / "sft.partial"
            (folder / "run.json").write_text(json.dumps({"phase": "sft", "text": text}))
    assert (tmp_path / "sft").is_symlink()
    assert json.loads((tmp_path / "sft" / "run.json").read_text())["text"] == "second"
    names = ["disk", "disk/runs", "disk/runs/sft", "disk/runs/sft/run.json", "sft"]
    assert [
        name
        for name in sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
        if name != "sft/run.json"
    ] == names
    with pytest.raises(UserError, match="sft is not empty: add --overwrite"):
        check_output("sft", overwrite=False)


def test_a_run_that_goes_on_behind_a_link(trained, call_main, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "sft")
    argv = [*trained.sft_flags, "--output-dir", "link"]
    assert call_main("sft_train", argv).returncode == 0
    result = call_main("sft_train", [*argv, "--resume"])
    assert result.returncode == 0 and "nothing to resume" in result.stdout
    assert set(os.listdir(tmp_path / "disk" / "sft")) == set(os.listdir(trained.sft))
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"]


def test_a_link_that_leads_to_itself(call_main, flags, tmp_path):
    (tmp_path / "sft").symlink_to(tmp_path / "sft")
    result = call_main("sft_train", [*flags["sft_train"], "--output-dir", tmp_path / "sft"])
    assert_one_line(result.returncode, result.stderr, "--output-dir", "leads back to itself")


@pytest.mark.parametrize(
    "script",
    ["sft_train", "reward_train", "ppo_train", "compare_outputs", "rlhf.export", "feedback.vote"],
)
def test_a_tilde_is_the_home_folder_in_every_flag(monkeypatch, script):
    monkeypatch.setenv("HOME", "/home/me")
    module = importlib.import_module(script)
    texts = {
        field.name for field in dataclasses.fields(module.Config) if field.type in (str, str | None)
    }
    argv = [part for name in texts for part in (flag_of(name), "~/x")]
    if script == "rlhf.export":
        texts = texts | {"checkpoint", "output_dir"}
        argv = ["~/x", "~/x", *argv]
    assert len(texts) >= 3
    config = parse(module.Config, {}, module.__doc__, argv)
    assert {getattr(config, name) for name in texts} == {"/home/me/x"}


@pytest.mark.parametrize("more", [["--overwrite"], ["--resume"]])
@pytest.mark.parametrize(
    "place",
    [
        "reward/run.json",
        "notes.txt",
        "sft/notes.txt",
        "sft/value/notes.txt",
        "sft/more/run.json",
        "sft.partial/notes.txt",
    ],
)
def test_only_our_own_results_are_replaced(call_main, trained, tmp_path, place, more):
    """The folder above all checkpoints, or a result that something else was put into."""
    shutil.copytree(trained.sft, tmp_path / "runs" / "sft")
    file = tmp_path / "runs" / place
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    target = tmp_path / "runs" / ("sft" if place.startswith("sft") else "")
    if more == ["--resume"]:  # of a run that is not finished
        target.with_name(target.name + ".partial").mkdir(exist_ok=True)
    before = snapshot(tmp_path)
    result = call_main("sft_train", [*trained.sft_flags, "--output-dir", target, *more])
    named = file if place.startswith("sft") else sorted((tmp_path / "runs").iterdir())[0]
    assert_one_line(result.returncode, result.stderr, named, "would be removed")
    assert snapshot(tmp_path) == before


def test_a_model_of_other_origin_is_not_replaced_by_an_export(
    call_main, trained, tiny_model, tmp_path
):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    before = snapshot(model)
    result = call_main("rlhf.export", [trained.sft, model, "--overwrite"])
    assert_one_line(result.returncode, result.stderr, model, "would be removed")
    assert snapshot(model) == before


@pytest.mark.parametrize("script", ["reward_train", "ppo_train", "rlhf.export"])
def test_an_output_folder_that_is_the_base(
    call_main, trained, tiny_model, tiny_data, flags, tmp_path, script
):
    """The base that a checkpoint names is an input too."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    for phase in ("sft", "reward"):
        shutil.copytree(getattr(trained, phase), tmp_path / phase)
        run = json.loads((tmp_path / phase / "run.json").read_text())
        run["base"]["model"] = str(model)
        (tmp_path / phase / "run.json").write_text(json.dumps(run))
    before = snapshot(tmp_path)
    sft = ["--sft-checkpoint", tmp_path / "sft"]
    reward = ["--reward-checkpoint", tmp_path / "reward"]
    argv = {
        "reward_train": [*flags["reward_train"], *sft, "--output-dir", model],
        "ppo_train": [*sft, *reward, "--dataset", tiny_data, "--output-dir", model],
        "rlhf.export": [tmp_path / "sft", model],
    }[script]
    result = call_main(script, [*argv, "--overwrite"])
    assert_one_line(result.returncode, result.stderr, "which this run reads", model)
    assert snapshot(tmp_path) == before


def test_an_output_folder_that_cannot_be_written_to(
    call_main, trained, flags, tmp_path, monkeypatch
):
    """Asked before any work; of a read-only disk only making the folder tells."""
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        result = call_main("sft_train", [*flags["sft_train"], "--output-dir", folder])
        assert_one_line(result.returncode, result.stderr, "--output-dir", tmp_path)
        patch.setattr(os, "access", lambda path, mode: Path(path) != folder)
        result = call_main(
            "compare_outputs", ["--sft-checkpoint", trained.sft, "--output-dir", folder]
        )
        assert_one_line(result.returncode, result.stderr, "--output-dir", folder)

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    result = call_main("sft_train", [*flags["sft_train"], "--output-dir", tmp_path / "other"])
    assert_one_line(result.returncode, result.stderr, "--output-dir", "Read-only file system")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_a_full_disk(refused, trained, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    monkeypatch.setattr("rlhf.engine.adapters.save_file", full)
    script = "sft_train" if isinstance(error, SafetensorError) else "reward_train"
    parents = [] if script == "sft_train" else ["--sft-checkpoint", trained.sft]
    refused(script, parents, "disk is full")


def test_a_disk_that_fills_at_the_first_metric(refused, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rlhf.runs.metrics.JsonLines.write", full)
    refused("sft_train", [], "disk is full")


# ---------------------------------------------------------------- the base model


@pytest.mark.parametrize("model", ["/nowhere/model", "./model", "model", "a/b/c"])
def test_a_model_folder_that_is_not_there(refused, model):
    refused("sft_train", ["--base-model", model], "--base-model", model)


@pytest.mark.parametrize("model", ["nobody/no-such-model", "models/no-such-model"])
def test_a_hub_model_without_a_network(refused, model):
    refused("sft_train", ["--base-model", model], model, "network", "local folder", "--base-model")


def break_model(folder: Path, how: str) -> None:
    config = folder / "config.json"
    if how == "no config.json":
        config.unlink()
    elif how == "damaged config.json":
        config.write_text("{")
    elif how == "unknown architecture":
        config.write_text(json.dumps({"model_type": "nonsense", "architectures": ["Nonsense"]}))
    elif how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "pickled weights":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif how == "half the weights":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    elif how == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif how == "damaged tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif how == "half a tokenizer":
        (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:1000])
    elif how in ("no EOS", "no pad"):
        name = "eos_token" if how == "no EOS" else "pad_token"
        file = folder / "tokenizer_config.json"
        file.write_text(
            json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != name})
        )
        if how == "no pad":  # nor any that could stand in
            tokens = folder / "tokenizer.json"
            text = tokens.read_text().replace("<pad>", "<nap>")
            tokens.write_text(text.replace('"special": true', '"special": false', 1))


@pytest.mark.parametrize(
    ("how", "names"),
    [
        ("no config.json", ["config.json"]),
        ("damaged config.json", ["config.json"]),
        ("unknown architecture", ["nonsense"]),
        ("no weights", ["safetensors"]),
        ("pickled weights", ["safetensors"]),
        ("half the weights", []),
        ("no tokenizer", ["tokenizer"]),
        ("damaged tokenizer", ["tokenizer"]),
        ("half a tokenizer", ["tokenizer"]),
        ("no EOS", ["EOS"]),
        ("no pad", ["pad"]),
    ],
)
def test_a_model_folder_that_is_not_whole(refused, tiny_model, tmp_path, how, names):
    broken = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    break_model(broken, how)
    refused("sft_train", ["--base-model", broken], broken, *names)


def test_4bit_where_it_cannot_run(refused, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image is available\nfor this card")

    monkeypatch.setattr("bitsandbytes.nn.Linear4bit", broken)
    refused(
        "sft_train",
        ["--load-in-4bit"],
        "4-bit",
        "no kernel image is available",
        "--no-load-in-4bit",
    )


HUB_DRIVER = """
import contextlib, io, json, sys
import sft_train
from rlhf.runs.cli import run

results = []
for argv in json.loads(sys.argv[1]):
    sys.argv, out, err, code = ["sft_train.py", *argv], io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(sft_train.main, sft_train.Config, sft_train.PRESETS, sft_train.__doc__)
    except SystemExit as stop:
        code = stop.code
    results.append([code, err.getvalue()])
print("RESULTS" + json.dumps(results))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub on which all of gated/ is gated and nothing else exists; asked of busy/ it hangs up."""

    def do_GET(self):
        gated = "gated/" in self.path
        if "busy/" in self.path:
            self.close_connection = True
            return
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header(
            "X-Error-Message", "Access to this repository is restricted" if gated else "Not found"
        )
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub_results(tmp_path_factory, flags):
    """What sft_train.py says of gated and missing models and data; in a process of its own."""
    folder = tmp_path_factory.mktemp("hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in OFFLINE and not k.startswith(("HF_", "HUGGING"))
    }
    env |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    env |= {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    cases = {
        "gated model": ["--base-model", "gated/thing"],
        "missing model": ["--base-model", "nobody/thing"],
        "gated data set": ["--dataset", "gated/thing"],
        "missing data set": ["--dataset", "nobody/thing"],
        "dropped line": ["--base-model", "busy/thing"],
    }
    argv = [
        [*flags["sft_train"], "--output-dir", str(folder / "out"), *more] for more in cases.values()
    ]
    done = subprocess.run(
        [sys.executable, "-c", HUB_DRIVER, json.dumps(argv)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    server.shutdown()
    assert done.returncode == 0, done.stderr
    assert not (folder / "out").exists()
    results = json.loads(done.stdout.split("RESULTS")[1])
    return endpoint, dict(zip(cases, results, strict=True))


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (
            "gated model",
            ["model gated/thing is gated", "{endpoint}/gated/thing", "hf auth login", "HF_TOKEN"],
        ),
        ("missing model", ["no model nobody/thing", "--base-model"]),
        (
            "gated data set",
            ["data set gated/thing is gated", "{endpoint}/datasets/gated/thing", "HF_TOKEN"],
        ),
        ("missing data set", ["no data set nobody/thing", "--dataset"]),
        (
            "dropped line",
            ["model busy/thing is not on this machine", "check the network", "--base-model"],
        ),
    ],
)
def test_a_hub_that_says_no(hub_results, case, names):
    endpoint, results = hub_results
    code, stderr = results[case]
    assert_one_line(code, stderr, *[name.format(endpoint=endpoint) for name in names])


def test_a_hub_that_is_not_there_is_one_line(capsys, caplog):
    """Of all that its library logs; but an error of the library is shown."""
    say_once.cache_clear()
    quiet_libraries()
    log = logging.getLogger("huggingface_hub.utils._http")
    for attempt in range(1, 6):
        log.warning(
            "'[Errno 111] Connection refused' thrown while requesting HEAD http://127.0.0.1:1/x"
        )
        log.warning(f"Retrying in 1s [Retry {attempt}/5].")
    logging.getLogger("huggingface_hub.file_download").warning("a warning")
    assert capsys.readouterr().out == "The hub does not answer; trying again for a while.\n"
    assert not caplog.records and not logging.getLogger("datasets.load").isEnabledFor(
        logging.WARNING
    )
    for place in (log, logging.getLogger("huggingface_hub.file_download")):
        place.error("an error")
    assert [record.message for record in caplog.records] == ["an error"] * 2


# ---------------------------------------------------------------- the data


def test_a_folder_with_too_few_rows_for_a_test_split(refused, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [GOOD_ROW])
    says = "none of its 1 rows is in the test split"
    refused("sft_train", ["--dataset", tmp_path], tmp_path, says)


# ---------------------------------------------------------------- the earlier stage


@pytest.fixture
def sft(trained, tmp_path) -> Path:
    """A copy of the SFT checkpoint, to spoil."""
    return Path(shutil.copytree(trained.sft, tmp_path / "sft"))


def test_no_earlier_stage(refused, tmp_path):
    refused("reward_train", [], "checkpoints/sft", "python sft_train.py", "--sft-checkpoint")
    shutil.rmtree("full")
    refused(
        "reward_train", ["--sft-checkpoint", tmp_path / "x"], tmp_path / "x", "python sft_train.py"
    )


def test_eval_only_of_what_is_not_there(trained, call_main, tmp_path):
    result = call_main(
        "reward_train", [*trained.reward_flags, "--output-dir", tmp_path / "none", "--eval-only"]
    )
    assert_one_line(
        result.returncode, result.stderr, "there is no reward checkpoint", "--output-dir"
    )


def test_an_adapter_that_changed_after_its_run_json(refused, sft):
    weights = sft / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused("reward_train", ["--sft-checkpoint", sft], weights, "run.json")
    shutil.rmtree("full")
    weights.unlink()
    refused("reward_train", ["--sft-checkpoint", sft], "adapter_model.safetensors")


def test_another_base(refused, trained, tmp_path, tiny_model):
    other = make_model(tmp_path / "other", seed=1)
    assert (other / "config.json").read_bytes() == (tiny_model / "config.json").read_bytes()
    names = [tiny_model, other, "another base"]
    refused("reward_train", ["--sft-checkpoint", trained.sft, "--base-model", other], *names)


def test_the_same_base_in_another_place_is_the_same(call_main, trained, tmp_path, tiny_model):
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    argv = [*trained.reward_flags, "--base-model", moved, "--output-dir", tmp_path / "reward"]
    assert call_main("reward_train", argv).returncode == 0


def test_a_base_that_was_moved_away(refused, sft, tmp_path):
    run = json.loads((sft / "run.json").read_text())
    run["base"]["model"] = str(tmp_path / "gone")
    (sft / "run.json").write_text(json.dumps(run))
    refused("reward_train", ["--sft-checkpoint", sft], tmp_path / "gone", "--base-model")


# ---------------------------------------------------------------- and what is no mistake


def test_overwrite_replaces_the_earlier_result(call_main, trained, tmp_path):
    out = shutil.copytree(trained.reward, tmp_path / "sft")
    result = call_main("sft_train", [*trained.sft_flags, "--output-dir", out, "--overwrite"])
    assert result.returncode == 0, result.stderr
    assert set(os.listdir(out)) == set(os.listdir(trained.sft))
    assert os.listdir(tmp_path) == ["sft"]
    assert (
        snapshot(out)["adapter_model.safetensors"]
        == snapshot(trained.sft)["adapter_model.safetensors"]
    )


CHAIN = {
    "sft": "reward_train",
    "reward": "ppo_train",
    "gold": "ppo_train",
    "ppo": "compare_outputs",
}


def following(script, flags, made):
    """The next command after a script given `flags`, and the config it gives the next script."""
    module = importlib.import_module(script)
    after = importlib.import_module(CHAIN[made])
    config = parse(module.Config, module.PRESETS, module.__doc__, shlex.split(flags))
    command = next_command(f"{CHAIN[made]}.py", vars(config), made)
    start, *words = shlex.split(command.removeprefix("python "))
    assert start == f"{CHAIN[made]}.py"
    return command, parse(after.Config, after.PRESETS, after.__doc__, words)


@pytest.mark.parametrize("preset", ["", " --preset demo"])
def test_the_next_command_is_short_where_nothing_was_changed(preset):
    for script, made in (("sft_train", "sft"), ("reward_train", "reward"), ("ppo_train", "ppo")):
        command, config = following(script, preset, made)
        assert command == f"python {CHAIN[made]}.py{preset}"
        assert config.preset == (preset.split()[-1] if preset else None)


@pytest.mark.parametrize("preset", ["", "--preset demo "])
def test_what_the_next_command_leaves_out_is_what_the_scripts_begin_with(preset):
    name = "demo" if preset else None
    for script, made in (
        ("sft_train", "sft"),
        ("reward_train", "reward"),
        ("ppo_train", "ppo"),
        ("compare_outputs", ""),
    ):
        module = importlib.import_module(script)
        config = module.PRESETS[name] if name else module.Config()
        usual = USUAL[name] | {"output_dir": USUAL[name][made or "reports"]}
        usual |= {f"{phase}_checkpoint": USUAL[name][phase] for phase in ("sft", "reward", "ppo")}
        values = dict(vars(config))
        if script == "compare_outputs":
            values["dataset"] = values["dataset"] or module.USUAL_DATASET
        fields = values.keys() & usual.keys()
        assert len(fields) >= 3
        assert {field: values[field] for field in fields} == {
            field: usual[field] for field in fields
        }


def test_the_comparison_asks_the_rows_whose_columns_were_renamed():
    """Of the usual data, too: --columns without --num-test-prompts is refused."""
    _, config = following("ppo_train", "--columns prompt=question", "ppo")
    assert config.columns == "prompt=question"
    assert config.num_test_prompts > 0


@pytest.mark.parametrize("preset", ["", "--preset demo "])
def test_the_next_commands_keep_folders_data_and_base_to_the_end(preset):
    data = "--dataset 'my rows.jsonl' --columns 'prompt=the question,chosen=good' --dtype fp32"
    own = f"{preset}--base-model some/model --output-dir 'my runs/sft-1' {data}"
    command, config = following("sft_train", own, "sft")
    assert "--base-model" not in command  # the SFT checkpoint names it
    steps = [config]
    flags = f"{command.partition('.py')[2]} --base-model 'moved here' --role-layers 2"
    command, config = following("reward_train", flags, "reward")
    steps.append(config)
    command, config = following(
        "ppo_train", f"{command.partition('.py')[2]} --max-eval-samples 9", "ppo"
    )
    steps.append(config)
    shared = {
        "dataset": "my rows.jsonl",
        "columns": "prompt=the question,chosen=good",
        "dtype": "fp32",
    }
    shared |= {"sft_checkpoint": "my runs/sft-1", "preset": "demo" if preset else None}
    assert all(shared.items() <= vars(step).items() for step in steps)
    assert [step.output_dir for step in steps] == [
        "my runs/reward-1",
        "my runs/ppo-1",
        "my runs/reports-1",
    ]
    assert [step.base_model for step in steps] == [None, "moved here", "moved here"]
    assert steps[1].role_layers == 2
    assert (
        steps[2].reward_checkpoint == "my runs/reward-1"
        and steps[2].ppo_checkpoint == "my runs/ppo-1"
    )
    assert steps[2].num_test_prompts == 9


@pytest.mark.parametrize(
    ("script", "flags", "made", "command"),
    [
        (
            "sft_train",
            "--output-dir big",
            "sft",
            "reward_train.py --sft-checkpoint big --output-dir big-reward",
        ),
        ("sft_train", "--dataset mine.csv", "sft", "reward_train.py --dataset mine.csv"),
        (
            "sft_train",
            "--output-dir runs/demo/sft",
            "sft",
            "reward_train.py --sft-checkpoint runs/demo/sft --output-dir runs/demo/reward",
        ),
        (
            "reward_train",
            "--output-dir checkpoints/gold",
            "gold",
            "ppo_train.py --gold-checkpoint checkpoints/gold",
        ),
        ("ppo_train", "--gold-checkpoint checkpoints/gold", "ppo", "compare_outputs.py"),
        (
            "ppo_train",
            "--max-eval-samples None --dataset d",
            "ppo",
            "compare_outputs.py --dataset d --num-test-prompts 1000",
        ),
    ],
)
def test_the_next_command_leads_to_what_was_just_made(script, flags, made, command):
    assert following(script, flags, made)[0] == f"python {command}"


def test_after_an_sft_without_pairs_the_next_command_is_for_other_data():
    config = dataclasses.replace(
        importlib.import_module("sft_train").Config(), dataset="mine.csv", columns="a=b"
    )
    command = next_command("reward_train.py", vars(config), "sft", same_data=False)
    assert command == "python reward_train.py"


# ---------------------------------------------------------------- PPO


@pytest.mark.parametrize(
    "argv, names",
    [
        (
            ["--max-steps", 5],
            [
                "--critic-warmup-updates 5",
                "would not be trained",
                "at most 4 ",
                "raise --max-steps",
            ],
        ),
        (
            ["--total-episodes", 128],
            ["--critic-warmup-updates 5", "at most 1 of them", "raise --total-episodes"],
        ),
        (["--kl-horizon", 12], ["--kl-horizon 12", "64 episodes", "the shortest is 13"]),
    ],
)
def test_ppo_refuses_what_trains_no_policy_or_turns_the_kl_around(call_main, tmp_path, argv, names):
    result = call_main("ppo_train", [*argv, "--output-dir", tmp_path / "out"])
    assert_one_line(result.returncode, result.stderr, *names)


def test_ppo_refuses_a_reward_model_of_another_sft_model(call_main, trained, flags, tmp_path):
    sft = tmp_path / "sft"
    assert (
        call_main("sft_train", [*flags["sft_train"], "--seed", "1", "--output-dir", sft]).returncode
        == 0
    )
    argv = [
        "--sft-checkpoint",
        sft,
        "--reward-checkpoint",
        trained.reward,
        "--output-dir",
        tmp_path / "out",
    ]
    result = call_main("ppo_train", argv)
    assert_one_line(
        result.returncode,
        result.stderr,
        trained.reward,
        "not trained from the SFT checkpoint",
        "reward_train.py",
    )
    result = call_main("ppo_train", [*argv, "--reward-checkpoint", sft])
    assert_one_line(
        result.returncode,
        result.stderr,
        sft,
        "holds a sft checkpoint where a reward checkpoint is needed",
    )
    result = call_main("ppo_train", [*argv, "--reward-checkpoint", tmp_path / "none"])
    assert_one_line(
        result.returncode, result.stderr, "python reward_train.py", "--reward-checkpoint"
    )
    assert not (tmp_path / "out").exists()
