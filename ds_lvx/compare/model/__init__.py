"""A model's whole training step by every method, and where its time goes."""
