"""LLaVA-OneVision of transformers. Importing this package imports no torch."""
