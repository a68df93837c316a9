"""What a run takes of a card."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import rlhf.engine.card
from rlhf.engine.card import (
    CPU_ROWS,
    Asked,
    Rollouts,
    choose_rollouts,
    choose_tokens,
    deal,
    room_for_tensors,
    tokens_that_fit,
)
from rlhf.runs.errors import UserError

CARD = torch.device("cuda")


def plan(tokens: int) -> dict[str, float]:
    return {"base": 1000.0, "activations": float(tokens)}


def test_tokens_that_fit_by_hand():
    assert tokens_that_fit(plan, longest=10, room=1000 + 256 * 3) == 256 * 3
    assert tokens_that_fit(plan, longest=10, room=1000 + 256 * 4 - 1) == 256 * 3
    assert tokens_that_fit(plan, longest=10, room=1e9) == 8192
    assert tokens_that_fit(plan, longest=300, room=1100) == 300  # one text at least
    assert tokens_that_fit(plan, longest=900, room=1000 + 256 * 3) == 900


def test_room_is_what_others_and_the_fraction_leave():
    assert room_for_tensors(total=1000, free=1000, reserved=0, fraction=1.0) == 920
    # others hold 300
    assert room_for_tensors(total=1000, free=600, reserved=100, fraction=1.0) == 620
    assert room_for_tensors(total=1000, free=600, reserved=100, fraction=0.5) == 460


def test_a_card_without_a_number_is_the_current_one(monkeypatch):
    """Accelerate calls a single process's card "cuda"; its memory fraction goes by number."""
    asked = []

    def by_number(index):
        asked.append(torch.cuda._utils._get_device_index(index))
        return 0.5

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", by_number)
    assert (
        rlhf.engine.card.room_on_card(torch.device("cuda"))
        == rlhf.engine.card.room_on_card(torch.device("cuda:1"))
        == 460
    )
    assert asked == [3, 1]


@pytest.fixture
def card(monkeypatch):
    """A card with room for 1,024 tokens by `plan`."""
    monkeypatch.setattr(rlhf.engine.card, "room_on_card", lambda _: 1000.0 + 1024)
    return lambda asked, longest=10, before=None: choose_tokens(
        plan, asked, longest, CARD, before, "turn this"
    )


def test_what_is_chosen_on_a_card(card):
    assert card("auto") == (1024, "what this card holds by the plan")
    assert card(700) == (700, "as asked")


def test_the_least_of_all_processes_is_chosen(card, monkeypatch):
    monkeypatch.setattr(rlhf.engine.card, "least", lambda tokens: min(tokens, 512))
    assert card("auto")[0] == 512


def test_what_does_not_fit_is_refused_with_what_would(card):
    with pytest.raises(
        UserError, match="--micro-batch-tokens 1100 is more than this card holds.*: 1024 fit"
    ):
        card(1100)


def test_a_cpu_needs_no_plan():
    cpu = torch.device("cpu")
    assert choose_tokens(None, "auto", 10, cpu, None, "") == (1024, "as on any CPU")


def test_a_text_that_does_not_fit_is_refused_with_advice(card):
    with pytest.raises(UserError, match="one text of 1100 tokens takes .* for it: turn this$"):
        card("auto", longest=1100)


def test_a_resumed_run_keeps_its_micro_batches_unless_the_flag_says_otherwise(card):
    assert card("auto", before={"micro_batch_tokens": 512}) == (512, "as the run began")
    assert card(700, before={"micro_batch_tokens": 512}) == (700, "as asked")


def test_the_first_line_of_a_run():
    said = rlhf.engine.card.describe_start(
        torch.device("cpu"), 1024, 16, torch.bfloat16, "as on any CPU"
    )
    assert said == "CPU: micro-batches of 1,024 tokens (as on any CPU), 16 rows a step, bfloat16"


@pytest.mark.parametrize(
    ("set_before", "then"),
    [
        ({}, "expandable_segments:True None"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a"}, "a None"),
        ({"PYTORCH_ALLOC_CONF": "b"}, "None b"),
    ],
)
def test_memory_grows_in_pieces_unless_it_was_set_otherwise(set_before, then):
    env = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTORCH_")
    } | set_before
    code = (
        "import os, rlhf; print(*map(os.environ.get, ('PYTORCH_CUDA_ALLOC_CONF', "
        "'PYTORCH_ALLOC_CONF')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == then


# ---------------------------------------------------------------- rollouts


def rollout_plans(rollouts):
    """100 bytes stand; a row takes 10, a merged copy 2000, a token of a micro-batch one."""
    cache = 10.0 * rollouts.rows
    copy = 2000.0 * rollouts.merged
    of_moment = (
        (lambda tokens: cache + tokens) if rollouts.kept else (lambda tokens: max(cache, tokens))
    )
    return lambda tokens: {"base": 100.0, "merged": copy, "of the moment": float(of_moment(tokens))}


ALL = 100 + 2000 + 3584 + 640  # with everything


@pytest.mark.parametrize(
    ("room", "dealt"),
    [
        (100 + 640, Rollouts(64)),  # all rows, and nothing beside them
        (100 + 639, Rollouts(32)),  # two rollouts of as many
        (100 + 250, Rollouts(22)),  # three
        (100 + 9, Rollouts(1)),
        (100 + 2000 + 3583, Rollouts(64, kept=True)),  # a merged copy only beside 3,584 tokens
        (100 + 2000 + 3584, Rollouts(64, merged=True)),
        (ALL - 1, Rollouts(64, merged=True)),
        (ALL, Rollouts(64, merged=True, kept=True)),
    ],
)
def test_memory_is_dealt_in_order(room, dealt):
    assert deal(rollout_plans, Asked(), 64, 10, room) == dealt


def test_tokens_that_were_asked_for_come_before_what_makes_rollouts_fast():
    for tokens, weights, dealt in (
        (3585, "auto", Rollouts(64, merged=True)),
        (5000, "auto", Rollouts(64, kept=True)),
        (5000, "merged", Rollouts(64, merged=True)),
    ):
        asked = Asked(rollout_weights=weights, micro_batch_tokens=tokens)
        assert deal(rollout_plans, asked, 64, 10, ALL) == dealt


def test_rollouts_on_a_cpu_go_by_a_fixed_rule():
    cpu = torch.device("cpu")
    assert choose_rollouts(None, Asked(), 64, 10, cpu, None) == Rollouts(CPU_ROWS)
    merged = choose_rollouts(None, Asked(40, "merged"), 64, 10, cpu, None)
    assert merged == Rollouts(40, merged=True)


def chosen(asked, before=None):
    return choose_rollouts(rollout_plans, asked, 64, 10, CARD, before)


def test_rollouts_on_a_card(monkeypatch):
    monkeypatch.setattr(rlhf.engine.card, "room_on_card", lambda _: ALL)
    assert chosen(Asked()) == Rollouts(64, merged=True, kept=True)
    assert chosen(Asked(rollout_weights="base")) == Rollouts(64, kept=True)
    monkeypatch.setattr(rlhf.engine.card, "room_on_card", lambda _: 100.0 + 640)
    with pytest.raises(UserError, match="--rollout-weights merged: .* no room for a merged copy"):
        chosen(Asked(rollout_weights="merged"))


def test_a_resumed_run_keeps_its_rollouts_unless_flags_say_otherwise(monkeypatch):
    monkeypatch.setattr(rlhf.engine.card, "room_on_card", lambda _: 100.0 + 640)
    before = {
        "micro_batch_tokens": 512,
        "rollout_rows": 16,
        "rollout_weights": "merged",
        "rollouts_kept": True,
    }
    assert chosen(Asked(), before) == Rollouts(16, merged=True, kept=True)
    assert chosen(Asked(8, "base"), before) == Rollouts(8, kept=True)
    # of an earlier version
    assert chosen(Asked(), {"micro_batch_tokens": 512}) == Rollouts(64)
