"""The command line: click verbs, flags, and the only code that writes to the terminal."""
