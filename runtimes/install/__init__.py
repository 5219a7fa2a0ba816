"""The installer: checks the box, installs the wheels, writes the launchers."""
