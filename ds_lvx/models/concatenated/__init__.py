"""Models whose visual tokens stand among the text's, and stay on the rank that encodes them.

Importing this package imports no torch.
"""
