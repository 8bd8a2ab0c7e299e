"""What a generation begins with, keeps and tells other ranks.

Importing this package imports no torch.
"""
