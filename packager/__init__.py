"""packager: builds a signed folder from a fine-tuned checkpoint; a box without a network can run it."""

__version__ = "0.1.0"
