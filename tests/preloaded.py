"""What takes seconds to import, once: in the server that forks the ranks (`tests.ranks`)."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import transformers.models.mllama.modeling_mllama  # noqa: F401

import ds_lvx.training.loop  # noqa: F401
