"""Qwen3.5 with a mixture of experts, of transformers. Importing this package imports no torch."""
