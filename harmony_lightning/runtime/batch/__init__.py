"""Minibatches: cut into microbatches by `minibatch`, after the rule in `rows`; what steps return is merged by `outputs`."""
