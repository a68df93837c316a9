"""The corpus of tests/bad_inputs: exit code 2, one clear line, nothing changed on disk."""

import json
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
from conftest import DEMO
from test_mistakes import assert_one_line, snapshot

HERE = Path(__file__).parent / "bad_inputs"
CASES = tomllib.loads((HERE / "cases.toml").read_text(encoding="utf-8"))["case"]
PPO = "--response-length 8 --max-prompt-length 64 --episodes-per-update 4"
PPO += (
    " --num-mini-batches 2 --total-episodes 4 --rollout-batch-size 4 --max-eval-samples 3 "
    "--lora-rank 4"
)
PPO += " --critic-warmup-updates 0"


def each_script():
    for case in CASES:
        scripts = case["script"] if isinstance(case["script"], list) else [case["script"]]
        for script in scripts:
            yield pytest.param(script, case, id=f"{script} {describe(case)}")


def describe(case):
    """The case as a test's name."""
    spoil = [f"{key} {str(value)[:20]}" for key, value in case.get("spoil", {}).items()]
    return " ".join([case.get("flags", ""), case.get("data", ""), *spoil]).strip()


def spoiled(folder, file, write=None, times=1, remove=False, key=None, value=None):
    """Change one file of a checkpoint as a case says."""
    path = folder / file
    if remove:
        path.unlink()
    elif write is not None:
        path.write_text(write * times)
    else:
        *outer, last = key.split(".")
        inner = content = json.loads(path.read_text())
        for name in outer:
            inner = inner[name]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
        path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(("script", "case"), each_script())
def test_bad_input(call_main, flags, trained, tiny_data, tiny_model, tmp_path, script, case):
    names = {"sft": trained.sft, "reward": trained.reward, "model": tiny_model, "here": HERE}
    own = flags.get(script, ["--dataset", tiny_data, "--dtype", "fp32"])
    parents = {"--sft-checkpoint": trained.sft, "--reward-checkpoint": trained.reward}
    parents = list(parents.items())[: {"sft_train": 0, "reward_train": 1}.get(script, 2)]
    argv = [
        *own,
        *(PPO.split() if script == "ppo_train" else []),
        *(part for pair in parents for part in pair),
    ]
    if "spoil" in case:
        argv += [
            "--sft-checkpoint",
            spoiled(Path(shutil.copytree(trained.sft, tmp_path / "sft")), **case["spoil"]),
        ]
    if "data" in case:
        (tmp_path / "data").mkdir()
        shutil.copy(
            HERE / "data" / case["data"],
            tmp_path / "data" / Path(case["data"]).with_stem("train").name,
        )
        shutil.copy(DEMO / "test.jsonl", tmp_path / "data")
        argv += ["--dataset", tmp_path / "data"]
    argv += shlex.split(case.get("flags", "").format(**names))
    full = tmp_path / "full"
    full.mkdir()
    (full / "adapter_model.safetensors").write_bytes(b"an earlier result")
    (full / "run.json").write_text('{"phase": "sft"}')
    before = snapshot(tmp_path)
    for output in (["--output-dir", tmp_path / "absent"], ["--output-dir", full, "--overwrite"]):
        result = call_main(script, [*argv, *output])
        assert_one_line(
            result.returncode, result.stderr, *(name.format(**names) for name in case["says"])
        )
        assert "Saved" not in result.stdout
        assert snapshot(tmp_path) == before
        assert (
            not (tmp_path / "absent").exists()
            or script == "compare_outputs"
            and not any((tmp_path / "absent").iterdir())
        )


def test_every_file_of_the_corpus_is_used():
    text = (HERE / "cases.toml").read_text(encoding="utf-8")
    assert len(list(each_script())) >= 60
    assert [path for path in HERE.rglob("*") if path.is_file() and path.name not in text] == [
        HERE / "cases.toml"
    ]
