"""FlashAttention 3 and 4 behind PyTorch's flash operators, where their packages are installed.

PyTorch has FlashAttention 2 built in, and lets another version take its operators' place for the
whole process (`torch.nn.attention.activate_flash_attention_impl`): then `flash` runs it, and so do
the model's own layers that PyTorch computes by flash attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import attention

from ds_lvx.kernels.flash import version_in_place
from ds_lvx.kernels.table import table_of
from ds_lvx.kernels.warn import warn_once

BUILTIN = "builtin"


@dataclass(frozen=True)
class Version:
    """What a version needs.

    Attributes:
        module: that PyTorch takes it from.
        capabilities: major compute capabilities that it runs on.
    """

    module: str
    capabilities: tuple[int, ...]


VERSIONS = {
    "FA3": Version("flash_attn_interface", (9,)),
    "FA4": Version("flash_attn.cute.interface", (9, 10)),
}


def activate(name: str) -> bool:
    """Let a version take the place of the built-in one, until `restore`.

    Where it cannot, a warning on the first rank says why, and the built-in one stays.

    Args:
        name: a key of `VERSIONS`, or ``builtin``: nothing happens.

    Returns:
        Whether it did.
    """
    if name == BUILTIN:
        return False
    problem = obstacle(name) or _activated(name)
    if problem is not None:
        warn_once(
            f"flash_attention: got {name!r}, but {problem}; PyTorch's own FlashAttention goes on "
            f"in its place"
        )
        return False
    return True


def restore() -> None:
    """Give PyTorch's operators back to its own FlashAttention; nothing where that is in place."""
    if version_in_place() is not None:
        attention.restore_flash_attention_impl()
        table_of.cache_clear()


@contextmanager
def used(name: str) -> Iterator[None]:
    """`activate` and `restore`.

    Raises:
        RuntimeError: it cannot be used here, and why.
    """
    problem = obstacle(name) or _activated(name)
    if problem is not None:
        raise RuntimeError(f"{name}: {problem}")
    try:
        yield
    finally:
        restore()


def obstacle(name: str) -> str | None:
    """Why a version cannot run on this machine's GPU, as far as one can tell without loading it."""
    version = VERSIONS[name]
    if not hasattr(attention, "activate_flash_attention_impl"):
        return f"PyTorch {torch.__version__} takes no other FlashAttention than its own"
    if not torch.cuda.is_available():
        return "this machine has no CUDA GPU"
    major, minor = torch.cuda.get_device_capability()
    if major not in version.capabilities:
        able = " or ".join(f"{each}.x" for each in version.capabilities)
        return f"it needs compute capability {able}, and this GPU has {major}.{minor}"
    return None


def _activated(name: str) -> str | None:
    """Why PyTorch could not load it; None: it is in place."""
    try:
        attention.activate_flash_attention_impl(name)
    # It is somebody else's package, and imports whatever it likes.
    except (ImportError, OSError, RuntimeError, ValueError, AttributeError) as error:
        module = VERSIONS[name].module
        return f"{module} cannot be loaded ({type(error).__name__}: {error}); install it"
    table_of.cache_clear()  # it was measured with another one
    return None
