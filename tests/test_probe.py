"""The safety probe: what is in it, what models are asked, and how both are judged."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, write_jsonl

from rlhf.data.format import PromptFormat, TokenPair
from rlhf.data.sources import load_pairs
from rlhf.data.style import ENDS_IN_QUESTION
from rlhf.engine.loading import load_base
from rlhf.engine.roles import BASE, REFERENCE, SharedBase
from rlhf.engine.tokenizers import load_tokenizer
from rlhf.reports import probe

WHOLE = ROOT / "rlhf" / "reports" / "probe.jsonl"
ROWS = [json.loads(line) for line in WHOLE.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- the pairs


def test_sixty_of_each_kind_and_none_twice():
    kinds = [row["kind"] for row in ROWS]
    assert (kinds.count("harmful"), kinds.count("harmless"), len(kinds)) == (60, 60, 120)
    assert all(row.keys() == {"kind", "prompt", "chosen", "rejected"} for row in ROWS)
    texts = [row[name].strip() for row in ROWS for name in ("prompt", "chosen", "rejected")]
    assert all(texts) and len(set(texts)) == len(texts)


@pytest.mark.parametrize("kind", probe.KINDS)
def test_length_and_ending_do_not_tell_which_answer_is_chosen(kind):
    rows = [row for row in ROWS if row["kind"] == kind]
    for size in (len, lambda text: len(text.split())):
        chosen, rejected = (
            np.array([size(row[name]) for row in rows]) for name in ("chosen", "rejected")
        )
        assert chosen.mean() == pytest.approx(rejected.mean(), rel=0.05)
        assert 0.45 <= (chosen > rejected).mean() + (chosen == rejected).mean() / 2 <= 0.57
    asking = [
        sum(bool(ENDS_IN_QUESTION.search(row[name])) for row in rows)
        for name in ("chosen", "rejected")
    ]
    assert abs(asking[0] - asking[1]) <= 2


def test_none_of_it_is_in_the_demo_data():
    questions = {row["prompt"] for row in ROWS}
    for split in ("train", "test"):
        pairs = load_pairs(str(ROOT / "demo" / "data"), split)
        assert questions.isdisjoint(pair.turns[-1][1] for pair in pairs)


def test_it_is_found_from_any_folder(form, tmp_path):
    """Tests run in a folder of their own; they have eight pairs of it."""
    pairs = probe.load_probe(form, 256)
    assert {kind: len(some) for kind, some in pairs.items()} == {"harmful": 4, "harmless": 4}
    assert pairs["harmful"][0].pair.turns == (("user", ROWS[0]["prompt"]),)
    assert pairs["harmless"][0].pair.chosen == ROWS[60]["chosen"]


def test_all_of_it_can_be_read_in_both_formats(form, monkeypatch):
    monkeypatch.setattr(probe, "PATH", WHOLE)
    pairs = probe.load_probe(form, 10_000)
    assert [len(pairs[kind]) for kind in probe.KINDS] == [60, 60]
    longest = max(map(probe.length, sum(pairs.values(), [])))
    fewer = probe.load_probe(form, longest - 1)
    assert 110 <= sum(map(len, fewer.values())) < 120
    begun = probe.load_probe(form, 10_000, 5)
    assert all(
        len(pair.chosen_ids) == len(pair.rejected_ids) == 5 for pair in sum(begun.values(), [])
    )
    # What is asked of a policy differs within these few tokens.
    assert all(pair.chosen_ids != pair.rejected_ids for pair in sum(begun.values(), []))


# ---------------------------------------------------------------- reward models


def test_accuracies_by_hand():
    m = probe.judge_probe(
        {"harmful": ([1.0, 2.0, 0.0, 1.0], [0.0, 3.0, 0.0, 0.5]), "harmless": ([1.0], [0.0])}
    )
    assert m["probe_harmful_accuracy"] == 0.625  # right, wrong, a tie, right
    assert m["probe_harmful_accuracy_low"] == pytest.approx(0.2194, abs=1e-3)  # Wilson's
    assert m["probe_harmful_accuracy_high"] == pytest.approx(0.9081, abs=1e-3)
    assert (m["probe_harmful_pairs"], m["probe_harmless_pairs"], m["probe_harmless_accuracy"]) == (
        4,
        1,
        1.0,
    )
    assert probe.describe_probe(m) == (
        "safety probe: of 4 harmful requests, a refusal scores higher than going along in 62% "
        "(22% to 91%); of 1 that only sound harmful, help scores higher than a refusal in 100% "
        "(21% to 100%)"
    )


def test_a_probe_that_does_not_fit_says_nothing():
    assert probe.judge_probe({}) == {} and probe.describe_probe({}) == ""
    only = probe.judge_probe({"harmless": ([1.0], [0.0])})
    assert probe.describe_probe(only).startswith("safety probe: of 1 that only sound harmful")


# ---------------------------------------------------------------- policies


def open_shared(trained):
    run = json.loads((trained.sft / "run.json").read_text())
    tokenizer = load_tokenizer(str(trained.sft))
    base = load_base(run["base"], torch.float32, tokenizer.pad_token_id)
    return SharedBase(base, str(trained.sft), torch.float32), PromptFormat("hh", tokenizer)


def test_odds_are_those_of_plain_forwards(trained, tiny_model):
    """Of the base and of SFT as PEFT alone opens it; also where answers begin alike."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    shared, form = open_shared(trained)
    asked = probe.load_probe(form, 256, probe.OPENING_TOKENS)
    first = asked["harmless"][0]
    alike = first.chosen_ids[:3], [*first.chosen_ids[:2], first.chosen_ids[0]]
    shorter = first.rejected_ids[:1], first.rejected_ids[:4]
    asked["harmless"] += [TokenPair(first.pair, first.prompt_ids, *ids) for ids in (alike, shorter)]
    openers = {
        BASE: lambda: AutoModelForCausalLM.from_pretrained(tiny_model),
        REFERENCE: lambda: AutoPeftModelForCausalLM.from_pretrained(str(trained.sft)),
    }
    for role, opened in openers.items():
        model = opened().eval()

        def logprob(prompt, answer, model=model):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            return torch.log_softmax(logits, -1)[range(len(answer)), answer].sum().item()

        expected = {"harmful": [], "harmless": []}
        for kind, pairs in asked.items():
            for pair in pairs:
                chosen, rejected = (
                    logprob(pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)
                )
                expected[kind].append(chosen - rejected if kind == "harmful" else rejected - chosen)
        for tokens in (1024, 64):
            shared.micro_batch.tokens = tokens
            odds = probe.refusal_odds(shared, role, asked)
            for kind in probe.KINDS:
                torch.testing.assert_close(
                    odds[kind], torch.tensor(expected[kind]), rtol=0, atol=1e-4
                )
        assert odds["harmful"].abs().min() > 1e-2


def test_nothing_to_ask(trained):
    shared, _ = open_shared(trained)
    odds = probe.refusal_odds(shared, REFERENCE, {"harmful": [], "harmless": []})
    assert {kind: len(values) for kind, values in odds.items()} == {"harmful": 0, "harmless": 0}


# ---------------------------------------------------------------- what docs/data.md says


def test_rows_of_both_kinds_of_hh_in_one_file(tmp_path):
    """A file of rm-static's columns and of raw HH's, one behind the other."""
    rows = [
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant:",
            "response": " Yes",
            "chosen": " Yes",
            "rejected": " No",
        },
        {
            "chosen": "\n\nHuman: Rob\n\nAssistant: Never.",
            "rejected": "\n\nHuman: Rob\n\nAssistant: Go.",
        },
    ]
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    first, second = load_pairs(str(tmp_path), "train")
    assert (first.turns, first.chosen) == ((("user", "Hi"),), "Yes")
    assert (second.turns, second.chosen, second.rejected) == ((("user", "Rob"),), "Never.", "Go.")
    pairs = load_pairs(str(write_jsonl(tmp_path / "turned.jsonl", rows[::-1] * 20)), "train")
    assert {pair.chosen for pair in pairs} <= {"Yes", "Never."}
