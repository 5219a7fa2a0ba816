"""The proof: the source's scores, the artifact's scores, and what they must have in common."""
