"""Qwen2-VL of transformers. Importing this package imports no torch."""
