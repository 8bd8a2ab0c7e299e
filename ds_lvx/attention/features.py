"""Visual features in chunks of tokens, on the device or streamed to it from the host.

The features of a long video are gigabytes that every cross-attention layer needs once. `offload`
moves them to pinned host memory; a layer then streams them back, one chunk under the projection of
the one before, so that the device holds two chunks of them at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor

from ds_lvx.attention.host_memory import HostMemory


def chunk_lengths(
    kv_lengths: Sequence[int], rank: int, chunk_tokens: int | None, *, elsewhere: int = 0
) -> list[int]:
    """Tokens of each chunk of a rank's features: at most ``chunk_tokens`` each, evenly split.

    Every rank has the same number of chunks, empty ones included: a layer's projection then runs
    equally often everywhere, which ZeRO-3's gathering of its weights depends on.

    Args:
        kv_lengths: of the group's ranks.
        rank: whose features.
        chunk_tokens: of a chunk, at most; None for one chunk.
        elsewhere: the most tokens of a rank of another group that must run as often.
    """
    longest = max(*kv_lengths, elsewhere)
    count = 1 if chunk_tokens is None else max(-(-longest // chunk_tokens), 1)
    each, more = divmod(kv_lengths[rank], count)
    return [each + (index < more) for index in range(count)]


class Chunks:
    """Features ``[B, T, ...]``, a slice of T at a time, on the device that computes.

    Args:
        features: on that device, or on the host.
        lengths: tokens of each chunk; they add up to T.
        device: where the chunks are needed.
    """

    def __init__(self, features: Tensor, lengths: Sequence[int], device: torch.device) -> None:
        self.features = features.detach()
        stops = accumulate(lengths, initial=0)
        self.slices = [slice(start, stop) for start, stop in pairwise(stops)]
        self._device = device

    def __len__(self) -> int:
        return len(self.slices)

    @property
    def on_host(self) -> bool:
        """Whether the features have to be streamed to the device."""
        return self.features.device != self._device

    def zeros(self, like: Tensor) -> Tensor:
        """0 on the device, as a tensor of a shape and dtype that takes no memory."""
        return torch.zeros((), dtype=like.dtype, device=self._device).expand(like.shape)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the tokens, and their features."""
        if self.on_host:
            yield from self._streamed()
        elif len(self.slices) == 1:
            yield self.slices[0], self.features
        else:
            for tokens in self.slices:
                yield tokens, self.features[:, tokens]

    def _streamed(self) -> Iterator[tuple[slice, Tensor]]:
        """With the copy of the next chunk under way while its predecessor is in use.

        Two buffers take turns, however far the host is ahead: a copy waits on the device until
        what its buffer held before has been used, which was launched before the next was asked for.
        """
        current = torch.accelerator.current_stream(self._device)
        copies = torch.Stream(self._device)
        most = max(tokens.stop - tokens.start for tokens in self.slices)
        numbers = self.features[:, :most].numel()
        buffers = [self.features.new_empty(numbers, device=self._device) for _ in self.slices[:2]]

        def start(number: int) -> Tensor:
            copies.wait_stream(current)  # which may still be writing the features to the host, too
            with copies:
                return self._copy(self.slices[number], buffers[number % 2])

        arriving = start(0)
        try:
            for number, tokens in enumerate(self.slices):
                chunk = arriving
                current.wait_stream(copies)
                if number + 1 < len(self.slices):
                    arriving = start(number + 1)
                yield tokens, chunk
        finally:
            current.wait_stream(copies)  # the buffers are this stream's memory again

    def _copy(self, tokens: slice, buffer: Tensor) -> Tensor:
        part = self.features[:, tokens]
        arriving = buffer[: part.numel()].view(part.shape)
        # Rows of a batch one by one: each is contiguous, so that its copy is asynchronous.
        for row, source in zip(arriving, part, strict=True):
            row.copy_(source, non_blocking=True)
        return arriving


class FeatureGradient:
    """The gradient of features, added up in one tensor by all the layers that share them.

    Autograd would hold the sum so far beside every layer's own gradient, each as large as the
    features; here a layer adds its own to the sum, a chunk at a time.

    Attributes:
        total: in the features' dtype and place; None as long as no layer has added to it.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self._complete = False  # a layer has been through all tokens
        self._nodes: WeakSet[Any] = WeakSet()

    def begin(self, node: Any) -> None:
        """A layer is about to add its gradient.

        Args:
            node: of the layer in autograd's graph, one for each time that it was applied. One that
                has added before belongs to a new backward: the sum so far is left over from one
                that failed.
        """
        if node in self._nodes:
            self.take()
        self._nodes.add(node)

    def add(self, chunks: Chunks, tokens: slice, gradient: Tensor | None) -> None:
        """Add one layer's gradient ``[B, t, ...]`` of a chunk; None is 0."""
        whole = len(chunks) == 1 and not chunks.on_host
        if self.total is None:
            if whole and gradient is not None:
                self.total = gradient  # nobody else has it
                return
            like = host_like if chunks.on_host else torch.empty_like
            self.total = like(chunks.features)
        place = self.total[:, tokens]
        if gradient is None:
            if not self._complete:
                for row in place:  # by the device, as all that is written there
                    row.copy_(chunks.zeros(row), non_blocking=True)
        elif not self._complete:
            for mine, row in zip(gradient, place, strict=True):
                row.copy_(mine, non_blocking=True)
        elif chunks.on_host:
            # On the device and back, in its stream: the host neither waits nor computes. Row by row
            # of the batch: those are contiguous, which pinned memory wants.
            for mine, row in zip(gradient, place, strict=True):
                mine.add_(row.to(gradient.device, non_blocking=True))
                row.copy_(mine, non_blocking=True)
        else:
            place.add_(gradient)

    def end_of_layer(self) -> None:
        """A layer has added all its chunks."""
        self._complete = True

    def take(self) -> Tensor | None:
        """The sum, which starts anew."""
        total, self.total, self._complete = self.total, None, False
        self._nodes.clear()
        return total


def share(features: Tensor) -> tuple[Tensor, FeatureGradient | None]:
    """Features for several layers, and the place where they add up its gradient.

    Returns:
        The features, to be given to every layer; and None where they want no gradient.
    """
    if not (features.requires_grad and torch.is_grad_enabled()):
        return features, None
    gradient = FeatureGradient()
    return cast(Tensor, _Share.apply(features, gradient)), gradient


class _Share(torch.autograd.Function):
    """The identity; its backward, which autograd runs after all layers', hands the sum on."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, gradient: FeatureGradient) -> Tensor:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *others: Tensor | None) -> tuple[Tensor | None, None]:
        total = ctx.gradient.take()
        (other,) = others  # of layers that keep K and V: autograd's own sum
        if total is None or other is None:
            return (other if total is None else total), None
        if total.device.type == "cpu" and torch.accelerator.is_available():
            torch.accelerator.synchronize()  # the host adds what the device may still be writing
        return total.add_(other), None


def offload(features: Tensor) -> Tensor:
    """Features in pinned host memory; on a CPU, whose memory is the host's, as they are.

    Args:
        features: ``[B, T, ...]`` on an accelerator.

    Returns:
        The same values on the host, differentiable: the gradient comes back on the device.
    """
    if features.device.type == "cpu":
        return features
    return cast(Tensor, _Offload.apply(features))


class _Offload(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.device = features.device
        return host_like(features).copy_(features, non_blocking=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].to(ctx.device, non_blocking=True)


def host_like(features: Tensor) -> Tensor:
    """An uninitialised tensor of features' shape on the host, pinned where there is a device."""
    return _memory.empty(features.shape, features.dtype)


_memory = HostMemory()
