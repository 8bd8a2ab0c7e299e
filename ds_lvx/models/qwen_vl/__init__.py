"""Qwen-VL, the first release, whose code comes with its checkpoints."""
