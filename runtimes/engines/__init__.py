"""One module or folder for each engine; a bundle carries its own only."""
