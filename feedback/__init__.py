"""Feedback of people: a page to vote on, whose votes reward_train.py learns from."""
