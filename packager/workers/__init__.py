"""Programs that run in a child process, so that their libraries and memory end with the step."""
