"""How answers begin, end and repeat themselves: a policy's habits, measured in any language.

A policy may find out that its reward model likes answers that ask something back, or that all open
the same way. Then scores rise, and nothing else shows it.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

# Scripts without spaces between words: Thai to Tibetan, Burmese, Khmer, kana, Chinese characters.
UNSPACED = (
    r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff"
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
OPENING_WORDS = 3
# Question marks: the usual one, full-width, Arabic, Greek (or a semicolon after a Greek letter) and
# Ethiopic. Closing quotes, brackets and markup may follow.
QUESTION = r"(?:[?？؟\u037e፧]|(?<=[\u0370-\u03ff\u1f00-\u1fff]);)"
ENDS_IN_QUESTION = re.compile(QUESTION + r"""["'’”»」』)\]*_\s]*$""")


def question_share(texts: Iterable[str]) -> float:
    """The share of texts that end in a question mark; 0 if there are no texts."""
    found = [bool(ENDS_IN_QUESTION.search(text)) for text in texts]
    return sum(found) / len(found) if found else 0.0


def commonest_opening(texts: Iterable[str]) -> tuple[str, float]:
    """The most common opening, and the share of texts that have it; "" and 0 without texts."""
    openings = [opening(text) for text in texts]
    counts = Counter(filter(None, openings))
    words, count = counts.most_common(1)[0] if counts else ("", 0)
    return words, count / len(openings) if openings else 0.0


def opening(text: str) -> str:
    """The first words of a text, or its first characters in scripts without spaces.

    Only small letters, digits and apostrophes are left, which mean nothing to Markdown or HTML.
    """
    words = map(bare, words_of(text[:500]))
    return " ".join([word for word in words if word][:OPENING_WORDS])


def bare(word: str) -> str:
    """A word's letters, digits and apostrophes, in lower case."""
    letters = word.replace("’", "'").casefold()
    return "".join(c for c in letters if c == "'" or unicodedata.category(c)[0] in "LMN").strip("'")


def style_of(texts: list[str]) -> dict[str, float]:
    """Both measures of some answers."""
    return {"question_share": question_share(texts), "opening_share": commonest_opening(texts)[1]}


def words_of(text: str) -> list[str]:
    """The words of a text; in scripts without spaces, and in very long words, its characters."""
    words = WORD.findall(text)
    return [part for word in words for part in (word if len(word) > 50 else [word])]


def repeated_3grams(text: str) -> float:
    """The share of a text's word 3-grams that are repeats; 0 for fewer than 3 words."""
    words = words_of(text)
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_2(texts: Iterable[str]) -> float:
    """The share of distinct pairs of neighbouring words in all texts (1510.03055).

    It is low if the texts sound alike.
    """
    pairs = [
        pair
        for text in texts
        for words in [words_of(text)]
        for pair in zip(words, words[1:], strict=False)
    ]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
