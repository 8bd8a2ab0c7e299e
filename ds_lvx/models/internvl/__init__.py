"""InternVL: see `ds_lvx.models.internvl.family`."""
