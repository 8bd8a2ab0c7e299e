"""VideoLLaMA 3 of transformers. Importing this package imports no torch."""
