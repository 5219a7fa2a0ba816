"""Programs that run in a child process, so that their libraries and memory are freed with the step."""
