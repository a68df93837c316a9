"""How answers end and begin, in many scripts, and when a habit has doubled."""

import pytest

from rlhf.data.style import commonest_opening, opening, question_share, style_of
from rlhf.runs.statistics import doubled


@pytest.mark.parametrize(
    "text",
    [
        "Is it?",
        "Is it?  \n",
        'He said "Is it?"',
        "(or is it?)",
        "**Is it?**",
        "本当ですか？",
        "「本当？」",
        "هل هذا صحيح؟",
    ]
    + ["Τι κάνεις;", "Τι κάνεις\u037e", "ነው፧", "Really?!?", "¿Qué tal?"],
)
def test_a_question_at_the_end(text):
    assert question_share([text]) == 1


@pytest.mark.parametrize("text", ["", "Is it? Yes.", "It is.", "x = 1;", "?!", "Why? I ask."])
def test_no_question_at_the_end(text):
    assert question_share([text]) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Sure, I can help!", "sure i can"),
        ("  SURE - I\ncan", "sure i can"),
        ("I’m so sorry", "i'm so sorry"),
        ("No.", "no"),
        ("**1.** Boil water", "1 boil water"),
        ("好的，我可以", "好 的 我"),
        ("नमस्ते जी, मैं", "नमस्ते जी मैं"),
        ("<b>|_`x`_| y", "bx y"),  # nothing that means something to Markdown
        ("", ""),
        ("...", ""),
    ],
)
def test_an_opening_is_three_bare_words(text, words):
    assert opening(text) == words


def test_the_commonest_opening():
    texts = ["Sure, I can do it.", "sure i can!", "Sure I will", "", "Well"]
    assert commonest_opening(texts) == ("sure i can", 0.4)
    assert commonest_opening([]) == ("", 0.0) == commonest_opening([""])
    assert style_of(["A?", "b"]) == {"question_share": 0.5, "opening_share": 0.5}


@pytest.mark.parametrize(
    ("before", "after", "count", "said"),
    [
        (3, 16, 80, True),  # 1 to 10 % and 13 to 30 %: what once went unnoticed
        (3, 12, 80, False),  # chance explains it: 1 to 10 % and 9 to 24 %
        (5, 10, 64, False),
        (0, 8, 64, True),
        (0, 5, 64, False),
        (20, 39, 64, False),  # not doubled, though no chance
        (16, 3, 80, False),
    ],
)
def test_doubled_by_more_than_chance(before, after, count, said):
    assert doubled(before / count, after / count, count) is said
