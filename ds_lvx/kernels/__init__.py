"""Who computes attention on one device: the choice of a kernel."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from ds_lvx.kernels import cudnn
from ds_lvx.kernels.auto import TRUSTED, AutoKernel, table_of
from ds_lvx.kernels.interface import Kernel
from ds_lvx.kernels.native import NativeKernel
from ds_lvx.kernels.reference import ReferenceKernel

__all__ = ["DTYPES", "KERNELS", "Kernel", "candidates", "choose", "describe", "unavailable"]

KERNELS = ("auto", "native", "triton", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def choose(name: str, q: Tensor) -> Kernel:
    """The kernel of this name for queries like ``q``.

    ``auto`` is, on CUDA, the fastest of `candidates` for each kind of request
    (`ds_lvx.kernels.auto`), and ``native`` elsewhere.

    Raises:
        ValueError: an unknown name, or a dtype, head_dim or device that the kernel cannot do; names
            the kernels that can.
    """
    if name not in KERNELS:
        raise ValueError(f"kernel: got {name!r}; expected one of {list(KERNELS)}")
    if q.dtype not in DTYPES:
        expected = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(
            f"q, k, v: got {q.dtype}; expected one of {expected}; convert them with .to(...)"
        )
    if name == "auto":
        found = candidates(q)
        return found[TRUSTED] if len(found) == 1 else AutoKernel(found, table_of(q.device))
    if name == "triton":
        return _triton(q)
    return ReferenceKernel() if name == "reference" else NativeKernel()


def candidates(q: Tensor) -> dict[str, Kernel]:
    """The kernels that ``auto`` chooses from for queries like ``q``, by name.

    None of them materialises S_q x S_kv. Off CUDA there is one: PyTorch's own.
    """
    found: dict[str, Kernel] = {TRUSTED: NativeKernel()}
    if q.device.type != "cuda":
        return found
    if cudnn.can(q):
        found["cudnn"] = cudnn.CudnnKernel()
    if unavailable(q) is None:
        found["triton"] = _triton(q)
    return found


def describe(q: Tensor) -> list[str]:
    """What ``auto`` takes for queries like ``q``, and why, in lines for a reader."""
    names = list(candidates(q))
    if names == [TRUSTED]:
        return [f"{TRUSTED}: the only one for {q.dtype} on {q.device.type} that is made for speed"]
    table = table_of(q.device)
    lines = [f"the fastest of {', '.join(names)} for each kind of call, as measured at the first"]
    lines.append(f"{len(table.entries())} kinds measured so far, in {table.path}")
    for kind, entry in table.entries().items():
        times = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in entry["seconds"].items())
        out = "".join(f"; not {name}: {why}" for name, why in entry["excluded"].items())
        lines.append(f"{kind}: {entry['chosen']} ({times}{out})")
    return lines


def unavailable(q: Tensor) -> str | None:
    """Why the kernel ``triton`` cannot do queries like ``q``; None when it can."""
    if find_spec("triton") is None:
        return (
            "kernel: got 'triton', which is not installed; pip install triton (Linux), or use "
            "'native' or 'reference'"
        )
    # Here, not above: Triton takes a second to import, and decides then whether to interpret.
    from ds_lvx.kernels.triton_kernel import problem

    found = problem(q)
    return found and f"kernel: got 'triton' for {found}; use 'native' or 'reference'"


def _triton(q: Tensor) -> Kernel:
    found = unavailable(q)
    if found is not None:
        raise ValueError(found)
    from ds_lvx.kernels.triton_kernel import TritonKernel

    return TritonKernel()
