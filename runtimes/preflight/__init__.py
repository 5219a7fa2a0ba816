"""The preflight check: facts of the box, and whether they fit what the bundle needs."""
