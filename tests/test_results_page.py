"""What docs/results.md says, from records made by hand."""

import json
import re
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))

import results
import results_page as page
import reward_ablation
import tables

from rlhf.runs.errors import UserError

REPORT = ROOT / "docs" / "results.json"


def answers(ppo, sft, ppo_tokens=(9, 9, 9, 9), ended=(True, True, True, True)):
    return {
        "PPO": {"score": ppo, "tokens": ppo_tokens, "ended": ended},
        "SFT": {"score": sft, "tokens": (9, 8, 7, 6), "ended": (True, True, True, False)},
    }


def rounded(value):
    """All numbers in it to nine digits."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def test_an_interval_is_of_the_difference_and_resamples_seeds_too():
    same = np.array([[1.0, 0.0, 1.0, 1.0]])
    found = tables.interval("accuracy", same, 1 - same)
    assert found["accuracy"] == 0.5 and found["accuracy_low"] < 0.5 < found["accuracy_high"]
    # pairs do not matter, the seed does: 0.2, 0.4 or 0.6
    constant = np.array([[0.2] * 4, [0.6] * 4])
    assert tables.interval("x", constant) == pytest.approx({"x": 0.4, "x_low": 0.2, "x_high": 0.6})


def test_wins_count_ties_half_and_both_must_have_ended():
    one = answers((1, 1, 1, 1), (0, 0, 0, 2))
    two = answers((1, 0, 0, 1), (0, 0, 0, 0), ended=(True, False, True, True))
    found = page.win_summary([one, two])
    assert (found["seeds"], found["prompts"], found["win_rate"]) == (2, 4, (3 + 2 + 2 * 0.5) / 8)
    assert found["both_ended"] == 5  # three of the first, prompts 0 and 2 of the second
    assert found["win_rate_where_both_ended"] == (3 + 1 + 0.5) / 5
    sure = answers((1, 1, 1, 2), (0, 0, 0, 0))
    lost = answers((0, 0, 0, 0), (1, 1, 1, 2))
    found = page.win_summary([sure, lost])  # the prompts are all alike, the seeds are not
    for key in ("win_rate", "at_equal_length"):
        assert (found[key], found[f"{key}_low"], found[f"{key}_high"]) == pytest.approx((0.5, 0, 1))


def test_few_runs_are_held_against_each_other_by_the_spread_of_all():
    apart = np.array([[0.2] * 4, [0.6] * 4])
    alike = np.array([[1.0] * 4, [1.0] * 4])
    # of a single run nothing is known
    spread = tables.deviations([apart, alike, np.array([[7.0] * 4])])
    assert spread == pytest.approx(
        np.array([[-(0.08**0.5)] * 4, [0.08**0.5] * 4, [0.0] * 4, [0.0] * 4])
    )
    # Two are drawn on each side, of -1, 1, 0 and 0 times 0.1414; their sum is 4 in 1 case of 256
    # and 3 in 8 more.
    found = tables.pooled_interval("x", alike, apart, spread)
    assert found == pytest.approx(
        {"x": 0.6, "x_low": 0.6 - 3 * 0.02**0.5, "x_high": 0.6 + 3 * 0.02**0.5}
    )
    # Of differences within runs, two are drawn once: both are the lowest in 1 case of 16.
    found = tables.paired_interval("x", alike - apart, spread)
    assert found == pytest.approx({"x": 0.6, "x_low": 0.6 - 0.08**0.5, "x_high": 0.6 + 0.08**0.5})
    # Prompts are drawn too: without any spread of runs a difference of 0 or 1 a prompt is 0 to 1.
    single = np.array([[0.0, 1.0]])
    assert tables.deviations([single]) == pytest.approx(np.zeros((1, 2)))
    found = tables.pooled_interval("x", single, 0 * single, tables.deviations([single]))
    assert found == pytest.approx({"x": 0.5, "x_low": 0.0, "x_high": 1.0})


def test_a_variant_is_held_against_the_baseline():
    def run(gains):
        keys = ("response_length", "eos_rate", "entropy")
        numbers = {
            f"{who}_{key}": value for who, value in (("sft", 0.5), ("ppo", 1.0)) for key in keys
        } | {"ppo_kl": 1.0}
        settings = {"total_episodes": 8, "max_eval_samples": 2}
        parts = {
            "gains": {"score": gains, "gold_score": gains},
            "explained_variance": [-gains[0], 9.0, 0.25],
        }
        return parts | {"metrics": numbers, "config": settings}

    records = {
        "ppo_baseline_0": run([1.0, 2.0]),
        "ppo_baseline_1": run([5.0, 6.0]),
        "ppo_no_kl_stop_1": run([4.0, 6.0]),
        "ppo_score_clip_1_0": run([13.0, 15.0]),
    }
    records["ppo_value_from_scratch_0"] = {"failed": "scores not finite"}
    records["ppo_scores_not_centred_0"] = run([0.0, 1.0])  # the baseline's third
    rows = page.ablation_summary(records)["variants"]
    assert rows["baseline"]["score_gains"] == [1.5, 5.5]
    assert rows["no_kl_stop"]["score_above_baseline"] == 2.5  # 5 less the mean of 1.5, 5.5 and 0.5
    assert rows["scores_not_centred"]["score_gains"] == [0.5]
    assert "score_above_baseline" not in rows["scores_not_centred"]
    assert rows["value_from_scratch"] == {"failed": ["scores not finite"], "seeds": 0}
    text = "\n".join(page.ablation_part(page.ablation_summary(records)))
    assert (
        "value_from_scratch (scores not finite)" in text and "| no_kl_stop | 5.00 | +2.50 (" in text
    )
    assert "| the SFT model |  |  |  |  | 0 | 0.5 | 50% | 0.50 |  |" in text
    assert "| 1.0 | 100% | 1.00 | -4.00, 0.25 |" in text  # no_kl_stop's
    assert (
        "Apart from the baseline in score: `score_clip_1` (+11.50); in gold score: "
        "`score_clip_1` (+11.50)." in text
    )


def test_a_reward_model_is_held_against_length_on_test_and_validation_pairs():
    def part(right, longer):
        keys = (
            "length_balanced_accuracy",
            "eval_loss",
            "calibration_error",
            "score_length_correlation",
        )
        return dict.fromkeys(keys, 0.5) | {
            "right": right,
            "longer": longer,
            "eval_pairs": len(right),
        }

    one = {"config": {"max_length": 256}, "pairs": 8, "seconds": 2.0}
    one |= {"test": part("2222", "2200"), "validation": part("2220", "0000")}
    records = {"reward_recipe_0": one, "reward_half_0": one}
    report = {"summary": page.summary(records), "records": records}
    assert page.headlines(report) == [
        "Reward models of half the pairs (8, one seed): accuracy 1.000 (1.000 to 1.000) on 4 test "
        "pairs, "
        '+0.500 (+0.000 to +1.000) above "the longer response wins", and 0.750 (0.250 to 1.000) on '
        "4 validation pairs, +0.750 (+0.250 to +1.000) above it."
    ]


def test_what_a_step_needs_comes_before_it_and_what_is_gone_is_made_again(tmp_path):
    config = results.Config(work=str(tmp_path), only="compare_1")
    every = [step.name for step in results.steps(config)]
    for step in results.steps(config):
        assert all(every.index(need) < every.index(step.name) for need in step.needs)
    shown = {step.name: step.command for step in results.steps(config)}
    names = [step.name for step in results.to_do(config, shown)]
    assert names == ["sft_1", "reward_1", "gold_1", "ppo_1", "compare_1"]
    (tmp_path / "records").mkdir()
    for step in results.steps(config):
        (tmp_path / step.folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "records" / f"{step.name}.json").write_text(
            json.dumps({"command": shown[step.name]})
        )
    assert results.to_do(config, shown) == []
    assert [step.name for step in results.to_do(config, shown | {"compare_1": "another"})] == [
        "compare_1"
    ]


@pytest.mark.parametrize(
    "changes, says",
    [({"only_report": True}, "no record in"), ({"only": "stf"}, "--only stf: no step's name")],
)
def test_a_report_of_nothing_is_not_written(tmp_path, changes, says):
    config = results.Config(work=str(tmp_path), output=str(tmp_path / "docs"), **changes)
    with pytest.raises(UserError, match=says):
        results.main(config)
    assert not (tmp_path / "docs").exists()


def test_a_step_run_again_for_its_folder_keeps_its_record(tmp_path):
    config = results.Config(work=str(tmp_path))
    step = results.Step("sft_0", "sft_0", 1, "-c pass", lambda folder: {"loss": 2.0})
    results.do(config, step, "the command")
    path = results.path_of(config, step)
    first = path.read_text()
    assert json.loads(first)["loss"] == 2.0
    results.do(config, replace(step, record=lambda folder: {"loss": 1.0}), "the command")
    assert path.read_text() == first
    results.do(config, replace(step, record=lambda folder: {"loss": 1.0}), "another")
    assert json.loads(path.read_text())["loss"] == 1.0


def test_steps_side_by_side_wait_for_those_they_need(monkeypatch):
    done = []
    config = results.Config(jobs=3)

    def do(_, step, shown):
        assert set(step.needs) <= set(done), step.name
        time.sleep(0.01)  # a step that does not wait begins meanwhile
        done.append(step.name)

    monkeypatch.setattr(results, "do", do)
    todo = results.steps(config)
    results.do_all(config, todo, {step.name: "" for step in todo})
    assert sorted(done) == sorted(step.name for step in todo)


@pytest.mark.parametrize("every", [40, pytest.param(1, marks=pytest.mark.slow)])
def test_the_page_is_made_of_any_part_of_the_records(monkeypatch, every):
    """What is committed is what the records say; with steps missing there is a page, too."""
    report = json.loads(REPORT.read_text())
    records = report["records"]
    assert rounded(page.summary(records)) == rounded(report["summary"])
    plots = [name for name in page.PICTURES if (ROOT / "docs" / name).exists()]
    assert page.markdown(report, plots) == (ROOT / "docs" / "results.md").read_text()
    names = list(records)
    monkeypatch.setattr(tables, "SAMPLES", 10)  # from here on only what there is matters
    parts = [*([name] for name in names), *(names[i:] for i in range(len(names)))]
    for left in parts[::every]:
        fewer = {name: record for name, record in records.items() if name not in left}
        text = page.markdown(report | {"records": fewer, "summary": page.summary(fewer)}, plots)
        assert "nan" not in re.findall(r"[a-z]+", text.split("## How it was made")[0])


def test_no_place_of_a_machine_is_shown():
    assert not re.search(r"[\" ]/(tmp|home|root|work|mnt|data)/", REPORT.read_text())
    config = results.Config(
        dataset="/home/me/rm-static", base_model="/home/me/m", work="/home/me/w"
    )
    assert results.public(config) == {
        "dataset": "path/to/rm-static",
        "base_model": "path/to/m",
        "work": "path/to/w",
    }


def test_a_chains_reward_model_is_scored_before_any_other(trained, tiny_data, tmp_path):
    """As `make results` begins the ablation in a fresh clone."""
    parents = {"sft_checkpoint": str(trained.sft), "reward_checkpoint": str(trained.reward)}
    sizes = {
        "validation_pairs": 3,
        "test_pairs": 5,
        "dataset": str(tiny_data),
        "work": str(tmp_path / "new" / "work"),
    }
    reward_ablation.main(reward_ablation.Config(variant="half", **parents, **sizes))
    record = json.loads((tmp_path / "new" / "work" / "half_0.json").read_text())
    assert (len(record["validation"]["right"]), len(record["test"]["right"])) == (3, 5)
    assert (
        record["pairs"]
        == json.loads((trained.reward / "run.json").read_text())["data"]["train_rows"]
    )
