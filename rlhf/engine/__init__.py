"""The base and its roles: what loads it, trains it, samples from it, and fits it to the card."""
