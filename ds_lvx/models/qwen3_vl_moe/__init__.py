"""Qwen3-VL-MoE of transformers. Importing this package imports no torch."""
