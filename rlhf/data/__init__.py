"""Prompts, answers and preferences: where they come from, their shapes, and their tokens.

Every phase reads the same `Pair`s and tokenises them by the same functions, so what the SFT model
learns to write, the reward model learns to read and PPO samples is one format. A phase says what it
needs of a row: SFT an answer, the reward model two, PPO and the comparison the prompt alone.
Trainers get token ids, never text.

    sources   files, folders and hub data sets -> the usable rows of a split, and what was left out
    rows      a row of any accepted shape -> a `Pair`
    format    a `Pair` -> token ids, in the project's own format or by a base's chat template
"""
