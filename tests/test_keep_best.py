"""`--keep best`: the gold model chooses, by prompts that are neither trained on nor reported on."""

import dataclasses
import json

import pytest
import torch
from conftest import CLOCKS
from test_reward_function import PPO, same, weights

import compare_outputs
import ppo_train
from rlhf.data.rows import Pair
from rlhf.data.splits import cut_selection
from rlhf.runs.errors import UserError


def pair(first, *later):
    turns = [("user", first)]
    for text in later:
        turns += [("assistant", "I see."), ("user", text)]
    return Pair(tuple(turns), "Yes.", "No.")


def test_the_prompts_that_choose_are_never_trained_on():
    pairs = [pair(f"Question {i}?", *["More?"] * j) for i in range(40) for j in range(3)]
    train, selection = cut_selection(pairs, 10)
    firsts = [{p.turns[0] for p in part} for part in (train, selection)]
    assert len(selection) == len(firsts[1]) == 10 and not firsts[0] & firsts[1]
    assert len(train) == 90 and sorted(map(repr, train)) == sorted({*map(repr, train)})
    # More data moves no prompt that is trained on to those that choose, and none back.
    more, chosen = cut_selection([*pairs, pair("And this?")], 10)
    assert len({*map(repr, selection)} & {*map(repr, chosen)}) >= 9
    assert cut_selection(pairs[::-1], 10)[1][0].turns[0] == selection[0].turns[0]
    with pytest.raises(UserError, match="takes 21 dialogues .* and the split has 40: lower .* 20"):
        cut_selection(pairs, 21)


@pytest.fixture(scope="module")
def gold(flags, trained, call_main, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gold") / "gold"
    own = [*flags["reward_train"], "--sft-checkpoint", trained.sft, "--output-dir", folder]
    reward = trained.reward.parent / "first"
    for argv in (
        [*own, "--half", "second"],
        [*own[:-1], reward, "--half", "first"],
    ):
        result = call_main("reward_train", argv)
        assert result.returncode == 0, result.stderr
    return reward, folder


@pytest.fixture
def ppo(trained, gold, tiny_data, call_main, tmp_path):
    """`ppo(name, *flags)`: three updates with a look after each."""

    def ppo(name, *more):
        where = ["--sft-checkpoint", trained.sft, "--reward-checkpoint", gold[0]]
        where += ["--gold-checkpoint", gold[1], "--dataset", tiny_data]
        looks = ["--eval-steps", "1", "--output-dir", tmp_path / name]
        return call_main("ppo_train", [*PPO.split(), *where, *looks, *more])

    return ppo


class Crash(Exception):
    pass


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in rows]


@pytest.mark.parametrize("best", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_what_is_saved_is_the_best_look(ppo, monkeypatch, tmp_path, best):
    """And the figures reported are of that policy, on held-out prompts that chose nothing."""
    asked = []
    evaluate = ppo_train.evaluate

    def judged(config, shared, prompt_format, total, prompts, probe=None):
        result = evaluate(config, shared, prompt_format, total, prompts, probe)
        looks = sum(other != asked[0][0] for other, _ in asked) if asked else 0
        asked.append((prompts, {n: w.clone() for n, w in shared.trained_weights().items()}))
        # The first call is of the held-out prompts, the second the look at 0.
        gold_scores = torch.full_like(result.gold_scores, float(looks == best))
        return dataclasses.replace(result, gold_scores=gold_scores)

    monkeypatch.setattr(ppo_train, "evaluate", judged)
    done = ppo("out", "--keep", "best")
    assert done.returncode == 0, done.stderr
    held_out, selection = asked[0][0], asked[1][0]
    assert [prompts for prompts, _ in asked] == [held_out, *[selection] * 4, held_out]
    assert len(selection) == len(held_out) == 3 and held_out != selection
    kept, last = asked[1 + best][1], asked[-1][1]
    assert same(kept, last)
    said = json.loads((tmp_path / "out" / "run.json").read_text())
    assert said["kept"] == {"update": best, "gold_score": 1.0}
    assert f"Keeping the policy of update {best} of 3: the gold model's mean score, 1.00" in (
        done.stdout
    )
    assert said["metrics"]["eval_prompts"] == 3


def test_a_run_that_goes_on_keeps_the_best(ppo, monkeypatch, tmp_path):
    assert ppo("alone", "--keep", "best").returncode == 0
    for resumed in ([], ["--resume"]):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            calls = []
            measure = ppo_train.measure

            def crash_at_the_second(*args, calls=calls, measure=measure):
                calls.append(1)
                if len(calls) == 2:
                    raise Crash
                return measure(*args)

            patch.setattr(ppo_train, "measure", crash_at_the_second)
            ppo("cut", "--keep", "best", *resumed)
    other = ppo("cut", "--resume")
    assert other.returncode == 2 and "another keep (best there, last now)" in other.stderr
    assert ppo("cut", "--keep", "best", "--resume").returncode == 0
    assert metrics(tmp_path / "alone") == metrics(tmp_path / "cut")
    assert same(weights(tmp_path / "alone"), weights(tmp_path / "cut"))
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("alone", "cut")]
    assert runs[0]["kept"] == runs[1]["kept"] and runs[0]["metrics"] == runs[1]["metrics"]


def test_the_report_says_who_chose(ppo, trained, gold, call_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ppo("ppo", "--keep", "best").returncode == 0
    where = ["--sft-checkpoint", trained.sft, "--reward-checkpoint", gold[1]]
    where += ["--ppo-checkpoint", "ppo", "--max-new-tokens", "4", "--dtype", "fp32"]
    result = call_main("compare_outputs", where)
    assert result.returncode == 0, result.stderr
    assert (
        compare_outputs.CHOSEN
        in json.loads((tmp_path / "reports" / "compare.json").read_text())["notes"]
    )


def test_without_a_judge_it_is_refused(trained, tiny_data, call_main, tmp_path):
    where = ["--sft-checkpoint", trained.sft, "--reward-checkpoint", trained.reward]
    result = call_main("ppo_train", [*where, "--keep", "best", "--output-dir", tmp_path / "out"])
    assert result.returncode == 2
    assert result.stderr.startswith("error: --keep best needs a judge that PPO does not train ")
    assert result.stderr.count("\n") == 1
