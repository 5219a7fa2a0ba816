"""The code that is copied onto the box and runs there alone: ``python -m runtimes check | serve | bench | …``.

Nothing here imports packager; the two sides share JSON files only (manifest.json, report.json). Python 3.10 or newer.
"""
