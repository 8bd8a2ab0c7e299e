"""What takes seconds to import, once: in the server that forks the ranks (`tests.ranks`)."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import peft  # noqa: F401
import transformers.models.mllama.modeling_mllama
import transformers.models.mllama.processing_mllama  # noqa: F401
from transformers import conversion_mapping

import ds_lvx.initialize
import ds_lvx.training.export
import ds_lvx.training.loop  # noqa: F401

# What a process makes before it first loads or saves a model, in one second and a half.
conversion_mapping.get_checkpoint_conversion_mapping("mllama")
