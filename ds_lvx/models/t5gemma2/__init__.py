"""T5Gemma2: an encoder of text and images, and a decoder. Importing it imports no torch."""
