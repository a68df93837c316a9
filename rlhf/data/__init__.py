"""Prompts, answers and preferences: where they come from, what shapes they have, their tokens.

`files` reads the rows of a file, a folder or a hub data set; `rows` turns a row of any accepted
shape into a `Pair`; `splits` says which side of a split a pair is on; `sources` puts the three
together and reports what it left out. `format` turns a `Pair` into token ids, in the project's own
format or by the base's chat template, which `template` checks. `votes` holds the preferences that
people give on the vote page, and `style` counts how answers begin, end and repeat themselves. Every
phase reads the same `Pair`s through the same functions, so SFT learns to write, the reward model to
read and PPO to sample one and the same format. Trainers get token ids, never text.
"""
