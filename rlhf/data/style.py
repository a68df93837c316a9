"""How answers begin and end, in measures that need no language: the habits that a policy gets into.

A policy may find that its reward model likes answers that ask back, or that open in one and the
same way. Scores rise then, and nothing else shows it.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

# Scripts that put no space between words: Thai to Tibetan, Burmese, Khmer, kana, and Chinese
# characters.
UNSPACED = (
    r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff"
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
OPENING_WORDS = 3
# Latin's and most others', full-width, Arabic, Greek (also as a semicolon behind a Greek letter),
# Ethiopic; and what may close around it.
QUESTION = r"(?:[?？؟\u037e፧]|(?<=[\u0370-\u03ff\u1f00-\u1fff]);)"
ENDS_IN_QUESTION = re.compile(QUESTION + r"""["'’”»」』)\]*_\s]*$""")


def question_share(texts: Iterable[str]) -> float:
    """The share of texts that end in a question mark; 0 without texts."""
    found = [bool(ENDS_IN_QUESTION.search(text)) for text in texts]
    return sum(found) / len(found) if found else 0.0


def commonest_opening(texts: Iterable[str]) -> tuple[str, float]:
    """The opening that most texts share, and their share; "" and 0 without texts."""
    openings = [opening(text) for text in texts]
    counts = Counter(filter(None, openings))
    words, count = counts.most_common(1)[0] if counts else ("", 0)
    return words, count / len(openings) if openings else 0.0


def opening(text: str) -> str:
    """The first words of a text, in scripts without spaces its first characters.

    They have small letters, digits and apostrophes only, and so mean nothing to Markdown or HTML.
    """
    words = map(bare, words_of(text[:500]))
    return " ".join([word for word in words if word][:OPENING_WORDS])


def bare(word: str) -> str:
    """A word's letters, digits and apostrophes, in small letters."""
    letters = word.replace("’", "'").casefold()
    return "".join(c for c in letters if c == "'" or unicodedata.category(c)[0] in "LMN").strip("'")


def style_of(texts: list[str]) -> dict[str, float]:
    """The measures of some answers."""
    return {"question_share": question_share(texts), "opening_share": commonest_opening(texts)[1]}


def words_of(text: str) -> list[str]:
    """Its words; its characters in scripts without spaces, and in long runs without any space."""
    words = WORD.findall(text)
    return [part for word in words for part in (word if len(word) > 50 else [word])]


def repeated_3grams(text: str) -> float:
    """The share of word 3-grams that occurred before in `text`; 0 for fewer than 3 words."""
    words = words_of(text)
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_2(texts: Iterable[str]) -> float:
    """The share of different pairs of neighbouring words in `texts` (1510.03055).

    It is low if all sound alike.
    """
    pairs = [
        pair
        for text in texts
        for words in [words_of(text)]
        for pair in zip(words, words[1:], strict=False)
    ]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
