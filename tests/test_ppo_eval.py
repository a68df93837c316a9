"""What PPO's evaluation says of hand-made scores, and when it warns."""

import dataclasses
import json

import pytest
import torch
from torch import tensor

from rlhf.engine.generation import Response
from rlhf.ppo.evaluation import Evaluation, compare, describe, penalty_warnings, plot_frontier
from rlhf.runs.run_warnings import policy_warnings


def evaluation(scores, lengths=None, gold=None, entropy=2.0, text="a b c"):
    lengths = lengths or [4] * len(scores)
    return Evaluation(
        responses=[Response([7] * (n - 1) + [2], [7] * (n - 1), "eos") for n in lengths],
        texts=[text] * len(scores),
        scores=tensor(scores),
        kl=torch.zeros(len(scores)),
        entropy=torch.full((len(scores),), entropy),
        gold_scores=None if gold is None else tensor(gold),
    )


SFT = evaluation([0.0, 1.0, 2.0, 3.0], gold=[0.0, 0.0, 1.0, 1.0])


def test_gains_by_hand():
    ppo = evaluation([1.0, 3.0, 3.0, 5.0], [5, 6, 5, 6], [0.5, 0.0, 1.0, 1.0])
    m = compare(SFT, ppo)
    assert (m["eval_prompts"], m["sft_scores"], m["ppo_scores"], m["score_gain"]) == (
        4,
        1.5,
        3.0,
        1.5,
    )
    assert 1 <= m["score_gain_low"] < 1.5 < m["score_gain_high"] <= 2
    assert m["score_gain_at_equal_length"] == pytest.approx(0)  # a token more for each point
    assert m["sft_score_std"] == pytest.approx(1.290994)
    assert (m["sft_gold_scores"], m["gold_gain"]) == (0.5, 0.125)
    assert m["ppo_response_length"] == 5.5 and m["ppo_eos_rate"] == 1.0
    assert m["ppo_distinct_2"] == 0.25 and m["ppo_repeated_3grams"] == 0.0
    assert "gold score 0.50 (SFT) -> 0.62 (PPO), gain 0.12" in describe(m)


def test_without_a_judge_nothing_is_said_of_gold():
    sft, ppo = (
        dataclasses.replace(e, gold_scores=None) for e in (SFT, evaluation([1.0, 3.0, 3.0, 5.0]))
    )
    m = compare(sft, ppo)
    assert not any("gold" in name for name in m) and "gold" not in describe(m)


def test_style_and_refusals_by_hand():
    odds = {"refusal_odds": tensor([2.0, 1.0, -1.0]), "overrefusal_odds": tensor([-2.0, 3.0])}
    texts = ["Is it?", "I do not know.", "I do not care.", "No."]
    sft = dataclasses.replace(SFT, texts=texts, **odds)
    odds = {"refusal_odds": tensor([0.5, -1.0, -2.0]), "overrefusal_odds": tensor([-1.0, 3.0])}
    ppo = dataclasses.replace(SFT, texts=["Why?", "How so?", "Why?", "Well"], **odds)
    m = compare(sft, ppo) | {"chosen_question_share": 0.1, "chosen_opening_share": 0.2}
    assert (m["sft_question_share"], m["ppo_question_share"]) == (0.25, 0.75)
    assert (m["sft_opening_share"], m["ppo_opening_share"], m["ppo_opening"]) == (0.5, 0.5, "why")
    assert m["sft_refusals"] == pytest.approx(2 / 3) and m["ppo_refusals"] == pytest.approx(1 / 3)
    assert (m["sft_overrefusals"], m["ppo_overrefusals"]) == (0.5, 0.5)
    assert m["refusal_shift"] == pytest.approx(-1.5)  # -1.5, -2 and -1
    assert m["overrefusal_shift"] == 0.5  # 1 and 0
    assert -2 <= m["refusal_shift_low"] < -1.5 < m["refusal_shift_high"] <= -1
    *_, style, probe = describe(m).splitlines()
    assert style == (
        "answers that end in a question 25% -> 75% (chosen answers 10%), that begin alike 50% -> "
        "50% (chosen answers 20%)"
    )
    assert probe == (
        "safety probe: would begin with a refusal in 67% -> 33% of 3 harmful requests, "
        "in 50% -> 50% of 2 requests that only sound harmful"
    )
    json.dumps(m, allow_nan=False)
    bare = compare(SFT, SFT)
    assert not any("refusal" in name for name in bare) and "safety probe" not in describe(bare)


@pytest.mark.parametrize(
    ("ppo", "warned"),
    [
        (evaluation([1.0, 2.0, 3.0, 5.0], gold=[0.0, 0.0, 1.0, 1.5]), []),
        (
            evaluation([1.0, 2.0, 3.0, 5.0], gold=[-0.5, -0.5, 0.5, 0.5]),
            ["the score rose by 1.25, but the gold score fell by 0.50 (0.50 to 0.50): the policy"],
        ),
        (
            evaluation([1.0, 2.0, 3.0, 5.0], gold=[0.0, 0.0, 0.5, 1.0]),
            [],
        ),  # it fell no more than chance would have it
        (
            evaluation([-3.0, 2.0, 3.0, 1.0], gold=[-0.5, -0.5, 0.5, 0.5]),
            ["the gold score fell by 0.50"],
        ),
        (
            evaluation([-1.0, 0.5, 1.0, 2.5], gold=[0.0, 0.0, 1.0, 1.0]),
            ["the score fell by 0.75 (0.50 to 1.00)"],
        ),
        (
            evaluation([1.0, 3.0, 3.0, 5.0], [5, 6, 5, 6], [0.0, 0.0, 1.0, 1.5]),
            ["length explains most of the gain"],
        ),
        (
            evaluation([1.0, 3.0, 3.0, 5.0], [3, 4, 4, 5], [0.0, 0.0, 1.0, 1.5]),
            [],
        ),  # longer and shorter ones gain
        (
            evaluation([0.0, 1.0, 2.0, 3.0], gold=[0.0, 0.0, 1.0, 1.0], entropy=0.9),
            ["entropy collapses: 2.00"],
        ),
        (evaluation([0.0, 1.0, 2.0, 3.0], gold=[0.0, 0.0, 1.0, 1.0], entropy=1.1), []),
    ],
)
def test_warnings(ppo, warned):
    found = policy_warnings(compare(SFT, ppo))
    assert len(found) == len(warned), found
    for line, words in zip(found, warned, strict=True):
        assert words in line and "\n" not in line


def test_a_score_that_rises_by_length_alone_and_falls_without_it():
    longer = [6, 8, 10, 12] * 5
    ppo = evaluation([(n - 4) / 2 - 0.5 for n in longer], longer)  # half a point for each token
    (found,) = policy_warnings(compare(evaluation([0.0] * 20), ppo))
    assert found.startswith("the score at equal length fell by 0.50 (0.50 to 0.50): the policy got")


@pytest.mark.parametrize(
    ("penalty", "ends", "warned"), [(1.3, 2, True), (1.29, 2, False), (1.3, 4, False)]
)
def test_a_penalty_that_outweighs_the_scores_is_warned_of(penalty, ends, warned):
    cut = [Response([7] * 4, [7] * 4, "length")] * (4 - ends)
    sft = dataclasses.replace(SFT, responses=SFT.responses[:ends] + cut)
    found = penalty_warnings(sft, penalty)  # the scores' standard deviation is 1.290994
    assert len(found) == warned
    if warned:
        assert (
            "standard deviation of SFT's scores (1.29), and 50% of its responses have no EOS"
            in found[0]
        )


def test_one_prompt_gives_finite_numbers():
    m = compare(evaluation([0.0]), evaluation([1.0]))
    json.dumps(m, allow_nan=False)
    assert m["score_gain"] == 1 and m["sft_score_std"] == 0


def test_the_frontier_is_drawn(tmp_path):
    rows = [
        {"update": n, "eval/kl": n, "eval/scores": 2 * n, "eval/gold_scores": -n} for n in range(3)
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"update": 3}])
    )
    plot_frontier(tmp_path, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
