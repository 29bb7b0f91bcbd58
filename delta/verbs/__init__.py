"""The verbs of `python -m delta`, one a file: `add_parser(verbs)` says the flags and what runs."""
