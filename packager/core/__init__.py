"""The base of all other rooms: errors, progress, hashing, the store, child processes, pip."""
