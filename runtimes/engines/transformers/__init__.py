"""Int4 folders on torch alone."""
