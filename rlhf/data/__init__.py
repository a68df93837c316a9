"""Prompts, answers and preferences: where they come from, their shapes, and their tokens.

Every phase reads the same `Pair`s and tokenises them by the same functions, so what the SFT model
learns to write, the reward model learns to read and PPO samples is one format. A phase says what it
needs of a row: SFT an answer, the reward model two, PPO and the comparison the prompt alone.
Trainers get token ids, never text.

    sources   files, folders and hub data sets -> the usable rows of a split, and what was left out
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
    Needs,
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
    load_rows,
    load_splits,
    open_text,
    parse_columns,
    read_rows,
    report_drops,
)

__all__ = [
    "ASSISTANT",
    "HUMAN",
    "BadRow",
    "Needs",
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
    "load_rows",
    "load_splits",
    "open_text",
    "parse_columns",
    "parse_dialogue",
    "parse_row",
    "read_rows",
    "report_drops",
    "tokenize_pairs",
    "tokenize_prompt",
    "tokenize_prompts",
]
