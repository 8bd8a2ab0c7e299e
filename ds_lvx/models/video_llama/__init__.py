"""Video-LLaMA. Importing this package imports no torch."""
