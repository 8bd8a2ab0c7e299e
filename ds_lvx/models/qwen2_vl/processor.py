"""Text and pixels for Qwen2-VL, from the files of a checkpoint: as Qwen2.5-VL's, but the model asks
for no seconds."""

from __future__ import annotations

from ds_lvx.models.qwen2_5_vl import processor as qwen


class Processor(qwen.Processor):
    """See `ds_lvx.models.qwen2_5_vl.processor.Processor`."""

    says_seconds = False
