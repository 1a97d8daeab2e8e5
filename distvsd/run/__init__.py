"""A training run: its parts are built, the loop runs, and what is due after a round is done."""
