"""The plan: which recipe and target, which options, how large, how long, and why not."""
