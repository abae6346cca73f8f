"""The numerical parts of a decoder: norms, rotary embeddings, attention."""
