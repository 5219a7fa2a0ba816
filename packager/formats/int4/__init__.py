"""Tuned 4-bit integers, and the GPTQ and AWQ folders that hold them."""
