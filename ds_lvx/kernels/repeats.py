"""Whether shapes come again often enough for cuDNN, which prepares for each of them.

For every new shape cuDNN compiles what it runs: 0.44 s forward and 0.55 s backward on a B200 with
PyTorch 2.11 (github.com/modelscope/FunASR/issues/3704). Texts of ever other lengths would pay that
in every step, and save some milliseconds. So a shape runs by another kernel until what cuDNN would
have saved on it is what preparing costs: at most twice what the better choice would have taken,
whatever comes.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Hashable

import torch

PREPARING_S = 0.5
"""Of one shape in one direction."""
SAVED_S = {"forward": 5e-16, "backward": 1e-15}
"""Of one operation of the products, beside Triton's kernel: 476 against 575 TFLOP/s on an H200
forward, 353 against 534 in backward, for 2,304 queries (docs/benchmarks/kernels.json)."""
_MOST = 4096  # shapes that are remembered


class Repeats:
    """What cuDNN would have saved so far, by shape.

    Args:
        preparing_s: what a shape costs; 0: every shape pays at once.
    """

    def __init__(self, preparing_s: float = PREPARING_S) -> None:
        self._preparing_s = preparing_s
        self._saved_s: OrderedDict[Hashable, float] = OrderedDict()

    def pay(self, shapes: Hashable, *, saved_s: float, count: int = 1) -> bool:
        """Whether it has been worth it by now; counts the call.

        Args:
            shapes: of a call or some.
            saved_s: by cuDNN, of this call.
            count: how many shapes there are to prepare for.
        """
        saved = self._saved_s.pop(shapes, 0.0)
        if saved >= count * self._preparing_s:
            self._saved_s[shapes] = saved
            return True
        self._saved_s[shapes] = saved + saved_s
        if len(self._saved_s) > _MOST:
            self._saved_s.popitem(last=False)  # the one that has not come for the longest time
        return False


@functools.cache
def repeats_on(device: torch.device) -> Repeats:
    """Those of this process on a device; all layers have one."""
    return Repeats()
