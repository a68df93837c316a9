"""People's feedback: a page to vote on. reward_train.py learns from the votes."""
