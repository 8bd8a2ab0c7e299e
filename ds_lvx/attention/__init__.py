"""Distributed attention: the layout of a batch, one file a method, and what they share."""
