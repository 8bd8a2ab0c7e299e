"""Attention kernels of one device, timed side by side and compiled ahead of time."""
