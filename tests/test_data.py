"""Rows, sources, prompts and tokens: what the model is shown, spelled out."""

import csv
import gzip
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import BOS, EOS, PAD, read_demo, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AddedToken, AutoTokenizer

from reward_train import both_responses
from rlhf.data.files import has_rows
from rlhf.data.format import PromptFormat, TokenPair, tokenize_pairs, tokenize_prompt
from rlhf.data.rows import BadRow, Pair, parse_row
from rlhf.data.sources import load_pairs, load_splits
from rlhf.data.splits import fingerprint, half_of, in_test_split
from rlhf.data.template import template_ids
from rlhf.runs.errors import UserError
from sft_train import response_only


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


ONE = Pair((("user", "Hi"),), "Hello!", "Go away.")
THREE = Pair((("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye")), "See you.", "Good.")
SYSTEM = Pair((("system", "Be kind."), ("user", "Hi")), "Hello!", "Go away.")


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        (
            {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello!", "rejected": " Go away."},
            ONE,
        ),
        (
            {
                "prompt": "\n\nHuman: Hi\n\nAssistant: ",
                "chosen": "Hello! \n",
                "rejected": "\nGo away.",
            },
            ONE,
        ),
        ({"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}, ONE),
        (
            {
                "prompt": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant:",
                "response": " See you.",
                "chosen": " See you.",
                "rejected": " Good.",
            },
            THREE,
        ),
        (
            {
                "prompt": "Be kind.\n\nHuman: Hi\n\nAssistant:",
                "chosen": " Hello!",
                "rejected": " Go away.",
            },
            SYSTEM,
        ),
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant: See you.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant: Good.",
            },
            THREE,
        ),
        (
            {
                "prompt": None,
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Go away.",
            },
            ONE,
        ),
        (
            {
                "chosen": [user("Hi"), assistant("Hello!")],
                "rejected": [user("Hi"), assistant("Go away.")],
            },
            ONE,
        ),
        (
            {
                "prompt": [user("Hi")],
                "chosen": [assistant("Hello!")],
                "rejected": [assistant("Go away.")],
            },
            ONE,
        ),
        (
            {"prompt": "Hi", "chosen": [assistant("Hello!")], "rejected": [assistant("Go away.")]},
            ONE,
        ),
        # The question beside whole dialogues stands once.
        (
            {
                "prompt": "Hi",
                "chosen": [user("Hi"), assistant("Hello!")],
                "rejected": [user("Hi"), assistant("Go away.")],
            },
            ONE,
        ),
        (
            {
                "prompt": "Hi",
                "chosen": [user("Hi"), assistant("Hello!"), user("Bye"), assistant("See you.")],
                "rejected": [user("Hi"), assistant("Hello!"), user("Bye"), assistant("Good.")],
            },
            THREE,
        ),
        (
            {
                "prompt": "Hi",
                "chosen": [system("Be kind."), user("Hi"), assistant("Hello!")],
                "rejected": [system("Be kind."), user("Hi"), assistant("Go away.")],
            },
            SYSTEM,
        ),
        (
            {
                "prompt": [system("Be kind.")],
                "chosen": [user("Hi"), assistant("Hello!")],
                "rejected": [user("Hi"), assistant("Go away.")],
            },
            SYSTEM,
        ),
        (
            {
                "prompt": [user("Hi"), assistant("Hello!")],
                "chosen": [user("Bye"), assistant("See you.")],
                "rejected": [user("Bye"), assistant("Good.")],
            },
            THREE,
        ),
        (
            {
                "prompt": "Hi",
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Go away.",
            },
            ONE,
        ),
        (
            {
                "prompt": "",
                "chosen": "Human: Hi\n\nAssistant: Hello!",
                "rejected": "Human: Hi\n\nAssistant: Go away.",
            },
            ONE,
        ),
        (
            {
                "prompt": "Be kind.\n\nHuman: Hi\n\nAssistant:",
                "chosen": "Be kind.\n\nHuman: Hi\n\nAssistant: Hello!",
                "rejected": "Be kind.\n\nHuman: Hi\n\nAssistant: Go away.",
            },
            SYSTEM,
        ),
        ({"prompt": "Hi", "chosen": "Assistant: Hello!", "rejected": "Assistant: Go away."}, ONE),
        ({"prompt": [user("Hi")], "chosen": " Hello!", "rejected": "Go away."}, ONE),
        # Line ends of other systems, and a leading blank line that somebody's strip() took.
        (
            {
                "prompt": "\r\n\r\nHuman: Hi\r\n\r\nAssistant: Hello!"
                "\r\n\r\nHuman: Bye\r\n\r\nAssistant:",
                "chosen": " See you.\r\n",
                "rejected": " Good.",
            },
            THREE,
        ),
        (
            {"prompt": "\r\rHuman: Hi\r\rAssistant:", "chosen": "Hello!", "rejected": "Go away."},
            ONE,
        ),
        ({"prompt": "Human: Hi\n\nAssistant:", "chosen": "Hello!", "rejected": "Go away."}, ONE),
        (
            {
                "chosen": "Human: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant: See you.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant: Good.",
            },
            THREE,
        ),
        # What other tools write.
        (
            {"system": "Be kind.", "prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."},
            SYSTEM,
        ),
        (
            {
                "system": " Be kind.",
                "chosen": [system("Be kind."), user("Hi"), assistant("Hello!")],
                "rejected": [system("Be kind."), user("Hi"), assistant("Go away.")],
            },
            SYSTEM,
        ),
        ({"system": None, "prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}, ONE),
        (
            {
                "prompt": str([user("Hi")]),
                "chosen": str([assistant("Hello!")]),
                "rejected": json.dumps([assistant("Go away.")]),
            },
            ONE,
        ),
        (
            {
                "prompt": "Hi",
                "chosen": [
                    assistant([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}])
                ],
                "rejected": [assistant([{"type": "text", "text": "Go away.", "image": None}])],
            },
            ONE,
        ),
        (
            {
                "prompt": [system("Be kind."), user(" Hi ")],
                "chosen": [assistant("Hello!")],
                "rejected": [assistant("Go away.")],
            },
            SYSTEM,
        ),
        (
            {
                "chosen": [user("Hi"), assistant("Hello!"), user("Bye"), assistant("See you.")],
                "rejected": [user("Hi"), assistant("Hello!"), user("Bye"), assistant("Good.")],
            },
            THREE,
        ),
    ],
)
def test_every_accepted_shape_gives_the_pair(row, pair):
    assert parse_row(row) == pair


HI = "\n\nHuman: Hi\n\nAssistant:"
NO_BLANK_LINE = "'Human:' or 'Assistant:' without a blank line before it"


@pytest.mark.parametrize("label", [False, 0, 0.0, "0", "false", "False", "0.0"])
def test_a_label_says_that_an_answer_is_not_to_be_learned(label):
    row = {"prompt": "Hi", "completion": "Go away.", "label": label}
    assert parse_row(row, "prompt") == Pair((("user", "Hi"),), None, "Go away.")


@pytest.mark.parametrize("label", [True, 1, 1.0, "1", "true", "TRUE", None, ""])
def test_an_answer_is_learned_by_its_label_or_without_one(label):
    row = {"prompt": "Hi", "completion": "Hello!", "label": label}
    assert parse_row(row, "answer") == Pair((("user", "Hi"),), "Hello!")


def test_a_label_of_a_prompt_alone_means_nothing():
    row = {"prompt": "Hi", "label": "greeting"}
    assert parse_row(row, "prompt") == Pair((("user", "Hi"),))


def test_a_transcript_may_have_two_answers_in_a_row():
    """As some rows of rm-static do, and it says where each ends."""
    twice = "\n\nHuman: Hi\n\nAssistant: Well.\n\nAssistant:"
    pair = parse_row({"prompt": twice, "chosen": " a", "rejected": " b"})
    assert pair.turns == (("user", "Hi"), ("assistant", "Well."))


@pytest.mark.parametrize("spell", [json.dumps, str])
def test_a_single_message_that_became_text_is_read(spell):
    answers = {"chosen": spell(assistant("Hello!")), "rejected": spell(assistant("Go away."))}
    assert parse_row({"prompt": spell(user("Hi")), **answers}) == ONE


def test_an_answer_that_starts_with_a_name_is_one_unless_on_a_new_line():
    """rm-static has such answers, a slip of the pen; they follow "Assistant:" on its line."""
    assert (
        parse_row({"prompt": HI, "chosen": " Human: Yes.", "rejected": " No."}).chosen
        == "Human: Yes."
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": HI, "chosen": " a", "rejected": [assistant("b")]},
            "chosen and rejected have different types",
        ),
        ({"prompt": HI, "chosen": " a", "rejected": None}, "no rejected answer"),
        (
            {"prompt": [user("Hi"), system("Be brief."), user("Ho")], "completion": "a"},
            "system turn that is not the first",
        ),
        (
            {"prompt": [system("Be kind."), system("Be brief."), user("Ho")], "completion": "a"},
            "system turn that is not the first",
        ),
        (
            {"prompt": [user("Hi"), assistant("Sure:")], "chosen": "a", "rejected": "b"},
            "messages that end with the assistant's, before the answer",
        ),
        (
            {"chosen": [user("Hi"), assistant("a"), assistant("b")], "rejected": None},
            "messages that end with the assistant's, before the answer",
        ),
        ({"prompt": HI, "completion": "a", "label": "good"}, "label is neither true nor false"),
        ({"prompt": HI, "completion": "a", "label": -1}, "label is neither true nor false"),
        ({"prompt": HI, "completion": "a", "label": [0]}, "label is neither true nor false"),
        (
            {"prompt": r"\n\nHuman: Hi\n\nAssistant:", "chosen": " a", "rejected": " b"},
            r"line ends spelled out as '\n'",
        ),
        ({"prompt": 5, "chosen": " a", "rejected": " b"}, "messages are not a list"),
        ({"prompt": HI, "chosen": "  ", "rejected": " b"}, "blank answer"),
        ({"prompt": HI, "chosen": " a", "rejected": ""}, "blank answer"),
        ({"prompt": HI, "chosen": " a", "rejected": "a "}, "chosen and rejected are identical"),
        (
            {"prompt": HI, "chosen": " a\n\nHuman: b", "rejected": " b"},
            "chosen runs on into another turn",
        ),
        (
            {"prompt": HI, "chosen": " a\n\nAssistant: b", "rejected": " b"},
            "chosen runs on into another turn",
        ),
        (
            {"prompt": "\n\nHuman: Hi", "chosen": " a", "rejected": " b"},
            "prompt does not end with 'Assistant:'",
        ),
        (
            {"prompt": HI + " Well", "chosen": " a", "rejected": " b"},
            "prompt does not end with 'Assistant:'",
        ),
        (
            {"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi"},
            "transcript without 'Assistant:'",
        ),
        (
            {"chosen": HI + " a", "rejected": "\n\nHuman: Ho\n\nAssistant: b"},
            "transcripts differ before the last answer",
        ),
        (
            {"chosen": [user("Hi")], "rejected": [user("Hi")]},
            "answer does not end with an assistant message",
        ),
        ({"chosen": [], "rejected": []}, "answer does not end with an assistant message"),
        (
            {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Ho"), assistant("b")]},
            "dialogues differ before the last answer",
        ),
        ({"prompt": "Hi", "chosen": None, "rejected": None}, "no chosen answer"),
        ({"prompt": "Hi", "chosen": 1, "rejected": 2}, "messages are not a list"),
        (
            {"chosen": ["a"], "rejected": ["b"]},
            "message without a role of system, user or assistant",
        ),
        (
            {"chosen": [{"role": "tool", "content": "a"}], "rejected": [assistant("b")]},
            "message of a tool, or that calls one",
        ),
        ({"prompt": "Hi", "chosen": [assistant(None)], "rejected": [assistant("b")]}, "blank turn"),
        ({"prompt": "Hi", "chosen": [assistant(" ")], "rejected": [assistant("b")]}, "blank turn"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "blank turn"),
        ({"prompt": "\n\nHuman:\n\nAssistant:", "chosen": "a", "rejected": "b"}, "blank turn"),
        ({"prompt": "\n\nAssistant:", "chosen": "a", "rejected": "b"}, "no user turn"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "no user turn"),
        (
            {
                "prompt": [user("Hi\n\nAssistant: x")],
                "chosen": [assistant("a")],
                "rejected": [assistant("b")],
            },
            "turn that holds another turn",
        ),
        ({"prompt": "Human: Hi\nAssistant:", "chosen": "a", "rejected": "b"}, NO_BLANK_LINE),
        (
            {"prompt": "Go on:\nHuman: Hi\nAssistant:", "chosen": "a", "rejected": "b"},
            NO_BLANK_LINE,
        ),
        (
            {
                "prompt": "\n\nHuman: Hi\nAssistant: Ho\n\nHuman: x\n\nAssistant:",
                "chosen": "a",
                "rejected": "b",
            },
            NO_BLANK_LINE,
        ),
        (
            {"prompt": HI, "chosen": "\n\nHuman: a", "rejected": " b"},
            "transcript without 'Assistant:'",
        ),
        (
            {"prompt": HI, "chosen": " a\nHuman: b", "rejected": " b"},
            "chosen runs on into another turn",
        ),
        (
            {"prompt": HI, "chosen": "a", "rejected": "\r\n\r\nHuman: b"},
            "rejected starts with another turn",
        ),
        (
            {
                "prompt": "Ho",
                "chosen": [user("Hi"), assistant("a")],
                "rejected": [user("Hi"), assistant("b")],
            },
            "prompt is not how the dialogues start",
        ),
        (
            {
                "system": "Be kind.",
                "prompt": [system("Be rude."), user("Hi")],
                "chosen": "a",
                "rejected": "b",
            },
            "two different system texts",
        ),
        ({"system": 5, "prompt": HI, "chosen": "a", "rejected": "b"}, "system is not text"),
        (
            {"prompt": HI, "chosen": "a", "rejected": "b", None: ["c"]},
            "more cells than the header has columns",
        ),
        (
            {
                "prompt": "[{'role': 'user', 'content': 'Hi'}\n {'role'",
                "chosen": "a",
                "rejected": "b",
            },
            "a message list that became text and cannot be read back",
        ),
        (
            {
                "prompt": "Hi",
                "chosen": [assistant([{"type": "image", "url": "x"}])],
                "rejected": [assistant("b")],
            },
            "content with a part that is not text",
        ),
        (
            {
                "prompt": "Hi",
                "chosen": [assistant("a") | {"tool_calls": [{}]}],
                "rejected": [assistant("b")],
            },
            "message of a tool, or that calls one",
        ),
        (
            {
                "prompt": [user("Human: x")],
                "chosen": [assistant("a")],
                "rejected": [assistant("b")],
            },
            "turn that holds another turn",
        ),
    ],
)
def test_every_bad_row_says_why(row, reason):
    with pytest.raises(BadRow, match=f"^{re.escape(reason)}$"):
        parse_row(row)


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from([HI, " ", "\n\nHuman: x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content"]), inner, max_size=2)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    row=st.fixed_dictionaries(
        {"chosen": json_like, "rejected": json_like}, optional={"prompt": json_like}
    )
)
def test_any_row_is_a_pair_or_bad(row):
    try:
        pair = parse_row(row)
    except BadRow:
        return
    assert pair.chosen == pair.chosen.strip() != pair.rejected
    assert all(text == text.strip() != "" for _, text in pair.turns)


words = st.text("ab é字.:\n", min_size=1, max_size=12).map(str.strip).filter(bool)
dialogues = st.lists(words, min_size=3, max_size=7).filter(
    lambda texts: len(texts) % 2 and texts[-1] != texts[-2]
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    texts=dialogues,
    has_system=st.booleans(),
    shape=st.sampled_from(
        ["rm-static", "transcripts", "both", "messages", "split messages", "spelled", "parts"]
    ),
    line_end=st.sampled_from(["\n", "\r\n", "\r\r\n", "\r"]),
    stripped=st.booleans(),
    space=st.sampled_from([" ", "  ", ""]),
)
def test_a_dialogue_in_any_shape_is_the_same_turns_or_says_why_not(
    texts, has_system, shape, line_end, stripped, space
):
    *said, chosen, rejected = texts
    turns = [(("user", "assistant")[i % 2], text) for i, text in enumerate(said)]
    turns = [("system", "Be kind.")] * has_system + turns
    pair = Pair(tuple(turns), chosen, rejected)

    def typed(text):
        return text.replace("\n", line_end)

    def listed(*turns):
        texts = [(role, typed(text)) for role, text in turns]
        if shape == "parts":
            texts = [(role, [{"type": "text", "text": text}]) for role, text in texts]
        return [{"role": role, "content": text} for role, text in texts]

    cues = {"system": "", "user": "\n\nHuman:" + space, "assistant": "\n\nAssistant:" + space}
    start = "".join(cues[role] + text for role, text in turns) + "\n\nAssistant:"
    start = start.lstrip() if stripped else start
    answers = {"chosen": chosen, "rejected": rejected}
    if shape == "rm-static":
        row = {name: typed(space + text) for name, text in answers.items()} | {
            "prompt": typed(start)
        }
    elif shape in ("transcripts", "both"):
        row = {name: typed(start + space + text) for name, text in answers.items()}
        row |= {"prompt": typed(said[0])} if shape == "both" else {}
    elif shape == "messages":
        row = {name: listed(*turns, ("assistant", text)) for name, text in answers.items()} | {
            "prompt": typed(said[0])
        }
    else:
        row = {name: listed(("assistant", text)) for name, text in answers.items()} | {
            "prompt": listed(*turns)
        }
    if shape == "spelled":
        row = {name: str(cell) for name, cell in row.items()}
    try:
        assert parse_row(row) == pair
    except BadRow as reason:  # a text that starts as a system's does not look like a whole dialogue
        assert shape == "both" and has_system, reason


# ---------------------------------------------------------------- sources

ROWS = [
    {
        "prompt": f"\n\nHuman: Question {n}, “é”?\n\nAssistant:",
        "chosen": f" Yes,\n{n}.",
        "rejected": " No.",
    }
    for n in range(3)
]
PAIRS = [Pair((("user", f"Question {n}, “é”?"),), f"Yes,\n{n}.", "No.") for n in range(3)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("place", ["{}", "data/{}"])
def test_a_folder_of_every_format_gives_the_same_pairs(tmp_path, suffix, place):
    write(tmp_path / place.format(f"train{suffix}"), ROWS[:2])
    write(tmp_path / place.format(f"test{suffix}"), ROWS[2:])
    assert load_pairs(str(tmp_path), "train") == PAIRS[:2]
    assert load_pairs(str(tmp_path), "test") == PAIRS[2:]
    assert load_pairs(str(tmp_path), "train", 1) == PAIRS[:1]


def test_shards_are_read_in_order_and_validation_stands_for_test(tmp_path):
    write(tmp_path / "data" / "train-00001-of-00002.parquet", ROWS[1:2])
    write(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[:1])
    write(tmp_path / "data" / "validation.jsonl", ROWS[2:])
    assert load_pairs(str(tmp_path), "train") == PAIRS[:2]
    assert load_pairs(str(tmp_path), "test") == PAIRS[2:]


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    write(tmp_path / "test.csv", ROWS)
    (tmp_path / "test.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "test.csv").read_bytes())
    assert load_pairs(str(tmp_path), "test") == PAIRS


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_one_file_is_split_by_its_prompts(tmp_path, suffix):
    file = tmp_path / f"all{suffix}"
    rows = [
        {"prompt": f"\n\nHuman: {n // 2}\n\nAssistant:", "chosen": f"{n}", "rejected": "-1"}
        for n in range(800)
    ]
    write(file, rows)
    train = load_pairs(str(file), "train")
    test = load_pairs(str(file), "test")
    assert len(train) + len(test) == 800
    assert 20 <= len(test) <= 60  # a twentieth is 40
    assert not {pair.turns for pair in train} & {pair.turns for pair in test}
    write(file, rows[::-1])  # the order of the rows changes nothing
    assert set(load_pairs(str(file), "test")) == set(test)


def test_dialogues_with_one_opening_are_in_one_split(tmp_path):
    opening = [f"\n\nHuman: {n}\n\nAssistant:" for n in range(300)]
    rows = [
        {"prompt": o + tail, "chosen": "a", "rejected": "b"}
        for o in opening
        for tail in ("", " x\n\nHuman: y\n\nAssistant:")
    ]
    file = write_jsonl(tmp_path / "all.jsonl", rows)
    first = {
        split: {pair.turns[0] for pair in load_pairs(str(file), split)}
        for split in ("train", "test")
    }
    assert first["test"]
    assert not first["train"] & first["test"]


def test_halves_are_all_of_it_and_share_no_dialogue(tmp_path, capsys):
    rows = [
        {"prompt": f"\n\nHuman: {n}\n\nAssistant:{tail}", "chosen": "a", "rejected": "b"}
        for n in range(300)
        for tail in ("", " x\n\nHuman: y\n\nAssistant:")
    ]
    (tmp_path / "test.jsonl").touch()
    write_jsonl(tmp_path / "train.jsonl", rows)
    halves = {half: load_pairs(str(tmp_path), "train", half=half) for half in ("first", "second")}
    assert "train, first half: " in capsys.readouterr().out
    assert sorted(map(len, halves.values()))[0] >= 240  # of 600
    assert {half_of(pair) for pair in halves["first"]} == {"first"}
    assert [half_of(Pair((("user", text),), "a", "b")) for text in "0123"] == [
        "second",
        "second",
        "first",
        "first",
    ]
    both = load_pairs(str(tmp_path), "train")
    assert len(halves["first"]) + len(halves["second"]) == len(both) == 600
    assert set(halves["first"]) | set(halves["second"]) == set(both)
    first, second = ({pair.turns[0] for pair in pairs} for pairs in halves.values())
    assert not first & second
    assert load_pairs(str(tmp_path), "train", 5, "second") == halves["second"][:5]


def test_bad_rows_are_counted_by_reason(tmp_path, capsys):
    (tmp_path / "test.jsonl").touch()
    write_jsonl(
        tmp_path / "train.jsonl",
        [
            *ROWS,
            {**ROWS[0], "chosen": ""},
            {**ROWS[0], "rejected": " "},
            {**ROWS[0], "chosen": "No."},
        ],
    )
    assert load_pairs(str(tmp_path), "train") == PAIRS
    line = capsys.readouterr().out.strip()
    assert line == (
        f"{tmp_path}, train: 3 rows, dropped 3 (2 blank answer, 1 chosen and rejected are "
        "identical); read train.jsonl as prompt, chosen, rejected (text)"
    )


def test_the_line_says_what_was_read_and_what_was_not(tmp_path, capsys):
    chosen = [user("Hi"), assistant("Hello! <|im_end|>") | {"name": "bot", "weight": None}]
    row = {
        "prompt": "Hi",
        "chosen": chosen,
        "rejected": [user("Hi"), assistant("No.")],
        "score": 8,
        "empty": None,
    }
    (tmp_path / "test.jsonl").touch()
    write_jsonl(tmp_path / "train.jsonl", [row, row | {"tags": ["a"]}, *ROWS])
    write_jsonl(tmp_path / "train_old.jsonl", ROWS)
    load_pairs(str(tmp_path), "train")
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        f"{tmp_path}, train: 5 rows; read train.jsonl (not train_old.jsonl) as prompt, chosen, "
        "rejected (text and messages) or prompt, chosen, rejected (text); repeated rows: 1; "
        "ignored: score, name of messages, tags; looks like markup: <|im_end|> in 2 rows"
    )


def test_answers_that_repeat_the_question_are_pointed_out(tmp_path, capsys):
    row = {
        "prompt": "How are you today?",
        "chosen": "How are you today? Well.",
        "rejected": "How are you today? Bad.",
    }
    load_pairs(str(write_jsonl(tmp_path / "train.jsonl", [row]).parent), "train")
    assert (
        "looks like markup: answers that repeat the question in 1 rows" in capsys.readouterr().out
    )


def test_repeated_rows_are_counted_and_judge_nothing_twice(tmp_path, capsys):
    rows = [{"prompt": f"Q{i}?", "chosen": "a", "rejected": "b"} for i in (0, 1, 1, 0, 1)]
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    train, test = load_splits(str(tmp_path), "pair")
    assert len(train) == 5 and len(test) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "5 rows; " in said and "repeated rows: 3" in said
    assert "2 rows, dropped 3 (3 repeats an earlier row)" in said


def test_lists_of_texts_that_became_text_are_pointed_out(tmp_path, capsys):
    rows = [{"prompt": '["Why?"]', "chosen": "['Because.']", "rejected": "b"}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", rows)
    load_splits(str(tmp_path), "pair")
    assert "lists spelled out as text in 1 rows" in " ".join(capsys.readouterr().out.split())


def test_a_test_split_of_few_prompts_is_said_to_mean_little(tmp_path, capsys):
    rows = [{"prompt": f"Question {n}?", "chosen": "Yes.", "rejected": "No."} for n in range(20)]
    write_jsonl(tmp_path / "test.jsonl", rows[:19] + rows[:3])
    load_pairs(str(tmp_path), "test", 5)  # so many were asked for
    assert "too few" not in capsys.readouterr().out
    load_pairs(str(tmp_path), "test")
    assert "only 19 prompts, too few for figures that mean much" in capsys.readouterr().out
    write_jsonl(tmp_path / "test.jsonl", rows)
    load_pairs(str(tmp_path), "test")
    assert "too few" not in capsys.readouterr().out


def test_a_bad_row_of_one_file_is_counted_in_one_split(tmp_path, capsys):
    rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b" if n % 2 else ""} for n in range(400)]
    file = str(write_jsonl(tmp_path / "all.jsonl", rows))
    dropped = []
    for split in ("train", "test"):
        load_pairs(file, split)
        dropped.append(int(re.search(r"\((\d+) blank answer\)", capsys.readouterr().out)[1]))
    assert sum(dropped) == 200 and min(dropped) > 0


def test_a_file_too_small_to_split_says_so(tmp_path):
    question = next(
        f"Question {n}?"
        for n in range(99)
        if not in_test_split(Pair((("user", f"Question {n}?"),), "", ""))
    )
    rows = [{"prompt": question, "chosen": f"{n}", "rejected": "no"} for n in range(30)]
    file = str(write_jsonl(tmp_path / "one.jsonl", rows))
    assert len(load_pairs(file, "train")) == 30
    with pytest.raises(
        UserError, match="none of its 30 rows is in the test split; .* one first question in 20"
    ) as error:
        load_pairs(file, "test")
    assert "accepted are" not in str(error.value)


def test_of_twenty_rows_and_more_some_are_held_out(tmp_path):
    questions = [
        f"Q{n}?" for n in range(99) if not in_test_split(Pair((("user", f"Q{n}?"),), "", ""))
    ][:3]
    rows = [{"prompt": questions[n % 3], "chosen": f"{n}", "rejected": "no"} for n in range(21)]
    file = str(write_jsonl(tmp_path / "few.jsonl", rows))
    train, test = load_splits(file, "pair")
    assert (len(train), len(test)) == (14, 7)
    assert not {pair.turns for pair in train} & {pair.turns for pair in test}


def test_data_without_a_test_split_is_split_like_a_file(tmp_path, capsys, monkeypatch):
    rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(200)]
    folder = tmp_path / "folder"
    folder.mkdir()
    file = write_jsonl(tmp_path / "all.jsonl", rows)
    write_jsonl(folder / "train.jsonl", rows)
    splits = {"train": rows}
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda name: list(splits))
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: splits[split])
    train, test = load_splits(str(file), "pair")
    assert len(train) + len(test) == 200
    assert 3 <= len(test) <= 25
    assert "divided" not in capsys.readouterr().out
    for source, said in ((str(folder), "train.jsonl"), ("me/data", "split train")):
        assert load_splits(source, "pair") == (train, test)
        lines = capsys.readouterr().out.splitlines()
        assert all(f"read {said} (there is no test split: divided by" in line for line in lines[:2])
    write_jsonl(folder / "eval.jsonl", rows[:3])
    splits["validation"] = rows[:3]
    for source in (str(folder), "me/data"):
        train, test = load_splits(source, "pair")
        assert (len(train), len(test)) == (200, 3)


def test_a_test_split_of_another_name_is_not_passed_over(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "test_prefs.jsonl", ROWS)
    with pytest.raises(UserError, match="no test file .*it has test_prefs.jsonl"):
        load_pairs(str(tmp_path), "test")
    assert load_pairs(str(tmp_path), "train") == PAIRS
    splits = {"train": ROWS, "test_prefs": ROWS}
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda name: list(splits))
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: splits[split])
    with pytest.raises(UserError, match=r"me/data has no test split \(it has train, test_prefs\)"):
        load_pairs("me/data", "test")
    splits.clear()
    splits["other"] = ROWS
    with pytest.raises(UserError, match="me/data has no train split"):
        load_pairs("me/data", "test")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["train.jsonl", "train.csv"], ["train.jsonl", "train.csv", "keep one"]),
        (["train.jsonl", "data/train.jsonl"], ["train.jsonl, data/train.jsonl", "keep one"]),
        (["train.jsonl", "train-more.jsonl"], ["train.jsonl", "train-more.jsonl", "keep one"]),
        (
            ["train_prefs-00000-of-00001.jsonl", "train_sft.jsonl"],
            ["no train file", "train_prefs-", "train_sft.jsonl"],
        ),
        (
            ["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"],
            ["2 of 3 shards", "download it again"],
        ),
        (
            ["train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl"],
            ["train-00000-of-00001", "keep one"],
        ),
        (["train.txt"], ["no train file"]),
    ],
)
def test_a_folder_of_which_it_is_not_clear_what_to_read(tmp_path, files, says):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / file, ROWS)
    with pytest.raises(UserError) as error:
        load_pairs(str(tmp_path), "train")
    assert all(part in str(error.value) for part in says) and "\n" not in str(error.value)


def compressed(path, content):
    if path.suffix == ".gz":
        return gzip.compress(content)
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_compressed_files_are_read_whole_or_not_at_all(tmp_path, kind, suffix):
    write(tmp_path / f"plain{kind}", ROWS)
    file = tmp_path / f"train{kind}{suffix}"
    whole = compressed(file, (tmp_path / f"plain{kind}").read_bytes())
    file.write_bytes(whole)
    assert load_pairs(str(tmp_path), "train") == PAIRS
    assert has_rows(file)
    for broken in (whole[:-9], b"no such thing"):
        file.write_bytes(broken)
        with pytest.raises(UserError, match=rf"train\{kind}\{suffix} is damaged or cut off"):
            load_pairs(str(tmp_path), "train")


@pytest.mark.parametrize("name", ["train.JSONL", "train.Csv", "train.JSONL.GZ", "train.json.Zst"])
def test_capitals_in_a_suffix_mean_nothing(tmp_path, name):
    plain = tmp_path / f"plain{re.search(r'[.](jsonl|json|csv)', name.lower())[0]}"
    write(plain, ROWS)
    file = tmp_path / "data" / name
    file.parent.mkdir()
    content = plain.read_bytes()
    lower = file.with_name(name.lower())
    file.write_bytes(compressed(lower, content) if lower.suffix in (".gz", ".zst") else content)
    assert load_pairs(str(file.parent), "train") == PAIRS
    assert has_rows(file)


def test_a_row_a_line_in_a_json_file_is_named(tmp_path):
    write_jsonl(tmp_path / "train.json", ROWS)
    with pytest.raises(UserError, match=r"train.json holds more than one object: .*call it .jsonl"):
        load_pairs(str(tmp_path), "train")


def test_a_csv_with_two_columns_of_a_name(tmp_path):
    (tmp_path / "train.csv").write_text("prompt,chosen,chosen,rejected\na,b,c,d\n")
    with pytest.raises(UserError, match="more than one column 'chosen'"):
        load_pairs(str(tmp_path), "train")


def test_a_parquet_file_with_two_columns_of_a_name(tmp_path):
    columns = [pyarrow.array(["a"]) for _ in range(3)]
    table = pyarrow.Table.from_arrays(columns, names=["prompt", "chosen", "chosen"])
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(UserError, match="more than one column 'chosen'"):
        load_pairs(str(tmp_path), "train")


@pytest.mark.parametrize(("suffix", "text"), [(".jsonl", "{}\n"), (".json", "[{}]")])
def test_an_object_with_a_key_twice(tmp_path, suffix, text):
    row = '{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}'
    (tmp_path / f"train{suffix}").write_text(text.replace("{}", row))
    with pytest.raises(UserError, match="more than one 'chosen' in an object"):
        load_pairs(str(tmp_path), "train")


def test_a_csv_file_of_two_that_were_joined(tmp_path):
    (tmp_path / "train.csv").write_text("prompt,chosen,rejected\na,b,c\n" * 2)
    with pytest.raises(UserError, match="line 3 repeats the header"):
        load_pairs(str(tmp_path), "train")


@pytest.mark.parametrize("name", ["validation", "eval", "val", "dev"])
def test_other_names_of_the_test_split(tmp_path, name):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / f"{name}.jsonl", ROWS[:1])
    assert len(load_pairs(str(tmp_path), "test")) == 1


def test_fingerprint_tells_data_apart():
    assert fingerprint(PAIRS) == fingerprint(list(PAIRS))
    assert (
        len({fingerprint(PAIRS), fingerprint(PAIRS[::-1]), fingerprint(PAIRS[:2]), fingerprint([])})
        == 4
    )


# ---------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("turns", "text"),
    [
        (ONE.turns, "\n\nHuman: Hi\n\nAssistant:"),
        (THREE.turns, "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant:"),
        (SYSTEM.turns, "Be kind.\n\nHuman: Hi\n\nAssistant:"),
    ],
)
def test_hh_prompts_are_written_as_the_hh_data_are(form, turns, text):
    assert form.prompt_text(turns) == text
    ids = form.prompt_ids(turns)
    assert form.tokenizer.decode(ids) == BOS + text
    assert ids.count(form.tokenizer.bos_token_id) == 1


def test_a_response_starts_with_a_space_and_ends_with_eos(form):
    (pair,) = tokenize_pairs([ONE], form, 64, "train")
    assert pair.pair == ONE
    assert form.tokenizer.decode(pair.prompt_ids) == BOS + "\n\nHuman: Hi\n\nAssistant:"
    assert form.tokenizer.decode(pair.chosen_ids) == " Hello!" + EOS
    assert form.tokenizer.decode(pair.rejected_ids) == " Go away." + EOS
    assert form.eos_token_id == form.tokenizer.convert_tokens_to_ids(EOS) == pair.chosen_ids[-1]
    assert form.decode(pair.chosen_ids) == "Hello!"
    # Prompt and response tokenised apart are what the whole text gives: no token spans the two.
    assert (
        form.encode("\n\nHuman: Hi\n\nAssistant: Hello!")
        == pair.prompt_ids[1:] + pair.chosen_ids[:-1]
    )


def without_bos(tokenizer):
    from tokenizers.processors import ByteLevel

    tokenizer._tokenizer.post_processor = ByteLevel(trim_offsets=False)
    return tokenizer


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(
    "turns",
    [
        ONE.turns,
        THREE.turns,
        (*THREE.turns, ("assistant", "See\n\nyou."), ("user", "{{ bos_token }} ☂")),
        SYSTEM.turns,
        (("system", "Be kind."), *THREE.turns),
    ],
)
def test_the_saved_chat_template_gives_the_ids_of_training(tokenizer, tmp_path, turns, bos):
    form = PromptFormat("hh", tokenizer if bos else without_bos(tokenizer))
    form.tokenizer.save_pretrained(tmp_path / "saved")
    ids = form.prompt_ids(turns)
    assert ids.count(form.tokenizer.bos_token_id) == bos
    assert (ids[0] == form.tokenizer.bos_token_id) == bos
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    messages = [{"role": role, "content": text} for role, text in turns]
    assert saved.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids
    # With an answer the template goes on as training did, up to EOS.
    whole = saved.apply_chat_template([*messages, assistant("Sure, why not?")], return_dict=False)
    assert whole == ids + form.response_ids("Sure, why not?")


def test_the_checkpoints_tokenizer_is_the_one_of_training(trained, form):
    for folder in trained[:2]:
        saved = AutoTokenizer.from_pretrained(folder)
        assert saved.apply_chat_template(
            [user("Hi")], add_generation_prompt=True, return_dict=False
        ) == form.prompt_ids(ONE.turns)
        assert (saved.pad_token, saved.bos_token, saved.eos_token) == (PAD, BOS, EOS)


CHATML = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% "
    "endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_the_models_own_template_is_used_and_kept(tokenizer):
    tokenizer.chat_template = CHATML
    form = PromptFormat("model", tokenizer)
    ids = form.prompt_ids(THREE.turns)
    assert (
        tokenizer.decode(ids) == "<bos>[user]Hi<eos>[assistant]Hello!<eos>[user]Bye<eos>[assistant]"
    )
    assert ids.count(tokenizer.bos_token_id) == 1  # the template's; the tokenizer adds none on top
    assert ids.count(tokenizer.eos_token_id) == 3
    assert tokenizer.decode(form.response_ids("Hello!")) == "Hello!"
    assert form.stop_text is None
    assert tokenizer.chat_template == CHATML


def test_a_dialogue_that_the_models_template_refuses_is_dropped(tokenizer, capsys):
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        + CHATML
    )
    form = PromptFormat("model", tokenizer)
    pair = Pair((("system", "Be brief."), ("user", "Hi")), "b", "c")
    kept = tokenize_pairs([pair, ONE], form, 100, "train")
    assert [tokens.pair for tokens in kept] == [ONE]
    assert "1 the base's chat template refuses it (no system turn)" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_file_that_may_not_be_read(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"train{suffix}"
    path.write_text("")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr("pyarrow.parquet.ParquetFile", refuse)
    with pytest.raises(UserError, match=r"train\.\w+ .*Permission denied"):
        load_pairs(str(path), "train")


def test_special_tokens_in_the_data_are_plain_text(form):
    spelled = f"a{EOS} {PAD}{BOS} b"
    pair = Pair((("user", spelled),), f"{BOS} a", f"{PAD}")
    (tokens,) = tokenize_pairs([pair], form, 200, "train")
    special = {form.pad_token_id, form.eos_token_id, form.tokenizer.bos_token_id}
    assert form.tokenizer.bos_token_id == tokens.prompt_ids[0]
    assert not special & set(tokens.prompt_ids[1:])
    for ids in (tokens.chosen_ids, tokens.rejected_ids):
        assert ids[-1] == form.eos_token_id
        assert not special & set(ids[:-1])
    assert form.tokenizer.decode(tokens.prompt_ids[1:]) == f"\n\nHuman: {spelled}\n\nAssistant:"


def test_special_tokens_in_the_data_are_dropped_under_the_models_template(tokenizer, capsys):
    tokenizer.chat_template = CHATML
    pair = Pair((("user", f"a{EOS}"),), "b", "c")
    kept = tokenize_pairs([pair, ONE], PromptFormat("model", tokenizer), 100, "train")
    assert [tokens.pair for tokens in kept] == [ONE]
    assert "1 text that spells a special token" in capsys.readouterr().out


def test_a_role_header_in_the_data_is_dropped_under_the_models_template(tokenizer):
    """Special tokens other than BOS, EOS and padding, such as Llama 3's `<|start_header_id|>`."""
    tokenizer.add_tokens([AddedToken("<|head|>", special=True)], special_tokens=True)
    tokenizer.chat_template = CHATML
    pair = Pair((("user", "x<|head|>assistant"),), "b", "c")
    kept = tokenize_pairs([pair, ONE], PromptFormat("model", tokenizer), 100, "train")
    assert [tokens.pair for tokens in kept] == [ONE]


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') if strftime_now is defined }}\n" + CHATML
    form = PromptFormat("model", tokenizer)
    assert form.prompt_text(ONE.turns).startswith("26 Jul 2024\n")
    assert template_ids(tokenizer, ONE.turns) == form.prompt_ids(ONE.turns)
    # the template goes out with the model, and has the day of training
    again = PromptFormat("model", tokenizer)
    assert again.prompt_text(ONE.turns) == form.prompt_text(ONE.turns)
    assert tokenizer.chat_template.count("26 Jul 2024") == 1


@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40).map(str.strip).filter(bool)
)
def test_any_text_survives_the_tokens(form, text):
    prompt = form.prompt_ids((("user", text),))
    assert form.tokenizer.decode(prompt[1:]) == f"\n\nHuman: {text}\n\nAssistant:"
    assert form.tokenizer.decode(form.response_ids(text)) == f" {text}"


def test_half_a_surrogate_pair_in_a_row_stops_nothing(form, tmp_path):
    """JSON can spell "\\ud800", which is no text; a tokenizer cannot take it."""
    row = {"prompt": "Hi", "chosen": "a\ud800", "rejected": "b"}
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(ROWS[0])}\n")
    kept = tokenize_pairs(load_pairs(str(tmp_path), "train"), form, 200, "train")
    assert kept[-1].pair == PAIRS[0]


# ---------------------------------------------------------------- cutting


def test_a_long_prompt_loses_its_oldest_turns_whole(form):
    turns = (
        ("user", "one"),
        ("assistant", "two"),
        ("user", "three"),
        ("assistant", "four"),
        ("user", "five"),
    )
    whole, later, last = (form.prompt_ids(turns[start:]) for start in (0, 2, 4))
    assert tokenize_prompt(turns, form, len(whole)) == whole
    assert tokenize_prompt(turns, form, len(whole) - 1) == later
    assert (
        form.tokenizer.decode(later)
        == BOS + "\n\nHuman: three\n\nAssistant: four\n\nHuman: five\n\nAssistant:"
    )
    assert tokenize_prompt(turns, form, len(later) - 1) == last
    assert tokenize_prompt(turns, form, len(last)) == last
    with pytest.raises(BadRow, match="prompt too long"):
        tokenize_prompt(turns, form, len(last) - 1)


def test_the_system_text_survives_the_cut(form):
    turns = (("system", "Be kind."), ("user", "one"), ("assistant", "two"), ("user", "three"))
    cut = tokenize_prompt(turns, form, len(form.prompt_ids(turns)) - 1)
    assert form.tokenizer.decode(cut) == BOS + "Be kind.\n\nHuman: three\n\nAssistant:"


def test_a_pair_whose_last_turn_is_too_long_is_dropped(form, capsys):
    long = Pair((("user", "word " * 60),), "Yes.", "No.")
    assert [tokens.pair for tokens in tokenize_pairs([long, ONE], form, 50, "train")] == [ONE]
    assert capsys.readouterr().out.strip() == "train: 1 rows, dropped 1 (1 prompt too long)"
    with pytest.raises(UserError, match="no row of train fits into 50 tokens: raise --max-length"):
        tokenize_pairs([long], form, 50, "train")


def assert_cut(ids, whole, longest, form):
    """The start of `whole`, without EOS; below `longest`, as the reward model's EOS needs room."""
    assert ids == whole[: len(ids)]
    assert form.eos_token_id not in ids
    assert longest - 1 <= len(ids) <= longest


def test_a_long_response_is_cut_at_its_end_and_has_no_eos(form):
    chosen = "alpha beta gamma delta " * 10
    (tokens,) = tokenize_pairs([Pair(ONE.turns, chosen.strip(), "No.")], form, 64, "train")
    assert_cut(tokens.chosen_ids, form.response_ids(chosen), 32, form)
    assert tokens.rejected_ids == [*form.response_ids("No."), form.eos_token_id]


def test_the_longest_response_that_fits_keeps_its_eos(form):
    pair = Pair((("user", "x"),), "See you on the other side of the river, then.", "No.")
    answer = form.response_ids(pair.chosen)
    assert len(form.prompt_ids(pair.turns)) < len(answer)
    (fits,) = tokenize_pairs([pair], form, 2 * (len(answer) + 1), "train")
    assert fits.chosen_ids == [*answer, form.eos_token_id]
    (cut,) = tokenize_pairs([pair], form, 2 * (len(answer) + 1) - 1, "train")
    assert_cut(cut.chosen_ids, answer, len(answer), form)


def test_pairs_that_cutting_makes_identical_are_dropped(form, capsys):
    same = "the very same start of an answer, for many tokens on end, and then "
    pair = Pair(ONE.turns, same * 3 + "good", same * 3 + "bad")
    assert [tokens.pair for tokens in tokenize_pairs([pair, ONE], form, 64, "train")] == [ONE]
    said = capsys.readouterr().out
    assert (
        "1 identical after cutting" in said and "train: 2 of 4 responses cut to 31 tokens" in said
    )


@pytest.mark.parametrize("max_length", [48, 63, 64, 65, 200])
def test_nothing_that_a_trainer_gets_is_longer_than_max_length(form, tiny_data, max_length):
    pairs = tokenize_pairs(load_pairs(str(tiny_data), "train"), form, max_length, "train")
    assert (
        max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
        <= max_length
    )
    assert max(map(len, response_only(pairs)["input_ids"])) <= max_length
    rows = both_responses(pairs, form.eos_token_id)
    assert (
        max(len(ids) for name in ("chosen_ids", "rejected_ids") for ids in rows[name]) <= max_length
    )


# ---------------------------------------------------------------- what the trainers get


def test_sft_labels_hide_the_prompt_and_nothing_else():
    pairs = [TokenPair(ONE, [1, 5, 6], [7, 8, 2], [9, 2]), TokenPair(ONE, [1, 5], [7, 8], [9, 2])]
    assert response_only(pairs).to_list() == [
        {"input_ids": [1, 5, 6, 7, 8, 2], "labels": [-100, -100, -100, 7, 8, 2]},
        {"input_ids": [1, 5, 7, 8], "labels": [-100, -100, 7, 8]},
    ]


def test_the_sft_trainer_keeps_these_labels(form, tiny_data):
    """TRL's collator pads; it must neither hide EOS nor show the prompt."""
    from trl import SFTConfig
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    assert SFTConfig(output_dir="x", use_cpu=True, bf16=False).packing is False
    rows = response_only(
        tokenize_pairs(load_pairs(str(tiny_data), "train"), form, 256, "train")
    ).to_list()[:3]
    batch = DataCollatorForLanguageModeling(pad_token_id=form.pad_token_id)(rows)
    for row, labels in zip(rows, batch["labels"].tolist(), strict=True):
        assert labels == row["labels"] + [-100] * (len(labels) - len(row["labels"]))
        assert form.eos_token_id in labels


def test_reward_texts_are_both_closed_by_eos():
    pairs = [TokenPair(ONE, [1, 5, 6], [7, 8, 2], [9, 10, 11])]  # rejected was cut
    (row,) = both_responses(pairs, eos_token_id=2).to_list()
    assert row["chosen_ids"] == [1, 5, 6, 7, 8, 2]
    *rejected, eos = row["rejected_ids"]
    assert eos == 2
    assert rejected in ([1, 5, 6, 9, 10, 11], [1, 5, 6, 9, 10])


# ---------------------------------------------------------------- the demo's data


@pytest.mark.parametrize(("split", "least"), [("train", 240), ("test", 60)])
def test_the_demo_data_are_whole_and_length_says_nothing(split, least, capsys):
    from conftest import DEMO

    rows = read_demo(split)
    assert len(rows) >= least
    assert {tuple(row) for row in rows} == {("prompt", "response", "chosen", "rejected")}
    assert all(row["response"] == row["chosen"] for row in rows)
    assert (
        0.45 <= sum(len(row["chosen"]) > len(row["rejected"]) for row in rows) / len(rows) <= 0.55
    )
    assert len(load_pairs(str(DEMO), split)) == len(rows)
    assert "dropped" not in capsys.readouterr().out


def test_no_demo_prompt_is_in_both_splits():
    train, test = ({row["prompt"] for row in read_demo(split)} for split in ("train", "test"))
    assert not train & test
