"""MOSS-VL. Importing this package imports no torch."""
