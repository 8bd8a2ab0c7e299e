"""Pinned memory on the host for tensors of gigabytes: taken once, used again, and no larger.

PyTorch's own allocator rounds a pinned block up to a power of two, up to twice what was asked for.
Here ordinary memory is registered with the driver, which takes seconds, and so is kept for the next
tensor: the features of a batch, and their gradient, are about as long as those of the last one.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LEAST_BYTES = 2**20  # smaller ones are PyTorch's
_SPARE = 16  # one part in so many is added: the next one may be a little longer
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context


@dataclass(eq=False)
class _Block:
    """Memory, uint8 ``[bytes]``, and the stream of its last user."""

    memory: Tensor
    stream: Any
    is_registered: bool


class HostMemory:
    """Blocks of pinned memory. A block is free when no tensor that lies in it is left.

    What is written there next waits, on the device, for what its last user has launched. The host
    waits for nothing: it must not write to a tensor by itself before the device has.
    """

    def __init__(self) -> None:
        self._free: list[_Block] = []

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor; on a machine without an accelerator an ordinary one."""
        nbytes = shape.numel() * dtype.itemsize
        pins = torch.accelerator.is_available()
        if not pins or nbytes < _LEAST_BYTES:
            return torch.empty(shape, dtype=dtype, pin_memory=pins, device="cpu")
        block = self._take(nbytes)
        # The storage of a tensor ends unseen; that of an array that it holds does not.
        place = block.memory.numpy()[:nbytes]
        weakref.finalize(place, self._free.append, block).atexit = False
        return torch.from_numpy(place).view(dtype).view(shape)

    def _take(self, nbytes: int) -> _Block:
        current = torch.accelerator.current_stream()
        fitting = [block for block in self._free if len(block.memory) >= nbytes]
        if not fitting:
            self.release()
            return _pinned(nbytes + nbytes // _SPARE, current)
        block = min(fitting, key=lambda block: len(block.memory))
        self._free.remove(block)
        if block.stream != current:
            current.wait_stream(block.stream)
        block.stream = current
        return block

    def release(self) -> None:
        """Give free blocks back to the system; waits for the device if there are any."""
        if self._free:
            torch.accelerator.synchronize()
        while self._free:
            block = self._free.pop()
            if block.is_registered:
                torch.cuda.cudart().cudaHostUnregister(block.memory.data_ptr())


def _pinned(nbytes: int, stream: Any) -> _Block:
    if torch.cuda.is_available():
        memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, _PORTABLE)
        if int(error) == 0:
            return _Block(memory, stream, is_registered=True)
    memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True, device="cpu")
    return _Block(memory, stream, is_registered=False)
