"""A checkpoint as it was saved: config, weight headers, tokenizer, chat template, adapters."""
