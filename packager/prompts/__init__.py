"""Prompts: calibration data, training templates, chat templates, and the prompt contract between them."""
