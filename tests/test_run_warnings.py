"""Each warning provoked with numbers, absent where all is well, repeated by the next phase."""

import json
import shutil

import pytest
from conftest import ROOT, read_demo, write_jsonl

from rlhf.reports.probe import judge_probe
from rlhf.runs.run_warnings import (
    clip_warnings,
    compare_warnings,
    ppo_warnings,
    refusal_warnings,
    reward_warnings,
    said_before,
    sft_warnings,
    show,
    style_warnings,
)

SFT = {"eval_rows": 80, "eval_loss_before": 3.16, "eval_loss": 2.56}
REWARD = {
    "eval_pairs": 80,
    "eval_accuracy": 0.62,
    "eval_accuracy_low": 0.51,
    "eval_accuracy_high": 0.72,
    "length_balanced_accuracy": 0.61,
    "length_balanced_low": 0.501,
    "length_balanced_high": 0.71,
}
PPO = {
    "eval_prompts": 80,
    "score_gain": 0.88,
    "score_gain_low": 0.59,
    "score_gain_high": 1.17,
    "score_gain_at_equal_length": 0.8,
    "score_gain_at_equal_length_low": 0.5,
    "score_gain_at_equal_length_high": 1.1,
    "sft_entropy": 2.0,
    "ppo_entropy": 1.5,
    "sft_response_length": 29.0,
    "ppo_response_length": 30.0,
    "sft_question_share": 0.0375,
    "ppo_question_share": 0.0625,
    "chosen_question_share": 0.0375,
    "sft_opening_share": 0.025,
    "ppo_opening_share": 0.05,
    "chosen_opening_share": 0.025,
    "ppo_opening": "you can use",
}


def shift(name, middle, low, high):
    return {f"{name}_shift": middle, f"{name}_shift_low": low, f"{name}_shift_high": high}


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        ({}, []),
        (
            {"eval_loss": 3.17},
            ["the loss on the test rows rose, from 3.1600 to 3.1700 nats a token"],
        ),
        ({"eval_loss_before": None}, []),  # of a run whose log was lost
        ({"eval_rows": 49}, ["the figures are from only 49 test rows"]),
        ({"eval_rows": 50}, []),
    ],
)
def test_sft(change, warned):
    check(sft_warnings(SFT | change), warned)


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        ({}, []),
        (
            {"length_balanced_low": 0.5},
            [
                "its accuracy with longer and shorter winners weighted equally is 0.610, and its "
                "95 % interval, 0.500 to"
            ],
        ),
        (
            {"eval_accuracy_low": 0.4},
            [],
        ),  # where the longer ones lose; what counts is without length
        (  # all winners are the longer ones
            dict.fromkeys(
                ("length_balanced_accuracy", "length_balanced_low", "length_balanced_high")
            )
            | {"eval_accuracy_low": 0.49},
            [
                "its accuracy is 0.620, and its 95 % interval, 0.490 to 0.720, reaches 0.5: it may "
                "know nothing, and"
            ],
        ),
        ({"eval_pairs": 10}, ["the figures are from only 10 test pairs"]),
    ],
)
def test_reward_model(change, warned):
    check(reward_warnings(REWARD | change), warned)


def test_a_reward_model_that_prefers_compliance():
    def found(refused, helped):
        scores = {"harmful": ([1.0] * refused + [-1.0] * (60 - refused), [0.0] * 60)}
        scores["harmless"] = ([1.0] * helped + [-1.0] * (60 - helped), [0.0] * 60)
        return reward_warnings(REWARD | judge_probe(scores))

    check(found(31, 31), [])
    check(found(60, 60), [])
    check(  # Wilson's interval of 22 of 60 is 0.256 to 0.493
        found(22, 60),
        [
            "safety: of 60 harmful requests it prefers going along to refusing in 63% (95 % "
            "interval 51% to 74%), and"
        ],
    )
    check(
        found(30, 31), ["safety: of 60 harmful requests it prefers going along to refusing in 50%"]
    )
    check(
        found(60, 20),
        ["of 60 harmless requests that only sound harmful it prefers refusing to helping in 67%"],
    )


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        ({}, []),
        ({"gold_gain": -0.2, "gold_gain_low": -0.5, "gold_gain_high": 0.1}, []),
        (
            {"gold_gain": -0.2, "gold_gain_low": -0.35, "gold_gain_high": -0.05},
            [
                "the score rose by 0.88, but the gold score fell by 0.20 (0.05 to 0.35): the "
                "policy exploits"
            ],
        ),
        (
            {
                "score_gain_low": -0.1,
                "gold_gain": -0.2,
                "gold_gain_low": -0.35,
                "gold_gain_high": -0.05,
            },
            ["the gold score fell by 0.20 (0.05 to 0.35): the policy got worse"],
        ),
        (
            {
                "score_gain_at_equal_length": -0.3,
                "score_gain_at_equal_length_low": -0.5,
                "score_gain_at_equal_length_high": -0.1,
            },
            ["the score at equal length fell by 0.30 (0.10 to 0.50): the policy got worse"],
        ),
        ({"eval_prompts": 8}, ["the figures are from only 8 held-out prompts"]),
        ({"ppo_entropy": 0.9}, ["entropy collapses: 2.00 nats a token before, 0.90 now"]),
        (
            {"ppo_question_share": 0.2},
            [
                "4% of the answers ended in a question before, 20% do now (of the chosen answers "
                "4%); read"
            ],
        ),
        (
            shift("refusal", -0.9, -1.5, -0.3),
            ["safety: to harmful requests PPO is less likely to begin with a refusal"],
        ),
    ],
)
def test_ppo(change, warned):
    check(ppo_warnings(PPO | change), warned)


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        ({"ppo_question_share": 0.15}, []),  # 12 of 80 after 3: chance explains it
        (
            {"ppo_question_share": 0.2, "chosen_question_share": 0.25},
            [],
        ),  # people chose more of them
        (
            {"sft_question_share": 0.25, "ppo_question_share": 0.475},
            [],
        ),  # more, and no chance, but not double
        (
            {"ppo_opening_share": 0.3},
            ['2% of the answers began alike (now mostly "you can use") before, 30% do now'],
        ),
        (
            {"ppo_question_share": 0.2, "ppo_opening_share": 0.3},
            ["ended in a question", "began alike"],
        ),
        ({"eval_prompts": 20, "ppo_question_share": 0.2}, []),  # so few say nothing
    ],
)
def test_style(change, warned):
    check(style_warnings(PPO | change), warned)


def test_style_without_chosen_answers():
    """PPO's data may be prompts alone."""
    metrics = {name: value for name, value in PPO.items() if not name.startswith("chosen")}
    check(
        style_warnings(metrics | {"ppo_question_share": 0.2}),
        ["ended in a question before, 20% do now; read"],
    )


@pytest.mark.parametrize(
    ("shifts", "warned"),
    [
        ({}, []),  # nothing was asked
        (
            shift("refusal", -0.7, -1.2, -0.2),
            ["than SFT: its odds are 0.5 times as high (95 % interval 0.3 to 0.82)"],
        ),
        (shift("refusal", -0.6, -0.8, -0.4), []),  # surely, but by less than half
        (shift("refusal", -2.0, -4.5, 0.5), []),  # by much, but not surely
        (shift("refusal", 2.0, 1.0, 3.0), []),
        (
            shift("overrefusal", 0.7, 0.2, 1.2),
            ["PPO is more likely to begin with a refusal than SFT: its odds are 2 times"],
        ),
        (shift("overrefusal", -2.0, -3.0, -1.0), []),
        (shift("overrefusal", 900.0, 800.0, 1000.0), ["times as high"]),
    ],
)
def test_refusals(shifts, warned):
    check(refusal_warnings(shifts, "SFT", "PPO"), warned)


def test_comparison():
    check(
        compare_warnings(8),
        ["the figures are from only 8 prompts, too few to rely on: 50 is the least; ask more"],
    )
    check(compare_warnings(80), [])


def check(found, warned):
    assert len(found) == len(warned), found
    for line, words in zip(found, warned, strict=True):
        assert words in line and "\n" not in line


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_runs_of_docs_results_give_none(seed):
    records = json.loads((ROOT / "docs" / "results.json").read_text())["records"]
    sft, ppo = (records[f"{phase}_{seed}"]["metrics"] for phase in ("sft", "ppo"))
    assert sft_warnings(sft | {"eval_rows": 480}) == []
    for name in ("reward", "gold"):
        assert reward_warnings(records[f"{name}_{seed}"]["metrics"] | {"eval_pairs": 474}) == []
    style = {name: value for name, value in PPO.items() if "question" in name or "opening" in name}
    assert ppo_warnings(style | ppo) == []


def test_scores_that_are_mostly_clipped_are_said():
    assert clip_warnings([-5.1, 5.1] + [0.0] * 18, 5.0) == []  # a tenth
    (said,) = clip_warnings([-5.1, 5.1, 6.0] + [0.0] * 17, 5.0)
    assert said.startswith("15% of the scores of SFT's answers are more than --score-clip 5 from")
    assert clip_warnings([-5.0, 5.0], 5.0) == clip_warnings([-9e9, 9e9], float("inf")) == []


# ---------------------------------------------------------------- in one place, and again later


def test_what_was_said_before_is_safe_to_print(capsys):
    odd = "rose\n[bold]\x1b[31m\u202e"
    runs = {
        "sft": {"metrics": {"warnings": [odd, 3]}},
        "reward": {"metrics": {"eval_loss": 1.0}},  # of an earlier version
        "gold": {"metrics": None},
        "ppo": {"metrics": {"warnings": "no list"}},
    }
    found = said_before(runs | {"reward": runs["reward"] | {}})
    assert found == ["SFT: rose [bold]\ufffd[31m\ufffd", "SFT: 3"]
    show(found)
    assert capsys.readouterr().out == "warning: SFT: rose [bold]\ufffd[31m\ufffd\nwarning: SFT: 3\n"


def test_a_loss_that_rises_is_said_at_once_and_by_each_later_phase(
    call_main, flags, trained, tmp_path
):
    (tmp_path / "data").mkdir()
    zeds = [row | {"chosen": " z z z z"} for row in read_demo("train")[:24]]
    write_jsonl(tmp_path / "data" / "train.jsonl", zeds)
    write_jsonl(tmp_path / "data" / "test.jsonl", read_demo("test")[:8])
    data = ["--dataset", "data", "--learning-rate", "0.1", "--output-dir", "sft"]
    result = call_main("sft_train", [*flags["sft_train"], *data])
    assert result.returncode == 0, result.stderr
    *_, saved, few, rose, following = result.stdout.splitlines()
    assert saved.startswith("Saved sft") and following.startswith("Next: ")
    assert few.startswith("warning: the figures are from only 8 test rows")
    assert rose.startswith("warning: the loss on the test rows rose, from ")
    kept = json.loads((tmp_path / "sft" / "run.json").read_text())["metrics"]["warnings"]
    assert [f"warning: {text}" for text in kept] == [few, rose]

    again = f"warning: SFT: {kept[1]}"
    reward = call_main(
        "reward_train", [*flags["reward_train"], "--sft-checkpoint", "sft", "--dry-run"]
    )
    assert reward.returncode == 0 and again in reward.stdout.splitlines(), reward.stderr

    shutil.copytree(trained.reward, "reward")
    run = json.loads((tmp_path / "reward" / "run.json").read_text())
    assert run["metrics"]["warnings"][0].startswith("the figures are from only 8 test pairs")
    run["parents"]["sft"] = json.loads((tmp_path / "sft" / "run.json").read_text())[
        "adapter_sha256"
    ]
    (tmp_path / "reward" / "run.json").write_text(json.dumps(run))
    checkpoints = ["--sft-checkpoint", "sft", "--reward-checkpoint", "reward"]
    sizes = ["--role-layers", "2", "--max-prompt-length", "128", "--response-length", "8"]
    ppo = call_main("ppo_train", [*checkpoints, "--dataset", "data", *sizes, "--dry-run"])
    lines = ppo.stdout.splitlines()
    assert ppo.returncode == 0, ppo.stderr
    assert again in lines and f"warning: reward model: {run['metrics']['warnings'][0]}" in lines
