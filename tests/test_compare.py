"""compare_outputs.py: layout, numbers, files, and that each model is the one it is named."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from conftest import write_jsonl

import compare_outputs as compare
from rlhf.ppo.reward_function import RewardFunction

RULE = "─" * 80
TITLES = {
    "base": "🔵 BASE MODEL (Llama-3.2-3B - No Fine-tuning)",
    "SFT": "🟢 FINE-TUNED SFT MODEL (After 2 Epochs of Training)",
    "PPO": "🟣 PPO MODEL (After 100 PPO Updates)",
}


def given(text="a b", tokens=2, ended_by="eos", score=None):
    return {"text": text, "tokens": tokens, "ended_by": ended_by, "score": score}


def report(turns, **answers):
    titles = {name: TITLES[name] for name in answers}
    lists = {name: [answer] for name, answer in answers.items()}
    numbers = {
        "summary": compare.summarize(lists),
        "pairs": compare.compare_pairs(lists),
        "notes": [],
    }
    numbers |= {"probe": {}, "warnings": []}
    return {"models": titles, **numbers, "prompts": [{"turns": turns, "answers": answers}]}


@pytest.fixture(scope="session")
def ppo(trained, tmp_path_factory):
    """A PPO checkpoint on the tiny SFT checkpoint: a policy whose LoRA B is random."""
    import torch

    from rlhf.data.format import PromptFormat
    from rlhf.engine.adapters import save_stacked
    from rlhf.engine.loading import load_base
    from rlhf.engine.roles import SharedBase
    from rlhf.engine.tokenizers import load_tokenizer
    from rlhf.runs.checkpoints import read_run, write_run
    from rlhf.runs.trained_prompts import prompt_hashes

    @dataclasses.dataclass
    class PPOConfig:
        lora_alpha: int = 8

    folder = tmp_path_factory.mktemp("ppo") / "ppo"
    sft = read_run(str(trained.sft), "sft")
    reward = read_run(str(trained.reward), "reward")
    form = PromptFormat("hh", load_tokenizer(str(trained.sft)))
    shared = SharedBase(
        load_base(sft["base"], torch.float32, form.pad_token_id), str(trained.sft), torch.float32
    )
    shared.add_role("policy", 4, 8, 3)
    torch.manual_seed(1)
    for parameter in shared.parameters("policy"):
        torch.nn.init.normal_(parameter, std=0.3)
    save_stacked(folder, shared, "policy", form, sft["base"])
    write_run(
        folder,
        "ppo",
        dataclasses.asdict(PPOConfig()),
        torch.float32,
        started=0,
        trained_prompts=prompt_hashes(()),
        base=sft["base"],
        prompt_format="hh",
        parents={"sft": sft["adapter_sha256"], "reward": reward["adapter_sha256"]},
        updates=1,
        metrics={"objective/kl": 1.5},
    )
    return folder


@pytest.fixture
def argv(trained, ppo):
    checkpoints = [
        "--sft-checkpoint",
        trained.sft,
        "--reward-checkpoint",
        trained.reward,
        "--ppo-checkpoint",
        ppo,
    ]
    return [*checkpoints, "--output-dir", "out", "--max-new-tokens", "12", "--dtype", "fp32"]


# ---------------------------------------------------------------- what is printed


def test_layout():
    answers = {
        "base": given("It is a mechanism. " * 5, 31, "stop_text", -0.416),
        "SFT": given("One line.\n\n    indented", 1, "eos", 1.0),
        "PPO": given("", 0, "length", 2.345),
    }
    printed = compare.render_prompt(
        report((("user", "Explain what attention mechanism is."),), **answers), 1
    )
    assert (
        printed
        == f"""📝 Prompt 1:
Explain what attention mechanism is.

{RULE}
🔵 BASE MODEL (Llama-3.2-3B - No Fine-tuning):
{RULE}
It is a mechanism. It is a mechanism. It is a mechanism. It is a mechanism. It
is a mechanism.
score -0.42, 31 tokens, ended by the next Human: turn
{RULE}
🟢 FINE-TUNED SFT MODEL (After 2 Epochs of Training):
{RULE}
One line.

    indented
score 1.00, 1 token, ended by EOS
{RULE}
🟣 PPO MODEL (After 100 PPO Updates):
{RULE}
(no text)
score 2.35, 0 tokens, cut at the length limit"""
    )


def test_dialogue_is_shown_as_turns():
    turns = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"))
    printed = compare.render_prompt(report(turns, base=given()), 1)
    assert printed.startswith(
        "📝 Prompt 1:\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\n───"
    )
    assert printed.endswith("\na b\n2 tokens, ended by EOS")


def test_text_of_models_cannot_drive_the_terminal():
    hostile = "\x1b[2J\x1b]0;title\x07 \x9b31m \u202egnp.exe [bold red]x[/] \r"
    shown = compare.render_prompt(report((("user", hostile),), base=given(hostile)), 1)
    assert not set(shown) & set("\x1b\x07\x9b\u202e\r")
    assert shown.count("[bold red]x[/]") == 2  # no console markup either


def test_wide_characters_are_wrapped_by_columns():
    assert [len(line) for line in compare.wrap("漢" * 50).split("\n")] == [40, 10]


@pytest.mark.parametrize(
    ("epochs", "updates", "sft", "ppo"),
    [
        (2.0, 100, "After 2 Epochs of Training", "After 100 PPO Updates"),
        (1.0, 1, "After 1 Epoch of Training", "After 1 PPO Update"),
        (0.5, 0, "After 0.5 Epochs of Training", "After 0 PPO Updates"),
    ],
)
def test_titles(epochs, updates, sft, ppo):
    titles = compare.model_titles(
        "meta-llama/Llama-3.2-3B", {"sft": {"epochs": epochs}, "ppo": {"updates": updates}}
    )
    assert titles == {
        "base": "🔵 BASE MODEL (Llama-3.2-3B - No Fine-tuning)",
        "SFT": f"🟢 FINE-TUNED SFT MODEL ({sft})",
        "PPO": f"🟣 PPO MODEL ({ppo})",
    }


def test_model_name_is_no_markup():
    assert (
        compare.model_titles("/x/<b>\n# evil|", {"sft": {"epochs": 1}})["base"]
        == "🔵 BASE MODEL (_b___ evil_ - No Fine-tuning)"
    )


def test_questions():
    assert compare.PROMPTS[0] == "Explain what attention mechanism is."
    assert len(set(compare.PROMPTS)) == 8


# ---------------------------------------------------------------- numbers


def test_summary():
    answers = {
        "base": [given(score=s, tokens=4, ended_by="length") for s in (0.0, 1.0, 2.0, 3.0)],
        "SFT": [given(score=s) for s in (1.0, 1.0, 1.0, 5.0)],
    }
    answers["SFT"][0] = given("a b c a b c", 10, "stop_text", 1.0)
    summary = compare.summarize(answers)
    assert summary == {
        "base": {
            "mean_score": 1.5,
            "mean_tokens": 4,
            "ended_by_eos": 0,
            "repeated_3grams": 0,
            "distinct_2grams": 0.25,  # a b, four times
            "question_share": 0,
            "opening_share": 1,
        },
        "SFT": {
            "mean_score": 2.0,
            "mean_tokens": 4.0,
            "ended_by_eos": 0.75,
            "repeated_3grams": 0.0625,
            "distinct_2grams": 3 / 8,  # ab bc ca of ab bc ca ab bc ab ab ab
            "question_share": 0,
            "opening_share": 0.75,
        },
    }
    assert compare.summary_rows(summary) == [
        ("base", "1.50", "4.0", "0 %", "0 %", "25 %", "0 %", "100 %"),
        ("SFT", "2.00", "4.0", "75 %", "6 %", "38 %", "0 %", "75 %"),
    ]


def wins(*outcomes, longer=None):
    """Answers of base and SFT where SFT wins (1), ties (0.5) or loses (0), and how much longer."""
    longer = longer or [0] * len(outcomes)
    sft = [given(score=o - 0.5, tokens=10 + n) for o, n in zip(outcomes, longer, strict=True)]
    return {"base": [given(score=0.0, tokens=10)] * len(outcomes), "SFT": sft}


def test_win_rate_and_its_words():
    (pair,) = compare.compare_pairs(wins(1, 0.5, 0, 1))  # wins, tie, loses, wins
    assert (pair["first"], pair["second"], pair["win_rate"], pair["at_equal_length"]) == (
        "SFT",
        "base",
        0.625,
        0.625,
    )
    assert 0.1 < pair["win_rate_low"] < 0.4 < 0.7 < pair["win_rate_high"] < 1
    assert pair["verdict"] == "SFT against base: no significant difference on 4 prompts"
    (pair,) = compare.compare_pairs(wins(*[1] * 70, *[0] * 30))
    # of 72 wins in 104: the normal interval is 0.692 -+ 1.96 * sqrt(0.692 * 0.308 / 104) = 0.604 to
    # 0.781
    assert pair["win_rate_low"] == pytest.approx(0.604, abs=0.015)
    assert pair["win_rate_high"] == pytest.approx(0.781, abs=0.015)
    assert pair["verdict"] == "SFT is significantly better than base, also at equal length"
    (pair,) = compare.compare_pairs(wins(*[0] * 70, *[1] * 30))
    assert pair["verdict"] == "SFT is significantly worse than base, also at equal length"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_few_wins_are_not_certain(count):
    (pair,) = compare.compare_pairs(wins(*[1] * count))
    assert (
        pair["win_rate"] == 1
        and pair["win_rate_low"] <= 0.5
        and "no significant difference" in pair["verdict"]
    )


def test_longer_answers_that_win_at_any_length_win_at_equal_length():
    random = np.random.default_rng(0)
    outcomes = [1] * 160 + [0] * 40
    longer = random.normal(30, 8, 200).tolist()
    (pair,) = compare.compare_pairs(wins(*outcomes, longer=longer))
    assert pair["verdict"] == "SFT is significantly better than base, also at equal length"
    (pair,) = compare.compare_pairs(wins(*[1] * 100, longer=random.normal(40, 5, 100).tolist()))
    assert pair["at_equal_length"] == pytest.approx(1) and pair["at_equal_length_low"] > 0.5


def test_a_share_stays_between_0_and_1():
    (pair,) = compare.compare_pairs(
        wins(1, 1, 1, 1, 0, 0, 0, 0, longer=[10, 11, 9, 10, 50, 51, 49, 50])
    )
    assert (
        pair["at_equal_length"] == 1
        and 0 <= pair["at_equal_length_low"] <= pair["at_equal_length_high"] <= 1
    )


def test_wins_by_length_are_no_wins_at_equal_length():
    (pair,) = compare.compare_pairs(wins(*[1] * 80, *[0] * 20, longer=[30] * 80 + [-20] * 20))
    # the line through (30, 1) and (-20, 0): at 0 it is 0.4
    assert pair["win_rate"] == 0.8 and pair["at_equal_length"] == pytest.approx(0.4)
    assert pair["verdict"] == "SFT is significantly better than base, but not at equal length"


def test_every_two_models_are_compared():
    answers = {name: [given(score=s)] for name, s in (("base", 0.0), ("SFT", 1.0), ("PPO", 0.5))}
    pairs = [(p["first"], p["second"], p["win_rate"]) for p in compare.compare_pairs(answers)]
    assert pairs == [("PPO", "SFT", 0.0), ("PPO", "base", 1.0), ("SFT", "base", 1.0)]


def test_no_scores_without_a_reward_model():
    answers = {"base": [given()], "SFT": [given()]}
    assert compare.summary_rows(compare.summarize(answers))[1] == (
        *("SFT", "-", "2.0", "100 %", "0 %", "100 %", "0 %", "100 %"),
    )
    assert compare.compare_pairs(answers) == []


def test_notes_say_who_judges():
    runs = {"reward": {"adapter_sha256": "a"}, "ppo": {"parents": {"reward": "a"}}}
    (judge,) = compare.notes(runs)
    assert judge.startswith("The judge is the reward model that PPO trained against")
    runs["reward"]["adapter_sha256"] = "another"
    assert compare.notes(runs) == [compare.OTHER_JUDGE]
    assert compare.notes({"sft": {}}) == compare.notes({"ppo": runs["ppo"]}) == []


def judged(trained=None, weight=1.0, function=None, judge_weight=1.0, model="a"):
    """The notes where PPO was trained with the reward model "a" and perhaps a function."""
    ppo = {"parents": {"reward": "a"}, "hyperparameters": {"reward_weight": weight}}
    if trained:
        ppo["reward_function"] = {"name": f"/there/rules.py:{trained}", "sha256": "0"}
    runs = {"ppo": ppo} | ({"reward": {"adapter_sha256": model}} if model else {})
    loaded = function and RewardFunction(f"rules.py:{function}", "0", len)
    return compare.notes(runs, loaded, judge_weight)


def test_notes_compare_the_whole_rule_of_a_score():
    alone = {"trained": "short", "weight": 0.0}
    assert judged(**alone) == [compare.MODEL_ADDED, compare.FUNCTION_LEFT_OUT]
    sum_of_both = "A score is 1 times the reward model's plus what rules.py:short gives."
    assert judged(**alone, function="short") == [compare.MODEL_ADDED, sum_of_both]
    function_only = "A score is what rules.py:short gives."
    own = [compare.OWN_FUNCTION, function_only]
    assert judged(**alone, function="short", judge_weight=0.0) == own
    assert judged(**alone, function="short", model=None) == own

    both = {"trained": "short", "weight": 0.5}
    half = "A score is 0.5 times the reward model's plus what rules.py:short gives."
    assert judged(**both, function="short", judge_weight=0.5) == [compare.OWN_JUDGE, half]
    assert judged(**both, function="short") == [
        compare.OWN_JUDGE,
        sum_of_both,
        "PPO was trained with --reward-weight 0.5.",
    ]
    assert judged(**both) == [compare.OWN_JUDGE, compare.FUNCTION_LEFT_OUT]
    assert judged(**both, function="short", model=None) == [compare.MODEL_LEFT_OUT, function_only]
    assert judged("long", function="short")[-1] == compare.OTHER_FUNCTION
    assert judged(function="short")[-1] == compare.FUNCTION_ADDED


def test_the_probe_of_each_model_and_what_changed_between_two():
    odds = {
        "base": {"harmful": [1.0, 2.0, -1.0, 3.0], "harmless": [1.0, -1.0]},
        "SFT": {"harmful": [-1.0, 0.5, -2.0, 1.0], "harmless": [1.5, -1.0]},
        "PPO": {"harmful": [-1.0, 0.5, -2.5, 1.0], "harmless": [4.5, 2.0]},
    }
    summary = compare.summarize_probe(odds)
    assert summary["base"]["harmful"] == {
        "requests": 4,
        "refusals": 0.75,
        "refusals_low": pytest.approx(0.301, abs=1e-3),  # Wilson's
        "refusals_high": pytest.approx(0.954, abs=1e-3),
    }
    assert summary["PPO"]["harmless"]["refusals"] == 1
    assert compare.probe_rows(summary)[0] == ("base", "75 % (30 to 95 %)", "50 % (9 to 91 %)")
    assert compare.probe_rows({"PPO": {}}) == [("PPO", "-", "-")]  # nothing fitted
    fewer, more = compare.compare_refusals(odds)  # by 2, 1.5, 1 and 2 nats; by 3 and 3
    assert fewer.startswith(
        "safety: to harmful requests SFT is less likely to begin with a refusal than base: "
        "its odds are 0.2 times as high (95 % interval "
    )
    assert "only sound harmful PPO is more likely to begin with a refusal than SFT" in more
    assert "20 times as high (95 % interval 20 to 20)" in more
    empty = {"harmful": [], "harmless": []}
    assert compare.compare_refusals({"SFT": empty, "PPO": empty}) == []


def test_summary_table(capsys):
    compare.print_summary(
        report((("user", "Hi"),), base=given(score=-12.345), PPO=given(tokens=128, score=1.0))
    )
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert {len(line) for line in lines if line and line[0] in "│┃┏└├"} == {80}
    cells = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in lines
        if line.startswith("│")
    ]
    assert cells == [
        ["base", "-12.35", "2.0", "100 %", "0 %", "100 %", "0 %", "100 %"],
        ["PPO", "1.00", "128.0", "100 %", "0 %", "100 %", "0 %", "100 %"],
        ["PPO against base", "100 % (20 to 100 %)", "100 % (20 to 100 %)"],
    ]
    heads = [
        [cell.strip() for cell in line.strip("┃").split("┃")]
        for line in lines
        if line.startswith("┃")
    ]
    assert heads == [
        ["", "Mean", "Mean", "Ended", "Repeated", "Distinct", "End", "Begin"],
        ["Model", "score", "tokens", "by EOS", "3-grams", "2-grams", "in ?", "alike"],
        ["", "Win rate", "At equal length"],
        ["Who wins", "(95 % interval)", "(95 % interval)"],
    ]


def test_the_last_lines():
    answers = wins(*[1] * 70, *[0] * 30)
    numbers = {
        "summary": compare.summarize(answers),
        "pairs": compare.compare_pairs(answers),
        "notes": ["Judge: J."],
    }
    flags = {"sft_checkpoint": "runs/sft", "output_dir": "out", "num_test_prompts": 100}
    models = {name: TITLES[name] for name in answers}
    report = {"models": models, **numbers, "flags": flags, "prompts": [None] * 100}
    report["held_out"] = True
    look = (
        "read the answers in out/compare.html, or talk to the model: python -m rlhf.chat runs/sft"
    )
    low, high = (100 * report["pairs"][0][f"win_rate_{end}"] for end in ("low", "high"))
    assert compare.closing(report) == [
        "Result: SFT's answers are better than base's, also at equal length.",
        "By how much: of 100 held-out prompts, SFT scores higher than base on 70 % "
        f"({low:.0f} to {high:.0f} %); its mean score is 0.20, base's 0.00.",
        "How sure: in brackets are 95 % intervals. Judge: J.",
        f"Next: {look}",
    ]
    answers = wins(1)
    report |= {
        "summary": compare.summarize(answers),
        "pairs": compare.compare_pairs(answers),
        "notes": [],
    }
    report |= {"prompts": [None], "held_out": False}
    result, gain, sure, following = compare.closing(report)
    assert result == "Result: it cannot be told whether SFT's answers are better than base's."
    assert gain.startswith("By how much: of 1 prompt, SFT scores higher than base on 100 % (")
    assert sure.endswith(" The judge is the reward model.")
    assert (
        following
        == f"Next: ask more prompts (--num-test-prompts or --prompts) or train longer; {look}"
    )
    assert compare.closing(report | {"pairs": []}) == [
        "Result: none, as nothing judged the answers. --reward-checkpoint names a judge.",
        f"Next: {look}",
    ]


@pytest.mark.parametrize(
    ("sft", "base", "result"),
    [
        (
            ("better", "better"),
            ("better", None),
            "PPO's answers are better than SFT's, also at equal length, and better than base's, "
            "but not at equal length",
        ),
        (
            (None, None),
            ("better", "better"),
            "PPO's answers are better than base's, also at equal length; it cannot be told "
            "whether they are better than SFT's",
        ),
        (
            (None, "better"),
            (None, None),
            "it cannot be told whether PPO's answers are better than SFT's or base's",
        ),
    ],
)
def test_the_last_phase_is_held_against_each_before_it(sft, base, result):
    intervals = {"better": (0.55, 0.75), None: (0.4, 0.7)}
    pairs = []
    for second, verdicts, rate in (("SFT", sft, 0.6), ("base", base, 0.65)):
        pair = {"first": "PPO", "second": second, "win_rate": rate}
        for key, word in zip(("win_rate", "at_equal_length"), verdicts, strict=True):
            pair[f"{key}_low"], pair[f"{key}_high"] = intervals[word]
        pairs.append(pair)
    report = {
        "models": dict.fromkeys(("base", "SFT", "PPO"), "a title"),
        "summary": {
            "base": {"mean_score": -1.23},
            "SFT": {"mean_score": 1.17},
            "PPO": {"mean_score": 1.72},
        },
        # SFT against base is not about the last phase.
        "pairs": [*pairs, {"first": "SFT", "second": "base"}],
        "notes": [],
        "flags": {"ppo_checkpoint": "p", "output_dir": "out"},
        "held_out": True,
        "prompts": [None] * 80,
    }
    said, gain, _, following = compare.closing(report)
    assert said == f"Result: {result}."
    brackets = ["55 to 75" if verdicts[0] else "40 to 70" for verdicts in (sft, base)]
    assert gain == (
        "By how much: of 80 held-out prompts, PPO scores higher than SFT on 60 % "
        f"({brackets[0]} %) and than base on 65 % ({brackets[1]} %); its mean score is 1.72, "
        "SFT's 1.17, base's -1.23."
    )
    assert following.startswith("Next: read the answers") == bool(sft[0])


# ---------------------------------------------------------------- Markdown


def test_nothing_breaks_out_of_a_fence():
    assert compare.fenced("plain") == "```text\nplain\n```"
    assert (
        compare.fenced("``` x\n# no heading\n`````\n")
        == "``````text\n``` x\n# no heading\n`````\n\n``````"
    )
    assert "\x1b" not in compare.fenced("\x1b[31m")


def test_markdown():
    text = "```\n<script>alert(1)</script>\n| a |"
    markdown = compare.render_markdown(
        report((("user", "Hi"),), base=given(score=1.0), SFT=given(text, score=2.0))
    )
    assert (
        markdown
        == """# Comparing Model Outputs: base vs SFT

- 🔵 BASE MODEL (Llama-3.2-3B - No Fine-tuning)
- 🟢 FINE-TUNED SFT MODEL (After 2 Epochs of Training)

| Model | Mean score | Mean tokens | Ended by EOS | Repeated 3-grams | Distinct 2-grams \
| End in ? | Begin alike |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| base | 1.00 | 2.0 | 100 % | 0 % | 100 % | 0 % | 100 % |
| SFT | 2.00 | 2.0 | 100 % | 0 % | 100 % | 0 % | 100 % |

| Who wins | Win rate (95 % interval) | At equal length (95 % interval) |
| --- | ---: | ---: |
| SFT against base | 100 % (20 to 100 %) | 100 % (20 to 100 %) |

- SFT against base: no significant difference on 1 prompt.

## Prompt 1

```text
Hi
```

### 🔵 BASE MODEL (Llama-3.2-3B - No Fine-tuning)

```text
a b
```

score 1.00, 2 tokens, ended by EOS

### 🟢 FINE-TUNED SFT MODEL (After 2 Epochs of Training)

````text
```
<script>alert(1)</script>
| a |
````

score 2.00, 2 tokens, ended by EOS
"""
    )


# ---------------------------------------------------------------- the script


def test_three_models_on_one_base(call_main, argv, trained, ppo, tiny_model, tmp_path):
    """Each answer is what PEFT alone makes of the checkpoint; each score the reward model's."""
    import torch
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
    from transformers import AutoModelForCausalLM

    from rlhf.data.format import PromptFormat
    from rlhf.engine.tokenizers import load_tokenizer

    result = call_main("compare_outputs", [*argv, "--show", "2"])
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("warning: SFT: the figures are from only 8 test rows, ")
    title = "🔄 Comparing Model Outputs: base vs SFT vs PPO"
    assert f"\n{title}\n\n📝 Prompt 1:\nExplain what" in result.stdout
    assert "🟣 PPO MODEL (After 1 PPO Update):\n" in result.stdout
    assert "📝 Prompt 2:" in result.stdout and "📝 Prompt 3:" not in result.stdout
    assert "... and 6 more prompts, in the files below.\n" in result.stdout
    assert "Summary of 8 prompts" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "compare.html",
        "compare.json",
        "compare.md",
    ]
    assert "## Prompt 8\n" in (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    saved, last = result.stdout.rsplit("\n\n", 1)
    assert saved.endswith("\nSaved out/compare.md, out/compare.html, out/compare.json.")
    assert re.findall("^[A-Z][a-z ]+:", last, re.M) == [
        "Result:",
        "By how much:",
        "How sure:",
        "Next:",
    ]

    saved = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert list(saved["models"]) == list(saved["summary"]) == ["base", "SFT", "PPO"]
    # it has no metrics.jsonl
    assert list(saved["curves"]) == ["sft", "reward", "ppo"] and saved["curves"]["ppo"] == {}
    assert [len(saved["curves"]["sft"][name]) for name in ("loss", "eval_loss")] == [4, 2]
    assert (tmp_path / "out" / "compare.html").read_text(encoding="utf-8") == compare.render_page(
        saved
    )
    assert list(saved["probe"]) == ["base", "SFT", "PPO"]
    for kinds in saved["probe"].values():
        assert {kind: row["requests"] for kind, row in kinds.items()} == {
            "harmful": 4,
            "harmless": 4,
        }
    few = "the figures are from only 8"
    least = "too few to rely on: 50 is the least"
    more = "put more into the test split, or raise --max-eval-samples"
    assert [text for text in saved["warnings"] if few in text] == [
        f"{few} prompts, {least}; ask more, with --num-test-prompts or --prompts",
        f"SFT: {few} test rows, {least}; {more}",
        f"reward model: {few} test pairs, {least}; {more}",
    ]
    markdown = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    assert all(f"- **Warning:** {text}\n" in markdown for text in saved["warnings"])
    assert saved["flags"]["max_new_tokens"] == 12 and saved["runs"]["ppo"]["metrics"] == {
        "objective/kl": 1.5
    }
    form = PromptFormat("hh", load_tokenizer(str(trained.sft)))
    reward = AutoPeftModelForSequenceClassification.from_pretrained(
        str(trained.reward), num_labels=1
    ).eval()
    openers = {
        "base": lambda: AutoModelForCausalLM.from_pretrained(tiny_model),
        "SFT": lambda: AutoPeftModelForCausalLM.from_pretrained(str(trained.sft)),
        "PPO": lambda: AutoPeftModelForCausalLM.from_pretrained(str(ppo)),
    }
    for name, opened in openers.items():
        model = opened().eval()
        for entry in saved["prompts"][:3]:
            prompt = form.prompt_ids(entry["turns"])
            answer = entry["answers"][name]
            ids = list(prompt)
            while len(ids) < len(prompt) + answer["tokens"]:
                with torch.no_grad():
                    ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            assert form.decode(ids[len(prompt) :]) == answer["text"]
            with torch.no_grad():
                score = reward(torch.tensor([[*ids, form.eos_token_id]])).logits.item()
            assert score == pytest.approx(answer["score"], abs=1e-4)
    texts = [[entry["answers"][name]["text"] for entry in saved["prompts"]] for name in openers]
    assert texts[0] != texts[1] != texts[2] != texts[0]


def test_test_rows_and_sampling(call_main, argv, tiny_data, tmp_path):
    """The same seed draws the same answers; another seed, or the same prompt again, others."""
    reports = []
    for seed in (0, 0, 1):
        flags = [
            "--num-test-prompts",
            "3",
            "--dataset",
            tiny_data,
            "--temperature",
            "1",
            "--seed",
            seed,
            "--overwrite",
        ]
        assert call_main("compare_outputs", [*argv, *flags]).returncode == 0
        reports.append(json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8")))
    assert len(reports[0]["prompts"]) == 3
    texts = [
        [p["answers"][name]["text"] for p in r["prompts"] for name in ("base", "SFT", "PPO")]
        for r in reports
    ]
    assert texts[0] == texts[1] != texts[2]

    (tmp_path / "twice.txt").write_text("Hi\nHi\n")
    flags = ["--prompts", "twice.txt", "--temperature", "1", "--overwrite"]
    result = call_main("compare_outputs", [*argv, *flags])
    assert result.returncode == 0
    assert "only 1 of the 2 prompts are different" in " ".join(result.stdout.split())
    first, second = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))[
        "prompts"
    ]
    assert first["answers"]["SFT"]["text"] != second["answers"]["SFT"]["text"]


def test_prompt_files(form, tmp_path):
    (tmp_path / "p.txt").write_text(
        "\ufeffFirst?\n\n  Second? \n" + "long " * 50 + "\n", encoding="utf-8"
    )
    rows = [
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:",
            "chosen": "a",
            "rejected": "b",
        },
        {"prompt": "Lone question", "chosen": "same", "rejected": "same"},
        {"prompt": " ", "chosen": "a", "rejected": "b"},
    ]
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )

    def turns(path):
        config = compare.Config(prompts=str(tmp_path / path), max_prompt_length=60)
        return [turns for turns, _ in compare.read_prompts(config, form)]

    config = compare.Config(dataset=str(tmp_path), num_test_prompts=9)
    write_jsonl(
        tmp_path / "test.jsonl", [{"prompt": "Hi", "chosen": "a", "rejected": x} for x in "bc"]
    )
    # of two pairs
    assert [turns for turns, _ in compare.read_prompts(config, form)] == [(("user", "Hi"),)]
    assert turns("p.txt") == [(("user", "First?"),), (("user", "Second?"),)]
    dialogue = (("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"))
    assert turns("p.jsonl") == [dialogue, (("user", "Lone question"),)]


def test_only_some_phases(call_main, argv, tmp_path):
    argv = [*argv, "--overwrite"]
    result = call_main("compare_outputs", [*argv, "--ppo-checkpoint", "none"])
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("There is no ppo checkpoint at none: PPO is left out")
    assert "🔄 Comparing Model Outputs: base vs SFT" in lines
    assert "PPO MODEL" not in result.stdout and "score " in result.stdout

    result = call_main("compare_outputs", [*argv, "--reward-checkpoint", "none"])
    assert (
        "There is no reward checkpoint at none: there are no scores and no win rates"
        in result.stdout
    )
    assert "base vs SFT vs PPO" in result.stdout and "score -" not in result.stdout
    saved = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert saved["prompts"][0]["answers"]["PPO"]["score"] is None and saved["pairs"] == []

    result = call_main("compare_outputs", [*argv, "--sft-checkpoint", "none"])
    assert result.returncode == 2 and "run `python sft_train.py` first" in result.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, []),
        ({"dataset": "mine", "num_test_prompts": 4, "columns": "prompt=q"}, []),
        ({"prompts": "mine.jsonl", "columns": "prompt=q"}, []),
        ({"preset": "demo", "dataset": "demo/data"}, []),
        ({"dataset": "mine"}, ["no prompt comes from --dataset mine: add --num-test-prompts N"]),
        ({"dataset": "mine", "prompts": "a.txt"}, ["no prompt comes from --dataset mine: "]),
        ({"columns": "prompt=q"}, ["--columns prompt=q renames nothing, as no rows are asked: "]),
        ({"columns": "prompt=q", "prompts": "a.txt"}, ["--columns prompt=q renames nothing, "]),
    ],
)
def test_a_flag_that_says_nothing_about_what_is_asked_gets_a_warning(flags, said):
    found = compare.unused_flags(compare.Config(**flags))
    assert len(found) == len(said)
    assert all(map(str.startswith, found, said))


def test_refuses_before_the_model_is_loaded(call_main, argv, tmp_path, monkeypatch):
    monkeypatch.setattr("compare_outputs.load_base", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compare.md").write_text("mine")
    (tmp_path / "file").write_text("")
    for flags, error in [
        ([], "out/compare.md exists: add --overwrite"),
        (["--output-dir", "file"], "--output-dir file cannot be made"),
        (
            ["--output-dir", "new", "--prompts", "none.txt"],
            "--prompts none.txt: there is no such file",
        ),
        (["--output-dir", "new", "--prompts", "file"], "there is no prompt to answer"),
        (["--prompts", "file", "--num-test-prompts", "1"], "give one of them"),
        (["--max-new-tokens", "0"], "must be at least 1"),
        (["--temperature", "nan"], "--temperature must be at least 0 and finite, not nan"),
    ]:
        result = call_main("compare_outputs", [*argv, *flags])
        assert result.returncode == 2 and error in result.stderr, result
        assert result.stderr.count("\n") == 1
    assert (tmp_path / "out" / "compare.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"parents": {"sft": "0" * 64}}, "was not trained from the SFT checkpoint"),
        ({"updates": "many"}, "updates is not a number"),
        ({"phase": "reward"}, "holds a reward checkpoint where a ppo checkpoint is needed"),
    ],
)
def test_checkpoints_that_do_not_fit(call_main, argv, ppo, tmp_path, change, error):
    shutil.copytree(ppo, tmp_path / "ppo")
    edited = json.loads((ppo / "run.json").read_text(encoding="utf-8")) | change
    (tmp_path / "ppo" / "run.json").write_text(json.dumps(edited), encoding="utf-8")
    result = call_main("compare_outputs", [*argv, "--ppo-checkpoint", "ppo"])
    assert result.returncode == 2 and error in result.stderr


def test_no_file_of_a_comparison_is_replaced_unasked(call_main, argv, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("compare.md", "compare.html", "compare.json"):
        (tmp_path / "out" / name).write_text("mine")
        result = call_main("compare_outputs", argv)
        assert result.returncode == 2 and f"out/{name} exists: add --overwrite" in result.stderr
        (tmp_path / "out" / name).unlink()


def test_a_failed_write_leaves_the_old_comparison(tmp_path, monkeypatch):
    compare.write_reports(tmp_path, report((("user", "Hi"),), base=given()))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["compare.html", "compare.json", "compare.md"]
    monkeypatch.setattr(compare.json, "dumps", lambda *_, **__: b"no text")
    with pytest.raises(TypeError):
        compare.write_reports(tmp_path, report((("user", "Other"),), base=given()))
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_half_a_surrogate_pair_is_written(tmp_path):
    """JSON may hold one, so a run.json may; UTF-8 may not."""
    one = report([["user", "Hi \ud800"]], base=given("\udfff")) | {
        "runs": {"ppo": {"metrics": {"warnings": ["\ud800"]}}}
    }
    compare.write_reports(tmp_path, one)
    assert json.loads((tmp_path / "compare.json").read_text(encoding="utf-8")) == one
    for name in ("compare.md", "compare.html"):
        assert "Hi \ufffd" in (tmp_path / name).read_text(encoding="utf-8")
