"""Text generation around an engine: chat template, tokenizer, sampling, scheduling, JSON schemas."""
