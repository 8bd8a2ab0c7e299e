"""OpenFlamingo. Importing this package imports no torch."""
