"""What only `ppo_train.py` needs and would hide its loop."""
