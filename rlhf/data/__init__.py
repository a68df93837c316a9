"""Prompts, answers and preferences: where they come from, their shapes, and their tokens.

`sources` turns files, folders and hub data sets into the usable rows of a split, and says what it
left out; `rows` turns a row of any accepted shape into a `Pair`; `format` turns a `Pair` into token
ids, in the project's own format or by the base's chat template, which `template` checks. `votes`
are the preferences that people give on the vote page, and `style` counts how answers begin, end and
repeat themselves. Every phase reads the same `Pair`s by the same functions, so what the SFT model
learns to write, the reward model learns to read and PPO samples is one format; trainers get token
ids, never text.
"""
