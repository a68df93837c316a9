"""The frozen base and its roles: loading, training, sampling, and what fits the card.

`base` checks a base model on disk, `tokenizers` its tokenizer; `loading` brings weights into
memory, `roles` stacks an adapter for each role on the shared base, and `adapters` saves a role and
reads it back. `layers` computes one layer of the model, `decoder` all of them over texts of any
length, and `logprobs` the probabilities of chosen tokens. `decoding` makes one step of sampling,
replayed from CUDA `graphs`; `generation` samples whole responses with it. `plan` works out what a
run holds in memory, `card` how much of that fits, `micro_batches` how many tokens go through the
model at once, and `speed` what was reached. `trainer` is what SFT and reward training add to TRL's
trainers and do otherwise; `peft_workarounds` is what we do otherwise than PEFT, and `portable`
writes files that older libraries can read, too.
"""
