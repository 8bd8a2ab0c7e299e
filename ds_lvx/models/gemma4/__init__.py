"""Gemma 4 of transformers. Importing this package imports no torch."""
