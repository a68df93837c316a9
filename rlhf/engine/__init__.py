"""The frozen base and its roles: loading, training, sampling, and what fits the card.

`base` checks a base model on disk, `tokenizers` its tokenizer; `loading` brings weights into
memory, `roles` stacks an adapter for each role on the shared base, and `adapters` saves a role and
reads it back. `layers` computes one layer of the model out of `linear_maps` and `attention`,
`decoder` all layers over texts of any length, and `logprobs` the probabilities of chosen tokens.
`decoding` makes one step of sampling, replayed from CUDA `graphs`; `generation` samples whole
responses with it. `plan` works out what a run holds in memory, `card` how much of that fits,
`micro_batches` how many tokens go through the model at once, and `speed` what was reached.
`trainer` and its `callbacks` hold what SFT and reward training add to TRL's trainers and do
differently, `peft_workarounds` what we do differently from PEFT. `portable` writes files that older
libraries can read too.
"""
