"""One attention call by every method."""
