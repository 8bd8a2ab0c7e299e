"""Qwen3-VL of transformers. Importing this package imports no torch."""
