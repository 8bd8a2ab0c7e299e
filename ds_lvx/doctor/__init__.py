"""``ds-lvx doctor``: what this machine has, what runs on it, and whether it computes right."""
