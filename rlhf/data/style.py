"""How answers begin and end, in measures that need no language: the habits that a policy gets into.

A policy may find that its reward model likes answers that ask back, or that open in one and the
same way. Scores rise then, and nothing else shows it.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from rlhf.runs.reporting import wilson_interval, words_of

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


def doubled(before: float, after: float, count: int) -> bool:
    """Whether a share of `count` answers has at least doubled, by more than chance.

    Chance is left behind where the 95 % intervals (Wilson) of the two do not overlap. Of 64 answers
    that happens to fewer than one run in 200 in which nothing changes; 4 % and 20 % of 80 pass.
    """
    highest_before = wilson_interval(before * count, count)[1]
    lowest_after = wilson_interval(after * count, count)[0]
    return after >= 2 * before and highest_before < lowest_after
