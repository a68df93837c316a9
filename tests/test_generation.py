"""Sampling: what is picked, where a response ends, and no effect of padding or batch mates."""

import copy
import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import rlhf.engine.generation
from rlhf.engine.base import base_facts
from rlhf.engine.decoding import sample_tokens
from rlhf.engine.generation import Response, _ended, _uniforms, generate
from rlhf.engine.loading import load_base
from rlhf.engine.roles import SharedBase

NEW = 16  # tokens
RAGGED = [
    "Hi",
    "What is the capital of France, and why?",
    "x",
    "Tell me of fruit flies.\n\nNow.",
    "Why?",
    "a b c d e f g h",
]


@pytest.fixture(scope="module")
def shared(trained, tiny_model):
    base = base_facts(str(tiny_model), None, load_in_4bit=False)
    return SharedBase(
        load_base(base, torch.float32, pad_token_id=0), str(trained.sft), torch.float32
    )


@pytest.fixture
def prompts(form):
    return [form.prompt_ids((("user", text),)) for text in RAGGED]


@pytest.fixture
def silent(form):
    """The tiny model's tokens are random and EOS rare: with neither end, length is full."""
    form.eos_token_id = -1
    form.stop_text = None
    return form


def sample(shared, form, prompts, temperature, seeds, batch_size, new=NEW, role="reference"):
    return [
        r.ids for r in generate(shared, role, form, prompts, new, temperature, seeds, batch_size)
    ]


def pick(logits, temperature, draws):
    return sample_tokens(logits, temperature, draws)[0]


# ---------------------------------------------------------------- the batch changes nothing


def test_a_size_that_ran_out_of_memory_is_not_tried_again(shared, silent, prompts, monkeypatch):
    prompts = prompts * 2
    seeds = range(12)
    failed = []
    alone = sample(shared, silent, prompts, 1.0, seeds, 6, new=4)
    start = rlhf.engine.generation.start

    def small_card(shared, role, prompts, *more):
        if len(prompts) > 2:
            failed.append(len(prompts))
            raise torch.OutOfMemoryError("out of memory")
        return start(shared, role, prompts, *more)

    monkeypatch.setattr(rlhf.engine.generation, "start", small_card)
    monkeypatch.setattr(shared, "rollout_rows", None)
    assert sample(shared, silent, prompts, 1.0, seeds, 6, new=4) == alone
    assert (failed, shared.rollout_rows) == ([6, 3], 2)


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_a_prompt_gets_the_same_response_alone_and_in_a_ragged_batch(
    shared, silent, prompts, temperature
):
    seeds = [7, 8, 9, 10, 11, 7]
    alone = [
        sample(shared, silent, [p], temperature, [s], 1)[0]
        for p, s in zip(prompts, seeds, strict=True)
    ]
    assert all(len(ids) == NEW for ids in alone)
    assert len(set(map(tuple, alone))) == len(alone)  # responses do depend on the prompt
    for batch_size in (6, 4, 1):
        assert sample(shared, silent, prompts, temperature, seeds, batch_size) == alone
    backwards = sample(shared, silent, prompts[::-1], temperature, seeds[::-1], 6)
    assert backwards == alone[::-1]


def test_what_the_padding_is_changes_nothing(shared, silent, prompts):
    before = sample(shared, silent, prompts, 1.0, range(6), 6)
    silent.pad_token_id = 77
    assert sample(shared, silent, prompts, 1.0, range(6), 6) == before


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_row_that_ends_leaves_the_others_as_they_were(shared, silent, prompts, temperature):
    """Some token of one row becomes EOS: each row is cut behind its first one, and else stays."""
    whole = sample(shared, silent, prompts, temperature, range(6), 6)
    silent.eos_token_id = eos = whole[0][4]
    expected = [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in whole]
    assert min(map(len, expected)) < NEW == max(map(len, expected))
    for batch_size in (6, 2):
        responses = generate(
            shared, "reference", silent, prompts, NEW, temperature, range(6), batch_size
        )
        assert [r.ids for r in responses] == expected
        assert [r.ended_by for r in responses] == [
            "eos" if ids[-1] == eos else "length" for ids in expected
        ]
        assert [r.text_ids for r in responses] == [
            ids[:-1] if ids[-1] == eos else ids for ids in expected
        ]


def test_the_seed_decides_the_draws(shared, silent, prompts):
    same = [prompts[0]] * 2
    first, second = sample(shared, silent, same, 1.0, [1, 2], 2)
    assert first != second
    assert sample(shared, silent, same, 1.0, [2, 1], 2) == [second, first]
    # A longer run starts with the shorter one: the draws do not depend on the length.
    assert sample(shared, silent, same, 1.0, [2, 1], 2, new=5) == [second[:5], first[:5]]


def test_greedy_is_what_transformers_generates(trained, tiny_model, shared, silent, prompts):
    """Against a model that PEFT opened, and a loop that is not ours."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), str(trained.sft)
    ).eval()
    model.generation_config.eos_token_id = None
    expected = []
    for ids in prompts:
        out = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW,
            pad_token_id=0,
        )
        expected.append(out[0, len(ids) :].tolist())
    assert sample(shared, silent, prompts, 0, [0] * 6, 6) == expected


def test_the_role_that_is_named_is_the_one_that_speaks(trained, tiny_model, silent, prompts):
    base = base_facts(str(tiny_model), None, load_in_4bit=False)
    shared = SharedBase(
        load_base(base, torch.float32, pad_token_id=0), str(trained.sft), torch.float32
    )
    reference = sample(shared, silent, prompts, 0, [0] * 6, 6)
    shared.add_role("policy", rank=4, alpha=8, num_layers=2)
    assert sample(shared, silent, prompts, 0, [0] * 6, 6, role="policy") == reference  # B = 0
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in shared.parameters("policy"):
            parameter.normal_()
    shared.restack()
    changed = sample(shared, silent, prompts, 0, [0] * 6, 6, role="policy")
    assert changed != reference
    assert sample(shared, silent, prompts[1:2], 0, [0], 1, role="policy") == changed[1:2]
    assert sample(shared, silent, prompts, 0, [0] * 6, 6) == reference


def test_no_prompts_no_responses(shared, form):
    assert generate(shared, "reference", form, [], NEW, 1.0, [], 4) == []


def test_a_response_of_one_token(shared, silent, prompts):
    assert [len(ids) for ids in sample(shared, silent, prompts, 1.0, range(6), 4, new=1)] == [1] * 6


# ---------------------------------------------------------------- pick


def test_pick_is_the_largest_logit_at_temperature_0():
    logits = torch.tensor([[0.0, 3.0, -1.0], [5.0, 3.0, 4.9], [-3.0, -2.0, -1.0]])
    assert pick(logits, 0, torch.tensor([0.99, 0.5, 0.0]).double()).tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("draw", "token"),
    [(0.0, 0), (0.19, 0), (0.21, 1), (0.49, 1), (0.51, 2), (0.99, 2), (math.nextafter(1, 0), 2)],
)
def test_pick_inverts_the_cdf(draw, token):
    logits = torch.tensor([0.2, 0.3, 0.5]).log()[None]
    assert pick(logits, 1.0, torch.tensor([draw], dtype=torch.float64)).tolist() == [token]


def test_pick_divides_by_the_temperature():
    logits = torch.tensor([[math.log(1.0), math.log(2.0)]])
    # At temperature 1/2 the odds are squared: 1/5 and 4/5. At 2 they are 1 : sqrt 2, 0.4142 and
    # 0.5858.
    for temperature, edge in ((1.0, 1 / 3), (0.5, 0.2), (2.0, 0.41421)):
        for draw, token in ((edge - 1e-3, 0), (edge + 1e-3, 1)):
            assert pick(
                logits, temperature, torch.tensor([draw], dtype=torch.float64)
            ).tolist() == [token]


def test_pick_gives_each_row_its_own_draw():
    logits = torch.zeros(4, 4)
    draws = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    assert pick(logits, 1.0, draws).tolist() == [0, 1, 2, 3]


def test_pick_never_takes_what_has_no_probability():
    no = -math.inf
    logits = torch.tensor([[no, 0.0, no, 0.0, no]])
    draws = [
        0.0,
        0.25,
        math.nextafter(0.5, 0),
        0.5,
        math.nextafter(0.5, 1),
        0.75,
        math.nextafter(1, 0),
    ]
    tokens = [pick(logits, 1.0, torch.tensor([draw], dtype=torch.float64)).item() for draw in draws]
    assert tokens == [1, 1, 1, 3, 3, 3, 3]
    # In float32 n times 1/n may stay below 1: the largest draw must not fall into the gap behind
    # the last.
    largest = torch.tensor([math.nextafter(1, 0)], dtype=torch.float64)
    for n in range(1, 65):
        assert pick(torch.tensor([[0.0] * n + [no]]), 1.0, largest).item() == n - 1


def test_picks_are_as_frequent_as_the_softmax_says():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -math.inf, 0.5])
    probabilities = torch.softmax(logits, -1)
    count = 2000
    tokens = pick(logits.expand(count, -1), 1.0, _uniforms(0, count))
    shares = tokens.bincount(minlength=6) / count
    sigma = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((shares - probabilities).abs() <= 4 * sigma).all()


def test_draws_come_from_the_seed_alone():
    torch.manual_seed(0)
    first = _uniforms(5, 8)
    torch.manual_seed(1)
    assert torch.equal(_uniforms(5, 8), first)
    assert torch.equal(_uniforms(5, 4), first[:4])
    assert not torch.equal(_uniforms(6, 8), first)
    assert ((first >= 0) & (first < 1)).all()


# ---------------------------------------------------------------- where a response ends


def end(ids, form, limit=1000) -> Response | None:
    """What `_ended` says at the first token at which it says anything, as `generate` asks it."""
    for n in range(1, len(ids) + 1):
        response = _ended(ids[:n], form, limit)
        if response:
            return response
    return None


def test_eos_ends_a_response_and_is_not_its_text(form):
    hello = form.encode(" Hello!")
    response = end([*hello, form.eos_token_id, *hello], form)
    assert response == Response([*hello, form.eos_token_id], hello, "eos")
    assert end([form.eos_token_id], form) == Response([form.eos_token_id], [], "eos")


def test_a_response_that_goes_on_is_not_ended(form):
    assert (
        end(form.encode(" Hello! Human: no\nHuman: neither\n\nAssistant: nor\n\nHumans"), form)
        is None
    )


def test_the_length_ends_a_response_that_keeps_all_its_tokens(form):
    ids = form.encode(" a long answer, and then some")
    response = end(ids, form, limit=5)
    assert response == Response(ids[:5], ids[:5], "length")


@pytest.mark.parametrize("text", [" Hello!", " Hi\n\nthere.", " é ☂ 字", " Human:", " a" * 40, ""])
def test_the_next_turn_ends_a_response_at_its_first_token(form, text):
    body = form.encode(text)
    cue = form.encode("\n\nHuman:")
    response = end([*body, *cue, *form.encode(" and more")], form)
    assert response == Response([*body, cue[0]], body, "stop_text")
    assert form.tokenizer.decode(response.text_ids) == text
    assert form.tokenizer.decode(response.ids[-1:]) == "\n"


def test_eos_right_before_the_next_turn_comes_first(form):
    ids = [*form.encode(" Hello!"), form.eos_token_id, *form.encode("\n\nHuman:")]
    assert end(ids, form).ended_by == "eos"


def test_the_next_turn_at_the_last_token_allowed_counts_as_such(form):
    ids = form.encode(" Hello!\n\nHuman:")
    assert end(ids, form, limit=len(ids)).ended_by == "stop_text"
    assert end(ids, form, limit=len(ids) - 1).ended_by == "length"


def test_more_blank_lines_before_the_next_turn_are_text(form):
    body = form.encode(" Hello!\n\n")
    response = end([*body, *form.encode("\n\nHuman:")], form)
    assert form.tokenizer.decode(response.text_ids) == " Hello!\n\n"


def test_of_a_token_that_spans_text_and_next_turn_the_text_keeps_its_part(form):
    """As with "!\\n\\n" in real vocabularies: that token ended the text, which ends with "!"."""
    from tokenizers import AddedToken

    form.tokenizer.add_tokens([AddedToken("!\n\n", normalized=False)])
    spanning = form.tokenizer.convert_tokens_to_ids("!\n\n")
    hello = form.encode(" Hello")
    ids = [*hello, spanning, *form.encode("Human:")]
    assert form.tokenizer.decode(ids) == " Hello!\n\nHuman:"
    response = end(ids, form)
    assert response == Response([*hello, spanning], [*hello, *form.encode("!")], "stop_text")
    assert form.tokenizer.decode(response.text_ids) == " Hello!"


def test_the_next_turn_spelled_in_single_bytes_is_seen(form):
    """The longest spelling there is, one token a byte, fits into the tail that is decoded."""
    cue = [form.tokenizer.convert_tokens_to_ids(c) for c in "ĊĊHuman:"]
    assert form.tokenizer.decode(cue) == "\n\nHuman:"
    assert len(cue) == 8
    body = form.encode(" Well.")
    assert end([*body, *cue], form) == Response([*body, cue[0]], body, "stop_text")


def test_half_a_character_before_the_next_turn(form):
    """A byte-level model may stop within a character; its replacement is text like any other."""
    body = form.encode(" é")[:-1]
    assert form.tokenizer.decode(body).endswith("\ufffd")
    response = end([*body, *form.encode("\n\nHuman:")], form)
    assert response.text_ids == body


def test_the_models_own_format_has_no_stop_text(form):
    other = copy.copy(form)
    other.stop_text = None
    assert end(form.encode(" Hello!\n\nHuman: x"), other) is None
