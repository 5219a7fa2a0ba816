"""Verbs of the build machine: score, render, answer and encode through the engine that ships."""
