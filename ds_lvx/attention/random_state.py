"""The surroundings in which a function ran, so that it can run again and do the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


class RandomState:
    """The random generators of the CPU and of a tensor's device, as they are now."""

    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device.type
        self._cpu_state = torch.get_rng_state()
        self.devices, self._states = get_device_states(tensor)

    def restore(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self._cpu_state)
        if self.devices:
            set_device_states(self.devices, self._states, device_type=self.device)

    def equals(self, other: RandomState) -> bool:
        """Whether nothing random happened between the two."""
        pairs = zip(self._states, other._states, strict=True)
        return torch.equal(self._cpu_state, other._cpu_state) and all(
            torch.equal(mine, theirs) for mine, theirs in pairs
        )


class Setting:
    """Random state and autocast of a function's first run, for runs in backward.

    Args:
        tensor: one on the device where the function runs.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = torch.empty(0, device=tensor.device)
        self._start = RandomState(tensor)
        self._autocast = (
            torch.is_autocast_enabled(self._start.device),
            torch.get_autocast_dtype(self._start.device),
        )

    def change(self) -> RandomState | None:
        """The state of the generators now, or None when it is still that of the beginning."""
        now = RandomState(self._tensor)
        return None if now.equals(self._start) else now

    def playback(self) -> Playback:
        """A new run, from the beginning."""
        return Playback(self._tensor, self._start, self._autocast)


class Playback:
    """One more run, in pieces: each goes on with the random numbers where the last one stopped."""

    def __init__(
        self, tensor: Tensor, start: RandomState, autocast: tuple[bool, torch.dtype]
    ) -> None:
        self._tensor = tensor
        self._state = start
        self._autocast = autocast

    @contextmanager
    def piece(self) -> Iterator[None]:
        """Run with the first run's random numbers and autocast; the generators stay as they are."""
        enabled, dtype = self._autocast
        device = self._state.device
        with (
            torch.random.fork_rng(devices=self._state.devices, device_type=_fork_type(device)),
            torch.autocast(device, dtype=dtype, enabled=enabled),
        ):
            self._state.restore()
            yield
            self._state = RandomState(self._tensor)


def _fork_type(device: str) -> str:
    # fork_rng asks for a device module even when there are no devices to fork.
    return "cuda" if device == "cpu" else device
