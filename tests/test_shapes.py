"""Rows as people have them: which shapes are read, and what each phase needs of a row."""

import csv
import json
import re
import shlex

import pytest
from conftest import read_demo, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import HI, assistant, json_like, system, user, write
from test_mistakes import assert_one_line
from test_pipeline import ppo_flags
from test_resume import Crash, at_call, check_same_run, crash

import ppo_train
import rlhf.engine.trainer
from rlhf.data.rows import BadRow, Pair, parse_row
from rlhf.data.sources import load_pairs, load_rows, load_splits
from rlhf.data.splits import fingerprint, first_turn_sha256, in_test_split
from rlhf.runs.errors import UserError

ONE = Pair((("user", "Hi"),), "Hello!")
THREE = Pair((("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye")), "See you.")
SYSTEM = Pair((("system", "Be kind."), ("user", "Hi")), "Hello!")
NEEDS = ("prompt", "answer", "pair")
PARENTS = {
    "sft_train": 0,
    "reward_train": 1,
}  # checkpoints that a script starts from; the others have two


SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}


def said(who, text):
    """A message of ShareGPT."""
    return {"from": who, "value": text}


# ---------------------------------------------------------------- shapes of rows

ANSWERED = {
    "prompt and chosen": ({"prompt": HI, "chosen": " Hello!"}, ONE),
    "a rejected answer that is null": ({"prompt": "Hi", "chosen": "Hello!", "rejected": None}, ONE),
    "TRL's prompt and completion": ({"prompt": "Hi", "completion": " Hello!"}, ONE),
    "the same as messages": ({"prompt": [user("Hi")], "completion": [assistant("Hello!")]}, ONE),
    "KTO's good answer": ({"prompt": "Hi", "completion": "Hello!", "label": True}, ONE),
    "prompt and response": ({"prompt": "Hi", "response": "Hello!", "source": "me"}, ONE),
    "OpenAI's messages": (
        {"messages": [system("Be kind."), user("Hi"), assistant("Hello!")]},
        SYSTEM,
    ),
    "messages of several turns": (
        {"messages": [user("Hi"), assistant("Hello!"), user("Bye"), assistant("See you.")]},
        THREE,
    ),
    "UltraChat's prompt beside the messages": (
        {
            "prompt": "Hi",
            "messages": [user("Hi"), assistant("Hello!"), user("Bye"), assistant("See you.")],
        },
        THREE,
    ),
    "messages that became text": ({"messages": str([user("Hi"), assistant("Hello!")])}, ONE),
    "ShareGPT": (
        {
            "conversations": [
                said("human", "Hi"),
                said("gpt", "Hello!"),
                said("human", "Bye\r\n"),
                said("gpt", "See you."),
            ]
        },
        THREE,
    ),
    "ShareGPT with a system column": (
        {"system": "Be kind.", "conversations": [said("human", "Hi"), said("gpt", "Hello!")]},
        SYSTEM,
    ),
    "ShareGPT that became text": (
        {"conversations": json.dumps([said("human", "Hi"), said("gpt", "Hello!")])},
        ONE,
    ),
    "Alpaca": ({"instruction": "Hi", "input": "", "output": "Hello!"}, ONE),
    "Alpaca with an input": (
        {"instruction": "Translate:", "input": "Salut", "output": "Hi"},
        Pair((("user", "Translate:\n\nSalut"),), "Hi"),
    ),
    "Alpaca with a history": (
        {"instruction": "Bye", "output": "See you.", "history": [["Hi", "Hello!"]]},
        THREE,
    ),
    "Alpaca with a system text": (
        {"system": "Be kind.", "instruction": "Hi", "input": None, "output": "Hello!"},
        SYSTEM,
    ),
    "a transcript": ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!"}, ONE),
    "a transcript as a completion": ({"completion": "Human: Hi\n\nAssistant: Hello!"}, ONE),
    "a prompt that holds the answer": ({"prompt": [user("Hi"), assistant("Hello!")]}, ONE),
}
PREFERRED = {
    "LLaMA-Factory's ShareGPT": {
        "conversations": [said("human", "Hi")],
        "chosen": said("gpt", "Hello!"),
        "rejected": said("gpt", "Go away."),
    },
    "LLaMA-Factory's Alpaca": {
        "instruction": "Hi",
        "input": "",
        "chosen": "Hello!",
        "rejected": "Go away.",
    },
    "ShareGPT twice": {
        "chosen": [said("human", "Hi"), said("gpt", "Hello!")],
        "rejected": [said("human", "Hi"), said("gpt", "Go away.")],
    },
    "messages before two answers": {
        "messages": [user("Hi")],
        "chosen": [assistant("Hello!")],
        "rejected": [assistant("Go away.")],
    },
    "messages with a worse answer": {
        "messages": [user("Hi"), assistant("Hello!")],
        "rejected": "Go away.",
    },
    "completion and rejected": {"prompt": "Hi", "completion": "Hello!", "rejected": "Go away."},
}
ASKED = {
    "a question": ({"prompt": "Hi"}, ONE),
    "a transcript": (
        {"prompt": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant:"},
        THREE,
    ),
    "TRL's messages": ({"prompt": [system("Be kind."), user("Hi")]}, SYSTEM),
    "messages that end with the user's": (
        {"messages": [user("Hi"), assistant("Hello!"), user("Bye")]},
        THREE,
    ),
    "ShareGPT": ({"conversations": [said("system", "Be kind."), said("human", "Hi")]}, SYSTEM),
    "Alpaca": ({"instruction": "Hi", "input": ""}, ONE),
    "no answer yet": ({"prompt": "Hi", "chosen": None, "rejected": None}, ONE),
    "two answers that are equal": ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, ONE),
    "a worse answer alone": ({"prompt": "Hi", "rejected": "Go away."}, ONE),
    "KTO's bad answer": ({"prompt": "Hi", "completion": "Go away.", "label": False}, ONE),
    "a bad answer in messages": (
        {"messages": [user("Hi"), assistant("Go away.")], "kto_tag": "false"},
        ONE,
    ),
}


def by_name(shapes):
    return [
        pytest.param(*(shape if isinstance(shape, tuple) else (shape,)), id=name)
        for name, shape in shapes.items()
    ]


def why_not(row, needs):
    with pytest.raises(BadRow) as reason:
        parse_row(row, needs)
    return str(reason.value)


@pytest.mark.parametrize(("row", "read"), by_name(ANSWERED))
def test_a_row_with_one_answer_is_read_where_one_is_enough(row, read):
    assert parse_row(row, "answer") == read
    assert parse_row(row, "prompt").turns == read.turns
    assert why_not(row, "pair") == "no rejected answer"


@pytest.mark.parametrize("row", by_name(PREFERRED))
def test_a_row_with_two_answers_is_read_everywhere(row):
    pair = Pair(ONE.turns, "Hello!", "Go away.")
    assert [parse_row(row, needs) for needs in NEEDS] == [pair] * 3


@pytest.mark.parametrize(("row", "read"), by_name(ASKED))
def test_a_row_without_a_good_answer_is_a_prompt(row, read):
    assert parse_row(row, "prompt").turns == read.turns
    two = row.get("chosen") is not None
    assert why_not(row, "answer") == (
        "chosen and rejected are identical" if two else "no chosen answer"
    )


@pytest.mark.parametrize(
    ("row", "needs", "reason"),
    [
        ({"messages": []}, "prompt", "no user turn"),
        ({"messages": "Hi"}, "prompt", "messages are not a list"),
        ({"messages": [assistant("Hello!")]}, "answer", "no user turn"),
        ({"messages": [user("Hi"), assistant(" ")]}, "answer", "blank turn"),
        ({"messages": [user("Hi")]}, "answer", "no chosen answer"),
        (
            {"messages": [{"role": "developer", "content": "x"}]},
            "answer",
            "message without a role of",
        ),
        (
            {"conversations": [said("human", "Hi"), said("observation", "3")]},
            "answer",
            "message of a tool",
        ),
        ({"prompt": "Hi", "completion": " "}, "answer", "blank answer"),
        (
            {"prompt": "Hi", "completion": "a\n\nHuman: b"},
            "answer",
            "chosen runs on into another turn",
        ),
        ({"prompt": "Hi", "completion": "a\ud800"}, "answer", "half a surrogate pair"),
        ({"prompt": "Hi\ud800", "completion": "a"}, "prompt", "half a surrogate pair"),
        ({"completion": "Hello!"}, "answer", "transcript without 'Assistant:'"),
        ({"instruction": " ", "input": "", "output": "a"}, "answer", "blank turn"),
        (
            {"instruction": "Hi", "input": ["x"], "output": "a"},
            "answer",
            "instruction or input is not text",
        ),
        (
            {"instruction": "Hi", "output": "a", "history": "x"},
            "answer",
            "history is not a list of",
        ),
        (
            {"instruction": "Hi", "output": "a", "history": [["x"]]},
            "answer",
            "history is not a list of",
        ),
        ({"text": "Hi"}, "prompt", "no user turn"),
        ({"prompt": "\n\nHuman: Hi"}, "prompt", "prompt does not end with 'Assistant:'"),
    ],
)
def test_a_row_that_lacks_what_is_needed_says_why(row, needs, reason):
    assert why_not(row, needs).startswith(reason)


def test_what_stands_beside_a_preference_pair_changes_nothing():
    """Names of other shapes in a row that was readable before they were."""
    pair = Pair(ONE.turns, "Hello!", "Go away.")
    more = {
        "response": "x",
        "output": "x",
        "instruction": "x",
        "input": "x",
        "history": [["x", "y"]],
    }
    more |= {"messages": [user("x"), assistant("y")], "conversations": [], "label": False}
    rows = [
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."},
        {"chosen": HI + " Hello!", "rejected": HI + " Go away."},
        {
            "chosen": [user("Hi"), assistant("Hello!")],
            "rejected": [user("Hi"), assistant("Go away.")],
        },
    ]
    assert [parse_row(row | more) for row in rows] == [pair] * 3


names = [
    "prompt",
    "instruction",
    "input",
    "history",
    "messages",
    "conversations",
    "chosen",
    "completion",
]
names += ["response", "output", "rejected", "system", "label"]
cells = json_like | st.lists(
    st.fixed_dictionaries({"from": json_like, "value": json_like}), max_size=2
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(row=st.dictionaries(st.sampled_from(names), cells, max_size=5))
def test_any_row_is_read_or_bad_whatever_is_needed(row):
    usable = []
    for needs in NEEDS:
        try:
            usable.append(parse_row(row, needs))
        except BadRow:
            break
    assert all(pair == usable[0] for pair in usable)
    texts = [
        text for pair in usable[1:2] for text in (pair.chosen, *(said for _, said in pair.turns))
    ]
    assert all(text == text.strip() != "" for text in texts)


# ---------------------------------------------------------------- data as a phase reads them


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_file_of_each_kind_may_have_any_shape(tmp_path, suffix):
    conversations = [
        {"conversations": [said("human", f"Hi {n}"), said("gpt", f"Hello {n}!")]} for n in range(3)
    ]
    alpaca = [{"instruction": f"Hi {n}", "input": "", "output": f"Hello {n}!"} for n in range(3)]
    write(tmp_path / "a" / f"train{suffix}", conversations)
    write(tmp_path / "b" / f"train{suffix}", alpaca)
    wanted = [Pair((("user", f"Hi {n}"),), f"Hello {n}!") for n in range(3)]
    for folder in "ab":
        assert load_rows(str(tmp_path / folder), "train", "answer") == wanted


MIXED = [
    {"prompt": "One?", "completion": "a", "rejected": "b"},
    {"prompt": "Two?", "completion": "a"},
    {"prompt": "Three?"},
    {"prompt": "Four?", "completion": "a", "rejected": "a"},
    {"prompt": "Five?", "completion": " ", "rejected": "b"},
    {"prompt": " ", "completion": "a", "rejected": "b"},
]


@pytest.mark.parametrize(
    ("needs", "kept", "line"),
    [
        (
            "pair",
            ["One?"],
            "1 rows, dropped 5 (1 no rejected answer, 1 no chosen answer, 1 chosen and rejected "
            "are identical, 1 blank answer, 1 blank turn)",
        ),
        (
            "answer",
            ["One?", "Two?"],
            "2 rows, dropped 4 (1 no chosen answer, 1 chosen and rejected are identical, 1 blank "
            "answer, 1 blank turn)",
        ),
        (
            "prompt",
            ["One?", "Two?", "Three?", "Four?", "Five?"],
            "5 rows, dropped 1 (1 blank turn)",
        ),
    ],
)
def test_each_phase_keeps_what_has_what_it_needs_and_counts_the_rest(
    tmp_path, capsys, needs, kept, line
):
    (tmp_path / "test.jsonl").touch()
    write_jsonl(tmp_path / "train.jsonl", MIXED)
    assert [pair.turns[0][1] for pair in load_rows(str(tmp_path), "train", needs)] == kept
    assert capsys.readouterr().out.startswith(
        f"{tmp_path}, train: {line}; read train.jsonl as prompt"
    )


@pytest.mark.parametrize(
    ("row", "missing"),
    [
        ({"prompt": "Hi", "completion": "Hello!"}, "rejected"),
        ({"prompt": "Hi", "completion": "Hello!", "label": True}, "rejected"),
        ({"messages": [user("Hi"), assistant("Hello!")]}, "rejected"),
        ({"conversations": [said("human", "Hi"), said("gpt", "Hello!")]}, "rejected"),
        ({"instruction": "Hi", "input": "", "output": "Hello!"}, "rejected"),
        ({"prompt": "Hi"}, "chosen"),
    ],
)
def test_a_reward_model_wants_pairs_and_says_what_is_missing(tmp_path, row, missing):
    write_jsonl(tmp_path / "train.jsonl", [row] * 3)
    with pytest.raises(UserError) as error:
        load_pairs(str(tmp_path), "train")
    has = (
        f"has no column '{missing}' (it has {', '.join(row)}): a reward model learns from two "
        "answers"
    )
    assert has in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "needs", "missing"),
    [
        ({"prompt": "Hi"}, "answer", "chosen"),
        ({"text": "Hi"}, "answer", "chosen"),
        ({"question": "Hi", "response": "Hello!"}, "answer", "prompt"),
        ({"question": "Hi", "answer": "Hello!"}, "prompt", "prompt"),
    ],
)
def test_a_column_that_is_not_there_can_be_named(tmp_path, row, needs, missing):
    write_jsonl(tmp_path / "train.jsonl", [row])
    with pytest.raises(
        UserError, match=f"has no column '{missing}' .*--columns {missing}=NAME reads it"
    ):
        load_rows(str(tmp_path), "train", needs)


def test_the_line_says_which_columns_of_a_shape_were_read(tmp_path, capsys):
    rows = [
        {"instruction": "Hi", "input": "", "output": "Hello!", "text": "x"},
        {"prompt": "Hi", "completion": "Hello!", "label": True},
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "No.", "kto_tag": False},
        {"prompt": "x", "messages": [user("Hi") | {"name": "me"}, assistant("Hello!")]},
        {"conversations": [said("human", "Hi"), said("gpt", "<|end|> Hello!")], "tools": "x"},
    ]
    (tmp_path / "test.jsonl").touch()
    write_jsonl(tmp_path / "train.jsonl", rows)
    load_rows(str(tmp_path), "train", "answer")
    assert capsys.readouterr().out.strip() == (
        f"{tmp_path}, train: 5 rows; read train.jsonl as instruction, output (text) or prompt, "
        "completion, label (text) or prompt, chosen, rejected (text) or messages (messages) or "
        "conversations (messages); repeated rows: 2; ignored: text, kto_tag, prompt, name of "
        "messages, tools; looks like markup: <|end|> in 1 rows"
    )


SAME = {"chosen": "a", "rejected": "a"}


@pytest.mark.parametrize(
    ("count", "shapes", "phases"),
    [
        (300, [{"chosen": "a", "rejected": "b"}, {"chosen": "a"}, {}, SAME], NEEDS),
        (21, [SAME, {"chosen": "a"}], ("prompt", "answer")),  # none held out by its hash
    ],
)
def test_no_question_is_in_one_phases_training_and_anothers_test_split(
    tmp_path, count, shapes, phases
):
    questions = [f"Q{n}?" for n in range(999)]
    if count == 21:
        pairs = [Pair((("user", q),)) for q in questions]
        pairs = sorted((pair for pair in pairs if not in_test_split(pair)), key=first_turn_sha256)
        # the first would be held out, if SFT could use it
        questions = [pair.turns[0][1] for pair in pairs]
    rows = [{"prompt": questions[n]} | shapes[n % len(shapes)] for n in range(count)]
    file = str(write_jsonl(tmp_path / "all.jsonl", rows))
    splits = [load_splits(file, needs) for needs in phases]
    train, test = ({pair.turns for split in splits for pair in split[side]} for side in (0, 1))
    assert test and not train & test
    assert len(train | test) == count


# ---------------------------------------------------------------- fingerprints

# at commit 1e17a1f
THREE_PAIRS = "d74484eaa105bf442bb4c8ad758145f523de4e1ce6fb8903cf07cdd34b1280e0"
DIALOGUES = [
    ([("user", "Hi")], "Hello!", "Go away."),
    ([("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye, “é”?")], "See\nyou.", "Good."),
    ([("system", "Be kind."), ("user", "Hi")], "Hello!", "Go away."),
]


def transcript(turns):
    cues = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    return "".join(cues[role] + text for role, text in turns) + "\n\nAssistant:"


def listed(turns):
    return [{"role": role, "content": text} for role, text in turns]


PAIR_SHAPES = {
    "rm-static": lambda turns, a, b: {
        "prompt": transcript(turns),
        "response": f" {a}",
        "chosen": f" {a}",
        "rejected": f" {b}",
    },
    "line ends of Windows": lambda turns, a, b: {
        "prompt": transcript(turns).replace("\n", "\r\n"),
        "chosen": a.replace("\n", "\r\n"),
        "rejected": b,
    },
    "transcripts": lambda turns, a, b: {
        "chosen": f"{transcript(turns)} {a}",
        "rejected": f"{transcript(turns)} {b}",
    },
    "messages": lambda turns, a, b: {
        "chosen": [*listed(turns), assistant(a)],
        "rejected": [*listed(turns), assistant(b)],
    },
    "a prompt of messages": lambda turns, a, b: {
        "prompt": listed(turns),
        "chosen": [assistant(a)],
        "rejected": [assistant(b)],
    },
    "messages and texts": lambda turns, a, b: {
        "prompt": listed(turns),
        "chosen": a,
        "rejected": b,
    },
    "messages that became text": lambda turns, a, b: {
        "prompt": str(listed(turns)),
        "chosen": json.dumps([assistant(a)]),
        "rejected": str([assistant(b)]),
    },
    "a system column": lambda turns, a, b: {
        "system": turns[0][1] if turns[0][0] == "system" else "",
        "prompt": transcript([turn for turn in turns if turn[0] != "system"]),
        "chosen": a,
        "rejected": b,
    },
}


@pytest.mark.parametrize("shape", PAIR_SHAPES)
def test_pairs_have_the_fingerprints_that_they_always_had(tmp_path, shape):
    write_jsonl(tmp_path / "train.jsonl", [PAIR_SHAPES[shape](*dialogue) for dialogue in DIALOGUES])
    for needs in NEEDS:
        assert fingerprint(load_rows(str(tmp_path), "train", needs)) == THREE_PAIRS


def test_a_missing_answer_has_a_fingerprint_of_its_own():
    pairs = [
        Pair(ONE.turns, *answers) for answers in ((), ("a",), ("a", ""), (None, "a"), ("", "a"))
    ]
    assert len({fingerprint([pair]) for pair in pairs}) == 5


# ---------------------------------------------------------------- other names of columns


def test_columns_may_have_other_names(tmp_path, capsys):
    rows = [
        {"question": f"Q{n}?", "good": "Yes.", "bad": "No.", "prompt": "x", "note": "y"}
        for n in range(3)
    ]
    (tmp_path / "test.jsonl").touch()
    write_jsonl(tmp_path / "train.jsonl", [*rows, {"question": "No answer?"}])
    columns = "prompt=question, chosen=good ,rejected=bad"
    pairs = load_rows(str(tmp_path), "train", "pair", columns)
    assert pairs == [Pair((("user", f"Q{n}?"),), "Yes.", "No.") for n in range(3)]
    assert pairs == load_pairs(str(tmp_path), "train", columns=columns)
    line = (
        "3 rows, dropped 1 (1 no chosen answer); read train.jsonl as prompt, chosen, rejected "
        "(text); ignored: note\n"
    )
    assert line in capsys.readouterr().out
    other = load_rows(str(tmp_path), "train", "pair", "prompt=question,chosen=bad,rejected=good")
    assert fingerprint(other) != fingerprint(pairs)


@pytest.mark.parametrize(
    ("row", "columns", "read"),
    [
        ({"talk": [user("Hi"), assistant("Hello!")]}, "messages=talk", ONE),
        ({"text": "\n\nHuman: Hi\n\nAssistant: Hello!"}, "chosen=text", ONE),
        ({"sys": "Be kind.", "q": "Hi", "response": "Hello!"}, "system=sys,prompt=q", SYSTEM),
        (
            {"instruction": "Sum up:", "context": "Long.", "response": "Short."},
            "input=context",
            Pair((("user", "Sum up:\n\nLong."),), "Short."),
        ),
        ({"chosen": "Hi", "rejected": "Hello!"}, "prompt=chosen,chosen=rejected", ONE),
    ],
)
def test_any_name_that_is_read_may_stand_for_another(tmp_path, row, columns, read):
    write_jsonl(tmp_path / "train.jsonl", [row])
    assert load_rows(str(tmp_path), "train", "answer", columns) == [read]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ("prompt", "--columns 'prompt': write NAME=COLUMN"),
        ("prompt=", "write NAME=COLUMN"),
        ("=a", "write NAME=COLUMN"),
        ("prompt=a,", "write NAME=COLUMN"),
        ("promt=a", "'promt' is none of the names that are read (system, prompt, "),
        ("prompt=a,prompt=b", "names 'prompt' twice"),
        ("prompt=c", "train.jsonl has no column 'c' (it has a, b, chosen)"),
    ],
)
def test_a_name_that_cannot_be_is_refused_with_the_columns_there_are(tmp_path, columns, says):
    write_jsonl(tmp_path / "train.jsonl", [{"a": "Hi", "b": "Hi", "chosen": "Hello!"}])
    with pytest.raises(UserError, match=re.escape(says)):
        load_rows(str(tmp_path), "train", "answer", columns)


@pytest.mark.parametrize(
    ("row", "columns", "says"),
    [
        (
            {"prompt": "Hi", "chosen": "Old.", "answer": "New."},
            "response=answer",
            "train.jsonl, row 2 is read from prompt, chosen, and 'response' would be ignored: give "
            "'answer' one of those names",
        ),
        ({"prompt": "x", "q": "Hi", "chosen": "Hello!"}, "instruction=q", "'instruction' would be"),
        ({"prompt": "Hi", "in": "More.", "chosen": "Hello!"}, "input=in", "'input' would be"),
        (
            {"prompt": "Hi", "chosen": "Hello!", "rejected": "No.", "good": False},
            "label=good",
            "'label' would be",
        ),
    ],
)
@pytest.mark.parametrize("needs", ["prompt", "answer"])
def test_a_column_that_was_named_but_would_not_be_read_is_refused(
    tmp_path, row, columns, says, needs
):
    """It holds nothing in the first row, where that does no harm."""
    theirs = columns.partition("=")[2]
    write_jsonl(tmp_path / "train.jsonl", [row | {theirs: None}, row])
    with pytest.raises(UserError, match=re.escape(says)):
        load_rows(str(tmp_path), "train", needs, columns)


# ---------------------------------------------------------------- through the scripts


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny data's prompts alone, with an answer, as ShareGPT, as CSV, and renamed."""
    root = tmp_path_factory.mktemp("shapes")
    for name in ("prompts", "answers", "talks"):
        (root / name).mkdir()
    for split, count in (("train", 24), ("test", 8)):
        rows = read_demo(split)[:count]
        pairs = [parse_row(row) for row in rows]
        talks = [[*pair.turns, ("assistant", pair.chosen)] for pair in pairs]
        talks = [[said(SHAREGPT[role], text) for role, text in talk] for talk in talks]
        for name, names in (("prompts", ["prompt"]), ("answers", ["prompt", "chosen"])):
            write_jsonl(
                root / name / f"{split}.jsonl",
                [{name: row[name] for name in names} for row in rows],
            )
        write(
            root / "talks" / f"{split}.csv",
            [{"talk": json.dumps(talk), "by": "me"} for talk in talks],
        )
    return root


def test_sft_of_rows_with_one_answer(call_main, trained, folders, tmp_path):
    """Cut short and resumed: as with the same answers in rm-static's columns."""
    saves = ["--save-steps", "1", "--output-dir", tmp_path / "cut"]
    argv = [
        *trained.sft_flags,
        *saves,
        "--dataset",
        folders / "talks",
        "--columns",
        "messages=talk",
    ]
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, rlhf.engine.trainer.Resumable, "training_step", 3, crash)
        with pytest.raises(Crash):
            call_main("sft_train", argv)
    refused = call_main(
        "sft_train", [*trained.sft_flags, *saves, "--dataset", folders / "answers", "--resume"]
    )
    assert_one_line(
        refused.returncode, refused.stderr, "another columns (messages=talk there, None now)"
    )
    result = call_main("sft_train", [*argv, "--resume"])
    assert result.returncode == 0, result.stderr
    assert "read train.csv as messages (text); ignored: by" in result.stdout
    *_, note, following = result.stdout.splitlines()
    assert note.startswith(
        f"{folders / 'talks'} has no rejected answers, which the reward model needs"
    )
    flags = f"--sft-checkpoint {tmp_path}/cut --dtype fp32 --output-dir {tmp_path}/cut-reward"
    assert following == f"Next: python reward_train.py {flags}"
    plain = [
        *trained.sft_flags,
        "--dataset",
        folders / "answers",
        "--output-dir",
        tmp_path / "plain",
    ]
    assert call_main("sft_train", plain).returncode == 0
    check_same_run(tmp_path / "plain", tmp_path / "cut")
    data = [
        json.loads((tmp_path / name / "run.json").read_text())["data"] for name in ("plain", "cut")
    ]
    assert [each["columns"] for each in data] == [None, "messages=talk"]
    assert data[0]["sha256"] == data[1]["sha256"]
    run = json.loads((tmp_path / "plain" / "run.json").read_text())
    run["hyperparameters"].pop("columns")  # as before there was such a flag
    run["hyperparameters"]["preset"] = "demo"  # wherever its values came from
    (tmp_path / "plain" / "run.json").write_text(json.dumps(run))
    assert "there is nothing to resume" in call_main("sft_train", [*plain, "--resume"]).stdout


def test_ppo_and_the_comparison_take_prompts_alone(call_main, trained, folders, tmp_path):
    """And do the same, also resumed, with answers beside them, which they do not read."""
    sizes = {"total_episodes": 16, "save_steps": 1}
    alone = ppo_flags(trained, folders / "prompts", tmp_path / "alone", **sizes)
    assert call_main("ppo_train", alone).returncode == 0
    argv = ppo_flags(trained, folders / "talks", tmp_path / "cut", columns="messages=talk", **sizes)
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, ppo_train, "generate", 3, crash)
        with pytest.raises(Crash):
            call_main("ppo_train", argv)
    result = call_main("ppo_train", [*argv, "--resume"])
    assert result.returncode == 0, result.stderr
    run = json.loads((tmp_path / "cut" / "run.json").read_text())
    for name in ("chosen_question_share", "chosen_opening_share"):  # of the answers that there are
        assert run["metrics"].pop(name) >= 0
    (tmp_path / "cut" / "run.json").write_text(json.dumps(run))
    check_same_run(tmp_path / "alone", tmp_path / "cut")
    following = result.stdout.splitlines()[-1]
    folder = folders / "talks"
    assert (
        f" --dataset {folder} --columns messages=talk --dtype fp32 --max-prompt-length 160 "
        "--num-test-prompts 64" in (following)
    )
    script, *flags = shlex.split(following.removeprefix("Next: python "))
    result = call_main(script.removesuffix(".py"), [*flags, "--max-new-tokens", "4"])
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "cut-reports" / "compare.json").read_text())
    turns = [[list(turn) for turn in parse_row(row).turns] for row in read_demo("test")[:8]]
    assert [entry["turns"] for entry in report["prompts"]] == turns


@pytest.mark.parametrize(
    ("script", "data", "says"),
    [
        ("sft_train", "prompts", "train.jsonl has no column 'chosen' (it has prompt)"),
        ("reward_train", "prompts", "train.jsonl has no column 'chosen' (it has prompt)"),
        ("reward_train", "answers", "train.jsonl has no column 'rejected' (it has prompt, chosen)"),
        ("ppo_train", "talks", "train.csv has no column 'prompt' (it has talk, by)"),
        ("compare_outputs", "talks", "test.csv has no column 'prompt' (it has talk, by)"),
    ],
)
def test_what_a_phase_cannot_use_is_refused_in_a_line(
    call_main, trained, folders, tmp_path, script, data, says
):
    parents = {"--sft-checkpoint": trained.sft, "--reward-checkpoint": trained.reward}
    parents = [part for pair in list(parents.items())[: PARENTS.get(script, 2)] for part in pair]
    own = {"sft_train": trained.sft_flags, "compare_outputs": ["--num-test-prompts", "3"]}.get(
        script, []
    )
    argv = [*own, *parents, "--dataset", folders / data, "--output-dir", tmp_path / "out"]
    result = call_main(script, argv)
    assert_one_line(result.returncode, result.stderr, says)
    argv += ["--columns", "prompt=nothing"]
    result = call_main(script, argv)
    assert_one_line(result.returncode, result.stderr, "has no column 'nothing' (it has ")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_the_evaluation_alone_needs_pairs_too(call_main, trained, folders):
    argv = [*trained.reward_flags, "--dataset", folders / "answers", "--eval-only", "--overwrite"]
    result = call_main("reward_train", argv)
    assert_one_line(result.returncode, result.stderr, "test.jsonl has no column 'rejected'")


def test_prompts_of_a_file_are_read_by_their_name(call_main, trained, tmp_path):
    with (tmp_path / "prompts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["question"], ["Hi"], ["Bye"]])
    argv = [
        "--sft-checkpoint",
        trained.sft,
        "--output-dir",
        tmp_path / "out",
        "--max-new-tokens",
        "4",
    ]
    argv += ["--prompts", tmp_path / "prompts.csv", "--columns", "prompt=question"]
    assert call_main("compare_outputs", argv).returncode == 0
    report = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [entry["turns"] for entry in report["prompts"]] == [[["user", "Hi"]], [["user", "Bye"]]]
