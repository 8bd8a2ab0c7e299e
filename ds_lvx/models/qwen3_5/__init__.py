"""Qwen3.5 of transformers. Importing this package imports no torch."""
