"""Models whose adapter makes a few tokens of an image, which stand among the text's own.

Importing this package imports no torch.
"""
