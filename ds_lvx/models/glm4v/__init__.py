"""GLM-4.1V of transformers. Importing this package imports no torch."""
