"""InternVL of transformers. Importing this package imports no torch."""
