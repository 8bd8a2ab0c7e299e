"""idefics (v1). Importing this package imports no torch."""
