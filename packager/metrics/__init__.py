"""Scores of two sets of outputs, and the thresholds that they must meet."""
