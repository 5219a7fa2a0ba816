"""Tensor files and number formats: safetensors, GGUF headers, block types, rounding."""
