"""What takes seconds to import, once: in the server that forks the ranks (`tests.ranks`)."""

# ruff: noqa: E402

from __future__ import annotations

import atexit
import functools
import gc
import os

gc.disable()  # nothing of what is imported is garbage
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Who asks for GPUs while this is imported shall not start CUDA, which no fork survives.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import peft  # noqa: F401
import pytest  # noqa: F401
import torch
import transformers.models.mllama.modeling_mllama
import transformers.models.mllama.processing_mllama
import transformers.trainer  # noqa: F401
from deepspeed.utils import numa, nvtx
from transformers import conversion_mapping

import ds_lvx.initialize
import ds_lvx.training.export
import ds_lvx.training.loop  # noqa: F401
from ds_lvx.models import FAMILIES

for name in FAMILIES:
    FAMILIES.named(name)  # with transformers' own modules of it

# ZeRO-3 starts `numactl` for every parameter, and writes the numbers of each into messages that
# nobody reads: half the start of an engine.
numa.get_numa_cores = functools.cache(numa.get_numa_cores)
nvtx.enable_nvtx = False  # names every function of ZeRO's to a profiler of GPUs
torch.nn.Parameter.__repr__ = object.__repr__  # type: ignore[assignment]
# What a process makes before it first loads or saves a model, in one second and a half.
conversion_mapping.get_checkpoint_conversion_mapping("mllama")
# A collection in a process that is forked looks at what came since, and copies no page of this.
gc.freeze()
gc.enable()
atexit.register(gc.unfreeze)  # else libraries say at its end what has leaked
