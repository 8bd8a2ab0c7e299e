"""CUDA without CUDA: tensors that compute nothing, on which what the host does to a GPU is counted.

Inside `FakeCuda` a tensor on ``cuda:0`` is torch's own `FakeTensor` of that device: every operation
has its shapes, dtypes and devices checked, and none is run. What lies on the CPU is real, so that
decisions on the CPU are made as on a machine with a GPU. Counted are the operations that launch
something, and the places where the host would wait for the GPU.

An autograd graph needs a guard of its device, which a build of PyTorch without CUDA does not have.
Hence the shell around each `FakeTensor`: to autograd it lies on ``meta``, to Python on ``cuda:0``.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.jit import KernelInterface

_aten = torch.ops.aten
DEVICE = torch.device("cuda:0")
CAPABILITY = (9, 0)
_OURS = ("cuda", "meta")
"""Types of our tensors' device, as Python sees it and as PyTorch's own code does."""

# No kernel: the tensor gets memory, or another view of it.
_FREE = {
    *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "resize_"),
    *("detach", "alias", "_unsafe_view", "_reshape_alias", "lift_fresh", "record_stream"),
}


class Shell(Tensor):
    """A tensor on ``cuda:0`` as Python sees it."""

    fake: FakeTensor

    @staticmethod
    def __new__(cls, fake: FakeTensor) -> Shell:
        """Put a shell around a fake tensor."""
        shell: Shell = Tensor._make_wrapper_subclass(
            cls,
            fake.shape,
            strides=fake.stride(),
            storage_offset=fake.storage_offset(),
            dtype=fake.dtype,
            device=torch.device("meta"),
        )
        shell.fake = fake
        return shell

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def get_device(self) -> int:
        """The number of the device."""
        return 0

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Shell({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """No operation of it runs by itself."""
        raise RuntimeError(f"{func}: got a tensor of bench.fake_cuda outside of FakeCuda")


class FakeCuda(TorchDispatchMode):
    """Fake tensors for what is on CUDA, real ones for what is on the CPU; enter it once.

    Attributes:
        launches: operations on the device since the last `reset`, by name; views are none.
        waits: ``(operation, place)`` of each time that the host would have waited for the device,
            for a number or for a copy. The program goes on with 1 for a number; a shape that
            depends on numbers is FakeTensorMode's error.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._stack = ExitStack()
        self._pinned: dict[int, Tensor] = {}  # by storage; held, so that no other gets its number
        self._paused = 0
        self.reset()

    def reset(self) -> None:
        """Count from 0."""
        self.launches: Counter[str] = Counter()
        self.waits: list[tuple[str, str]] = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count no launches meanwhile."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def launched(self, name: str) -> None:
        """Count one launch, unless `paused`."""
        if not self._paused:
            self.launches[name] += 1

    def __enter__(self) -> FakeCuda:
        for name, stand_in in {**_of_torch_cuda(), "synchronize": self._synchronize}.items():
            self._stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        # ``kernel[grid]`` of a kernel in Triton: its launch is counted, and does nothing.
        launch = mock.patch.object(
            KernelInterface,
            "__getitem__",
            lambda kernel, grid: lambda *_, **__: self.launched(kernel.fn.__name__),
        )
        self._stack.enter_context(launch)
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._stack.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        shells = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Shell)]
        if not shells and func is _aten.is_pinned.default:
            return self._is_pinned(args[0])
        pins = kwargs.pop("pin_memory", False)
        if pins or func is _aten._pin_memory.default:
            pinned = func(*args, **kwargs) if pins else args[0].clone()
            self._pinned[pinned.untyped_storage()._cdata] = pinned
            return pinned
        device = kwargs.get("device")
        if not shells and (device is None or torch.device(device).type not in _OURS):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            return self._transfer(func, args, kwargs)
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        if name == "_to_copy" and _moves_nowhere(given):
            return _shelled(_aten.alias.default(given["self"].fake), {})
        if name in ("_to_copy", "copy_"):
            self._tell_of_copy(given)
        if name not in _FREE and not func.is_view:
            self.launched(name)
        try:
            if name.lstrip("_").startswith("index") and _by_mask(args[1]):
                raise DynamicOutputShapeException(func)
            with self._mode:
                resampled = _RESAMPLED.get(name)
                if resampled is None:
                    found = func(*tree_map(_fake, args), **tree_map(_fake, kwargs))
                else:  # FakeTensorMode would compute it
                    found = _aten.new_empty.default(_fake(args[0]), resampled(given))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            self.waits.append((name, _place()))
            if isinstance(error, DataDependentOutputException):
                return 1
            raise
        written = {id(shell.fake): shell for shell in shells}
        return tree_map(lambda one: _shelled(one, written), found)

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def _synchronize(self, device: Any = None) -> None:
        self.waits.append(("synchronize", _place()))

    def _tell_of_copy(self, given: Mapping[str, Any]) -> None:
        """Note a copy between host and device for which the host waits."""
        source = given.get("src", given["self"])
        target = given["self"].device if "src" in given else given.get("device") or source.device
        if (source.device.type == "cpu") == (target.type == "cpu"):
            return
        on_host = given["self"] if target.type == "cpu" else source
        if not given.get("non_blocking"):
            self.waits.append(("a blocking copy", _place()))
        elif not self._is_pinned(on_host):
            self.waits.append(("a copy of memory that is not pinned", _place()))

    def _transfer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A collective, which the group of ranks that are not there takes for done."""
        self.launched(func.overloadpacket.__name__)
        stand_ins = {}

        def real(one: Any) -> Any:
            if not isinstance(one, Shell):
                return one
            stand_in = torch.empty(one.shape, dtype=one.dtype)  # which nobody reads or writes
            stand_ins[id(stand_in)] = one
            return stand_in

        found = func(*tree_map(real, args), **tree_map(real, kwargs))
        return tree_map(lambda one: stand_ins.get(id(one), one), found)


def _fake(one: Any) -> Any:
    """An argument as `FakeTensorMode` gets it."""
    if isinstance(one, Shell):
        return one.fake
    return DEVICE if isinstance(one, torch.device) and one.type in _OURS else one


_RESAMPLED: Mapping[str, Callable[[Mapping[str, Any]], list[int]]] = {
    "grid_sampler_2d": lambda of: [*of["input"].shape[:2], *of["grid"].shape[1:3]],
    "upsample_bilinear2d": lambda of: [*of["self"].shape[:2], *of["output_size"]],
    "upsample_bilinear2d_backward": lambda of: [*of["input_size"]],
}
"""Operations on pictures ``[N, C, H, W]``: the shape of what each returns, by its arguments."""


def _shelled(one: Any, written: dict[int, Shell]) -> Any:
    """A result as the program gets it."""
    if not isinstance(one, FakeTensor):
        return one
    if one.device.type != "cuda":
        return torch.zeros(one.shape, dtype=one.dtype)  # on the host: a wait, and told already
    return written[id(one)] if id(one) in written else Shell(one)


def _by_mask(places: Any) -> bool:
    """Whether an index is a mask, whose True places have to be counted."""
    return any(isinstance(t, Tensor) and t.dtype == torch.bool for t in tree_leaves(places))


def _moves_nowhere(given: Mapping[str, Any]) -> bool:
    """Whether a tensor is asked for where it is, and as it is: only its shell is elsewhere."""
    tensor, device = given["self"], given.get("device")
    here = isinstance(tensor, Shell) and device is not None and device.type != "cpu"
    return here and given.get("dtype") in (None, tensor.dtype)


def _place() -> str:
    """Who asked: the innermost function outside of torch."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and path != __file__ and not path.startswith("<"):
            break
        frame = frame.f_back
    assert frame is not None
    parts = Path(path).parts
    return f"{'/'.join(parts[-3:])}:{frame.f_code.co_name}"


def _of_torch_cuda() -> dict[str, Callable[..., Any]]:
    """What is asked of `torch.cuda` on the way, answered as by a GPU."""
    properties = SimpleNamespace(multi_processor_count=132)
    state = torch.zeros(16, dtype=torch.uint8)  # of the generator: it is kept on the host
    return {
        "_lazy_init": lambda: None,
        "_exchange_device": lambda index: index,
        "_maybe_exchange_device": lambda index: index,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": lambda device=None: properties,
        "get_rng_state": lambda device=None: state.clone(),
        "set_rng_state": lambda state, device=None: None,
        "is_current_stream_capturing": lambda: False,
    }
