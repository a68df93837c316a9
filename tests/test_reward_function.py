"""`--reward-function`: what is run and when, what it may give, and that PPO trains for it."""

import json
from hashlib import sha256

import pytest
import torch
from conftest import CLOCKS
from forked import Run
from safetensors.torch import load_file

import compare_outputs
import ppo_train
from rlhf.ppo.reward_function import load_reward_function
from rlhf.runs.errors import UserError

RULES = """
from dataclasses import dataclass

import numpy as np
import torch


def short(prompts, completions, **kwargs):
    assert len(prompts) == len(completions) and not kwargs
    assert all(prompt.endswith("Assistant:") for prompt in prompts)
    return [-len(text) / 10 for text in completions]


def nothing(completions, **kwargs):
    return [0 for _ in completions]


def broken(completions, **kwargs):
    return [1 / 0 for _ in completions]


def missing(**kwargs):
    return [1.0]


def odd(completions, **kwargs):
    return [1.0, float("nan"), 2.0]


def huge(completions, **kwargs):
    return [1e300, 10**400, 0]


def worded(completions, **kwargs):
    return ["1.0", None, "x"]


def lengths(completions, **kwargs):
    return tuple(len(text) for text in completions)


def far(completions, **kwargs):
    return [100.0 * (i % 2) for i in range(len(completions))]


def array(completions, **kwargs):
    return np.array(lengths(completions))


def tensor(completions, **kwargs):
    return torch.tensor(lengths(completions))


def a_set(completions, **kwargs):
    return set(lengths(completions))


def a_dict(completions, **kwargs):
    return {i: 10.0 * i for i in range(len(completions))}


def digits(completions, **kwargs):
    return "1" * len(completions)


def column(completions, **kwargs):
    return tensor(completions)[:, None]


@dataclass
class Rule:
    least: int = 2

    def __call__(self, completions, **kwargs):
        return [len(text) >= self.least for text in completions]


rule = Rule()
number = 3
"""
PPO = (
    "--response-length 8 --max-prompt-length 64 --episodes-per-update 4 --num-mini-batches 2 "
    "--num-ppo-epochs 2 --total-episodes 12 --rollout-batch-size 4 --max-eval-samples 3 "
    "--eval-steps 2 --lora-rank 4 --lora-alpha 8 --role-layers 2 --learning-rate 1e-2 "
    "--value-learning-rate 1e-2 --critic-warmup-updates 1 --num-printed-samples 0 "
    "--no-gradient-checkpointing --dtype fp32 --save-steps 1"
)


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "rules.py"
    path.write_text(RULES)
    return path


@pytest.fixture
def ppo(trained, tiny_data, call_main, tmp_path):
    """`ppo(name, *flags)`: what PPO says, with its output in `tmp_path / name`."""

    def ppo(name, *more):
        where = ["--sft-checkpoint", trained.sft, "--reward-checkpoint", trained.reward]
        where += ["--dataset", tiny_data, "--output-dir", tmp_path / name]
        return call_main("ppo_train", [*PPO.split(), *where, *more])

    return ppo


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in rows]


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one | other)


def test_one_finite_number_per_text(rules):
    call = load_reward_function(f"{rules}:short")
    assert call(["x Assistant:"] * 2, ["", "0123456789"]).tolist() == [0.0, -1.0]
    assert call([], []).tolist() == []
    assert load_reward_function(f"{rules}:rule")(["p"] * 3, ["a", "ab", ""]).tolist() == [0, 1, 0]
    for name in ("lengths", "array", "tensor"):
        assert load_reward_function(f"{rules}:{name}")(["p"] * 2, ["abc", ""]).tolist() == [3, 0]
    assert load_reward_function(None) is None
    texts = ["one", "t" * 100, "three"]
    for name, says in {
        "broken": r"broken: ZeroDivisionError: division by zero \(line 19\)",
        "missing": "it gave 1 numbers for 3 texts; give one per text",
        "odd": f"it gave nan, not a finite number, for the text '{'t' * 60}...'",
        "huge": "it gave 1e\\+300, not a finite number, for the text 'one'",
        "a_set": "it gave a set; give a list of one number per text",
        "a_dict": "it gave a dict; give a list",
        "digits": "it gave a str; give a list",
        "column": "it gave a Tensor of 2 dimensions; give a list",
        "worded": f"it gave None, not a finite number, for the text '{'t' * 60}...'",
    }.items():
        with pytest.raises(UserError, match=says):
            load_reward_function(f"{rules}:{name}")(texts, texts)


@pytest.mark.parametrize(
    ("named", "text", "says"),
    [
        ("rules.py", "", "--reward-function rules.py: write it as file.py:function"),
        ("rules.py:", "", "write it as file.py:function"),
        ("nowhere.py:f", "", "nowhere.py cannot be read (No such file or directory)"),
        (".:f", "", ". cannot be read (Is a directory)"),
        ("rules.py:f", "", "rules.py has no function f"),
        ("rules.py:f", "f = 3", "rules.py has no function f"),
        ("rules.py:f", "import nothing_of_that_name", "ModuleNotFoundError: No module named"),
        ("rules.py:f", "\n\nraise KeyError('x')", "KeyError: 'x' (line 3)"),
        ("rules.py:f", "def f(:", "SyntaxError: invalid syntax (rules.py, line 1)"),
        ("rules.py:f", "import sys\nsys.exit(0)", "SystemExit: 0 (line 2)"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch, ppo, named, text, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.py").write_text(text)
    result = ppo("out", "--reward-function", named)
    assert result.returncode == 2 and says in result.stderr, result.stderr
    assert result.stderr.startswith("error: --reward-function ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_what_fails_in_training_is_one_line(rules, ppo):
    result = ppo("out", "--reward-function", f"{rules}:broken")
    assert result.returncode == 2 and result.stderr.count("error: ") == 1, result.stderr
    assert "broken: ZeroDivisionError: division by zero (line 19)" in result.stderr
    lonely = ppo("out", "--reward-weight", "0")
    assert lonely.returncode == 2 and "name one, or leave the weight out" in lonely.stderr
    negative = ppo("out", "--reward-weight", "-1", "--reward-function", f"{rules}:short")
    assert negative.returncode == 2 and "--reward-weight must be at least 0" in negative.stderr


def test_a_function_that_gives_0_changes_nothing(rules, ppo, tmp_path):
    assert ppo("plain").returncode == 0
    result = ppo("zero", "--reward-function", f"{rules}:nothing")
    assert result.returncode == 0 and f"--reward-function {rules}:nothing" in result.stdout
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "zero")
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "zero"))


def test_scores_beyond_the_clip_are_said_at_the_start(rules, ppo):
    result = ppo("far", "--reward-function", f"{rules}:far")
    assert result.returncode == 0, result.stderr
    said = "warning: 100% of the scores of SFT's answers are more than --score-clip 5 from their"
    assert result.stdout.count(said) == 1, result.stdout
    wider = ppo("wide", "--reward-function", f"{rules}:far", "--score-clip", "90")
    assert wider.returncode == 0 and "--score-clip" not in wider.stdout, wider.stderr


def test_the_score_is_the_weighted_sum(rules, ppo, tmp_path, monkeypatch):
    """In rollouts and in looks; a run that goes on does so with the same file only, to the bit."""
    seen = []
    total = ppo_train.total_scores

    def watched(config, function, prompt_format, scores, batch):
        texts = [prompt_format.decode(response.text_ids) for response in batch.responses]
        after = total(config, function, prompt_format, scores, batch)
        seen.append((scores, [-len(text) / 10 for text in texts], after))
        return after

    monkeypatch.setattr(ppo_train, "total_scores", watched)
    flags = ["--reward-function", f"{rules}:short", "--reward-weight", "0.5"]
    assert ppo("alone", *flags).returncode == 0
    assert len(seen) == 3 + 3  # updates and looks
    for scores, shortness, after in seen:
        torch.testing.assert_close(after, 0.5 * scores + torch.tensor(shortness))
    rows = metrics(tmp_path / "alone")
    means = [after.mean().item() for _, _, after in seen]
    assert [row["eval/scores"] for row in rows if "eval/scores" in row] == pytest.approx(
        [means[0], means[3], means[5]], abs=1e-6
    )
    said = json.loads((tmp_path / "alone" / "run.json").read_text())["reward_function"]
    assert said == {"name": f"{rules}:short", "sha256": sha256(RULES.encode()).hexdigest()}

    class Crash(Exception):
        pass

    def crash(*args, **kwargs):
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        begun = []

        def measure(*args):
            begun.append(1)
            return crash() if len(begun) == 3 else original(*args)

        original = ppo_train.measure
        patch.setattr(ppo_train, "measure", measure)
        ppo("cut", *flags)
    rules.write_text(RULES + "\n")
    other = ppo("cut", *flags, "--resume")
    assert other.returncode == 2 and "another reward function's file (" in other.stderr
    rules.write_text(RULES)
    none = ppo("cut", "--resume")
    assert none.returncode == 2 and "another reward_function (" in none.stderr
    assert ppo("cut", *flags, "--resume").returncode == 0
    assert metrics(tmp_path / "alone") == metrics(tmp_path / "cut")
    assert same(weights(tmp_path / "alone"), weights(tmp_path / "cut"))


def test_two_processes_end_together(rules, trained, tiny_data, tmp_path):
    """Where the function fails in one of them."""
    rules.write_text(
        "import os\n\n\ndef f(completions, **kwargs):\n"
        "    assert os.environ['RANK'] == '0', 'not here'\n    return [0.0] * len(completions)\n"
    )
    where = ["--sft-checkpoint", trained.sft, "--reward-checkpoint", trained.reward]
    where += ["--dataset", tiny_data, "--output-dir", tmp_path / "out"]
    flags = ["--reward-function", f"{rules}:f", "--num-mini-batches", "1"]
    cpu = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    run = Run(["ppo_train.py", *PPO.split(), *where, *flags], cpu, processes=2)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 2 and "AssertionError: not here (line 5)" in err, err


def test_a_comparison_is_told_again(rules, ppo, trained, call_main, tmp_path, monkeypatch):
    """A path in a checkpoint is never run, whatever it says."""
    monkeypatch.chdir(tmp_path)
    flags = ["--reward-function", "rules.py:short", "--reward-weight", "0.5"]
    done = ppo("ppo", *flags)
    assert "--reward-function rules.py:short --reward-weight 0.5" in done.stdout.splitlines()[-1]
    rules.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n" + RULES)
    run = json.loads((tmp_path / "ppo" / "run.json").read_text())
    run["hyperparameters"]["reward_function"] = "rules.py:short"
    run["reward_function"]["name"] = "rules.py:short"
    (tmp_path / "ppo" / "run.json").write_text(json.dumps(run))
    where = ["--sft-checkpoint", trained.sft, "--reward-checkpoint", trained.reward]
    where += ["--ppo-checkpoint", "ppo", "--max-new-tokens", "8", "--dtype", "fp32"]
    told = {}
    for name, more in {"plain": [], "told": flags}.items():
        result = call_main("compare_outputs", [*where, "--output-dir", name, *more])
        assert result.returncode == 0, result.stderr
        told[name] = json.loads((tmp_path / name / "compare.json").read_text())
        assert (tmp_path / "executed").exists() == (name == "told")
    assert compare_outputs.FUNCTION_LEFT_OUT in told["plain"]["notes"]
    assert told["told"]["notes"][1:] == [
        "A score is 0.5 times the reward model's plus what rules.py:short gives.",
        "PPO was trained with another reward function.",
    ]
    for plain, other in zip(told["plain"]["prompts"], told["told"]["prompts"], strict=True):
        for name, answer in plain["answers"].items():
            assert other["answers"][name]["score"] == pytest.approx(
                0.5 * answer["score"] - len(answer["text"]) / 10, abs=1e-6
            )
    (tmp_path / "executed").unlink()
    exported = call_main("rlhf.export", ["ppo", "exported"])
    assert exported.returncode == 0 and not (tmp_path / "executed").exists(), exported.stderr
