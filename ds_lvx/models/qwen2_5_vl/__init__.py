"""Qwen2.5-VL of transformers. Importing this package imports no torch."""
