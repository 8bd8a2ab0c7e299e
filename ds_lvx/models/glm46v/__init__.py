"""GLM-4.6V's classes of transformers. Importing this package imports no torch."""
