"""One room for each artifact format, which converts, quantizes and packs a checkpoint."""
