"""The proof of an artifact: the source's scores, the artifact's scores, and the gate that compares them."""
