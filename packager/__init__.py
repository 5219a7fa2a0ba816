"""packager: a fine-tuned checkpoint becomes a folder that a box without a network can run."""

__version__ = "0.1.0"
