"""GLM-4.5V and GLM-4.6V of transformers. Importing this package imports no torch."""
