"""What everything else stands on: errors, progress, hashing, the store, child processes, pip."""
