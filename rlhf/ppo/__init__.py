"""What only `ppo_train.py` needs and would hide its loop.

`checks` refuses flags that do not go together. `batch` lays an update's episodes out and holds what
was measured of them; `reward_function` runs a score of the user's own. `evaluation` compares the
policy with SFT on held-out prompts, `log` turns all of it into metrics and lines, and `state` saves
a run and restores it to the very update.
"""
