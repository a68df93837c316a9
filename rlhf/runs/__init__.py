"""What any run needs, and nothing that knows a model.

`cli` reads the flags and turns `errors` into one line; `checks` refuses impossible settings, and
`advice` words what to do next. `folders` makes output appear whole or not at all, `checkpoints`
writes and checks the `run.json` that one phase hands to the next, `resume` keeps states to
continue from, `stop` listens for Ctrl-C, and `trial` times a few steps. `processes` is what several
processes do together, `device` what one computes on, `hub` what comes from the Hugging Face hub.
`terminal` prints, `metrics` and `curves` write a run's numbers, `statistics` gives them intervals,
and `run_warnings` says what is wrong with a finished run.
"""
