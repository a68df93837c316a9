"""What we say about a model, before and after training.

`dry_run` says what a run would do and whether it fits the card, `reward_evaluation` what a reward
model gets right, `probe` whether harmful requests are refused. `answers` loads the models of a
comparison and asks them, `page` renders the comparison as one HTML file, and `model_card` writes
the README of an exported model.
"""
