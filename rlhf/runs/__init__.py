"""What any run needs, and nothing that knows a model.

`cli` reads the flags and turns `errors` into one line; `checks` refuses impossible flags, and
`advice` says what to do next. `folders` makes output appear whole or not at all, `checkpoints`
writes and checks the `run.json` that one phase hands to the next, `trained_prompts` knows what a
checkpoint was trained on, `resume` keeps states to continue from, `stop` listens for Ctrl-C, and
`trial` times a few steps. `processes` is for what several processes do together, `device` for what
one computes on, `hub` for what comes from the Hugging Face hub. `terminal` prints, `metrics` and
`curves` write a run's numbers, `statistics` gives them intervals, and `run_warnings` says what is
wrong with a finished run.
"""
