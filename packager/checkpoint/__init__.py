"""Reading a saved checkpoint: config, weight headers, tokenizer, chat template, adapters."""
