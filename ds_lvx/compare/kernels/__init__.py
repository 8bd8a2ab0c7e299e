"""Whether a kernel is right, and its seconds: what `ds-lvx doctor --tune` and a benchmark ask."""
