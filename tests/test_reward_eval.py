"""The numbers of evaluation.json against numbers worked by hand."""

import json
import shutil

import numpy as np
import pytest

from rlhf.reports.reward_evaluation import ScoredPairs, calibration, groups, judge
from rlhf.runs.run_warnings import reward_warnings


def scored(chosen, rejected, chosen_tokens, rejected_tokens, turns=None):
    arrays = [np.array(a, dtype=float) for a in (chosen, rejected, chosen_tokens, rejected_tokens)]
    return ScoredPairs(*arrays, np.array(turns or [1] * len(chosen)))


def test_four_pairs_by_hand():
    # right: 1, 0, a tie, 1; the chosen response is longer, shorter, alike, shorter
    m = judge(scored([1, 0, 2, 0], [0, 1, 2, -1], [10, 5, 8, 4], [5, 10, 8, 8], [1, 2, 2, 5]))
    assert m["eval_pairs"] == 4 and m["eval_accuracy"] == 0.625
    assert m["longer_wins_accuracy"] == 0.375 and m["above_longer_wins"] == 0.25
    # 1 where the longer one was chosen, 0 and 1 where it was not
    assert m["length_balanced_accuracy"] == 0.75
    assert m["eval_margin"] == 0.25
    assert m["eval_loss"] == pytest.approx((2 * 0.3132617 + 1.3132617 + 0.6931472) / 4)
    assert m["score_mean"] == 0.625
    assert [(g["group"], g["pairs"], g["accuracy"]) for g in m["by_length"]] == [
        ("shorter", 2, 0.5),  # half as long, both: the lower edge
        ("alike", 1, 0.5),
        ("twice or more", 1, 1.0),
    ]
    assert [(g["group"], g["pairs"], g["accuracy"]) for g in m["by_turns"]] == [
        ("1", 1, 1.0),
        ("2", 2, 0.25),
        ("4 or more", 1, 1.0),
    ]


def test_pairs_of_equal_length_are_in_neither_kind():
    # the third is right, and alike in length
    m = judge(scored([1, 0, 1], [0, 1, 0], [10, 5, 8], [5, 10, 8]))
    assert m["length_balanced_accuracy"] == 0.5


@pytest.mark.parametrize("shorter", (2, 3))
def test_a_few_lucky_pairs_of_one_kind_are_no_certainty(shorter):
    """A coin that happens to be right on all the shorter winners there are."""
    longer = 60 - shorter
    heads = [1, 0] * 30
    m = judge(
        scored(
            heads[:longer] + [1] * shorter,
            [1 - head for head in heads[:longer]] + [0] * shorter,
            [20] * longer + [10] * shorter,
            [10] * longer + [20] * shorter,
        )
    )
    assert m["length_balanced_accuracy"] == pytest.approx(0.75, abs=0.005)
    assert m["length_balanced_low"] < 0.5 < 0.75 < m["length_balanced_high"]
    assert any("it may know nothing but length" in line for line in reward_warnings(m))


def test_many_pairs_of_each_kind_have_a_narrow_interval():
    m = judge(scored([1] * 190 + [0] * 10, [0] * 190 + [1] * 10, [9, 5] * 100, [5, 9] * 100))
    assert m["length_balanced_accuracy"] == 0.95
    assert m["length_balanced_low"] == pytest.approx(0.91, abs=0.01)
    assert m["length_balanced_high"] == pytest.approx(0.975, abs=0.01)


def test_a_few_pairs_beside_length_are_no_certainty():
    """Longer wins nine times of ten. The model says so each time, and is right on the tenth too."""
    m = judge(scored([1] * 10, [0] * 10, [9] * 9 + [5], [5] * 9 + [9]))
    assert m["above_longer_wins"] == 0.1
    assert m["above_longer_wins_low"] < 0 < m["above_longer_wins_high"]
    same = judge(scored([1] * 9 + [0], [0] * 9 + [1], [9] * 9 + [5], [5] * 9 + [9]))
    assert same["above_longer_wins"] == 0
    assert same["above_longer_wins_low"] < 0 < same["above_longer_wins_high"]


def test_a_model_that_sees_length_alone():
    random = np.random.default_rng(0)
    tokens = random.integers(2, 100, (2, 300))
    tokens[1, :200] = tokens[0, :200] // 2  # the chosen response is mostly the longer one
    m = judge(scored(*(0.1 * tokens + 5), *tokens))
    assert m["eval_accuracy"] == m["longer_wins_accuracy"] > 0.7 and m["above_longer_wins"] == 0
    assert m["length_balanced_accuracy"] == 0.5
    assert m["score_length_correlation"] == pytest.approx(1) and m[
        "margin_length_correlation"
    ] == pytest.approx(1)


def test_calibration_knows_how_sure_a_model_should_be():
    # three in four times sure, and right three times in four
    margin = np.log(3) * np.array([1, 1, 1, -1] * 5)
    (only,) = calibration(margin)
    assert (only["pairs"], only["accuracy"]) == (20, 0.75) and only["confidence"] == pytest.approx(
        0.75
    )
    ones = [1] * 20
    assert judge(scored(margin, 0 * margin, ones, ones))["calibration_error"] == pytest.approx(0)
    assert judge(scored(abs(margin), 0 * margin, ones, ones))["calibration_error"] == pytest.approx(
        0.25
    )
    unsure, sure = calibration(np.array([0.1] * 20 + [9.0] * 20))
    assert unsure["confidence"] == pytest.approx(0.52498, abs=1e-5) and sure[
        "confidence"
    ] == pytest.approx(0.99988, abs=1e-4)


def test_groups_take_their_lower_edge_and_leave_out_empty_ones():
    edges = {"low": (0, 1), "empty": (1, 2), "high": (2, 9)}
    rows = groups(np.array([1.0, 0.0, 1.0]), np.array([0, 0.9, 2]), edges)
    assert [(row["group"], row["pairs"], row["accuracy"]) for row in rows] == [
        ("low", 2, 0.5),
        ("high", 1, 1.0),
    ]


def test_pairs_without_a_shorter_or_a_varying_one():
    m = judge(scored([1, 1], [0, 0], [3, 3], [2, 2]))
    assert m["length_balanced_accuracy"] is None and m["margin_length_correlation"] is None
    assert m["score_length_correlation"] == pytest.approx(1)
    json.dumps(m, allow_nan=False)


def test_eval_only_writes_what_training_wrote(trained, call_main, tmp_path):
    folder = tmp_path / "reward"
    shutil.copytree(trained.reward, folder)
    before = json.loads((folder / "evaluation.json").read_text())
    weights = (folder / "adapter_model.safetensors").read_bytes()
    run = (folder / "run.json").read_bytes()
    (folder / "evaluation.png").write_bytes(b"")
    argv = [*trained.reward_flags, "--output-dir", folder, "--eval-only"]
    refused = call_main("reward_train", argv)
    assert refused.returncode == 2 and "evaluation.json exists: add --overwrite" in refused.stderr
    result = call_main("reward_train", [*argv, "--overwrite"])
    assert result.returncode == 0 and "test pairs 8" in result.stdout
    after = json.loads((folder / "evaluation.json").read_text())
    assert after.keys() == before.keys() and after["by_turns"] == before["by_turns"]
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], abs=1e-5)
    assert (folder / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "adapter_model.safetensors").read_bytes() == weights and (
        folder / "run.json"
    ).read_bytes() == run
    assert not list(folder.glob("*.partial"))
