"""Which split and half a pair belongs to: decided by a hash of its first question, so it stays."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from rlhf.data.rows import Pair
from rlhf.runs.errors import UserError

TEST_SHARE = 20  # a file without splits holds out one first question in this many


def in_test_split(pair: Pair) -> bool:
    """Whether a single file gives the pair to the test split: about one first question in 20."""
    return is_test(first_turn_sha256(pair))


def half_of(pair: Pair) -> str:
    """ "first" or "second": the half of the data that a pair is in."""
    return which_half(first_turn_sha256(pair))


def is_test(digest: bytes) -> bool:
    return digest[0] < 256 // TEST_SHARE


def which_half(digest: bytes) -> str:
    return "first" if digest[1] < 128 else "second"


def cut_selection(pairs: list[Pair], count: int) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train on, and `count` pairs to choose a model by, the same ones every time.

    Each of these `count` has its own first question, and no pair with that question is left to
    train on.

    Raises:
        UserError: that would take more than half of the first questions.
    """
    groups: dict[bytes, list[Pair]] = {}
    for pair in pairs:
        # Hashed again, as the digest itself decides the pair's split and half.
        groups.setdefault(hashlib.sha256(first_turn_sha256(pair)).digest(), []).append(pair)
    if 2 * count > len(groups):
        raise UserError(
            f"--keep best takes {count} dialogues out of the train split, as many as there are "
            f"held-out prompts, and the split has {len(groups)}: lower --max-eval-samples to "
            f"{len(groups) // 2}, or bring more data"
        )
    taken = sorted(groups)[:count]
    left = {digest for digest in groups if digest not in set(taken)}
    train = [pair for digest, group in groups.items() if digest in left for pair in group]
    return train, [groups[digest][0] for digest in taken]


def first_turn_sha256(pair: Pair) -> bytes:
    """A hash of the user's first turn, so that no dialogue is on both sides of a split."""
    first = next(text for role, text in pair.turns if role == "user")
    return hashlib.sha256(first.encode("utf-8", "replace")).digest()


def row_sha256(row: dict[str, Any]) -> bytes:
    """The same for a row that is no pair, so that it is counted on one side only."""
    return hashlib.sha256(repr(row).encode("utf-8", "replace")).digest()


def fingerprint(pairs: Iterable[Pair]) -> str:
    """SHA-256 over the pairs in order. Two runs with the same value saw the same data."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.turns, pair.chosen, pair.rejected]).encode())
    return digest.hexdigest()
