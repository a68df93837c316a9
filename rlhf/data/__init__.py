"""Preference data: where it comes from, the shapes it may have, and how it becomes tokens.

Every phase reads the same `Pair`s and tokenises them by the same functions, so what the SFT model
learns to write, the reward model learns to read and PPO samples is one format. Trainers get token
ids, never text.

    sources   files, folders and hub data sets -> rows, the pairs of a split, and what was left out
    rows      a row of any accepted shape -> a `Pair`
    format    a `Pair` -> token ids, in the project's own format or by a base's chat template
"""

from rlhf.data.format import (
    PromptFormat,
    TokenPair,
    tokenize_pairs,
    tokenize_prompt,
    tokenize_prompts,
)
from rlhf.data.rows import (
    ASSISTANT,
    HUMAN,
    BadRow,
    Pair,
    checked_turns,
    fingerprint,
    first_turn_sha256,
    half_of,
    hh_prompt,
    in_test_split,
    parse_dialogue,
    parse_row,
)
from rlhf.data.sources import (
    has_rows,
    load_pairs,
    load_splits,
    open_text,
    read_rows,
    report_drops,
)

__all__ = [
    "ASSISTANT",
    "HUMAN",
    "BadRow",
    "Pair",
    "PromptFormat",
    "TokenPair",
    "checked_turns",
    "fingerprint",
    "first_turn_sha256",
    "half_of",
    "has_rows",
    "hh_prompt",
    "in_test_split",
    "load_pairs",
    "load_splits",
    "open_text",
    "parse_dialogue",
    "parse_row",
    "read_rows",
    "report_drops",
    "tokenize_pairs",
    "tokenize_prompt",
    "tokenize_prompts",
]
