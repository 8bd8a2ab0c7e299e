"""What the ds_config says: the ``ds_lvx`` section, and what around it must agree with it."""

from ds_lvx.config.ds_config import by_path, check_ds_config, read_ds_config, zero_stage
from ds_lvx.config.layer_rule import LayerRule
from ds_lvx.config.section import LVXConfig, pattern_for, starred, summarise_names

__all__ = [
    "LVXConfig",
    "LayerRule",
    "by_path",
    "check_ds_config",
    "pattern_for",
    "read_ds_config",
    "starred",
    "summarise_names",
    "zero_stage",
]
