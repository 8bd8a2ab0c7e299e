"""A model's whole training step: where its time goes by method, and its memory by setting."""
