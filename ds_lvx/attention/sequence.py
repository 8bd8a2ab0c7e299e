"""Putting a split sequence together again, with gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_lvx.distributed.agreement import require_same
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.groups import SequenceParallelGroups, resolve
from ds_lvx.kernels.merge import accumulation_dtype


def gather_sequence(
    x: Tensor,
    dim: int = 1,
    *,
    groups: SequenceParallelGroups | None = None,
    shard: Mapping[str, Any] | None = None,
) -> Tensor:
    """This rank's shard of a sequence -> the whole, on every rank, differentiable.

    Args:
        x: this rank's shard, any dtype; any length along ``dim``, 0 included.
        dim: the dimension that is split.
        groups: the groups; None is the current ones, or all ranks as one group.
        shard: what `ds_lvx.shard_batch` returned, where x ``[B, s, ...]`` has something of each of
            its tokens, such as logits. Under zigzag, of a model whose visual tokens stand among
            the text's, and where rows share prefixes, a rank's tokens are not side by side; with it
            they are put in order, in rows as they came.
            Empty: x has nothing to do with the tokens of the last batch.

    Returns:
        The shards of all ranks, one after the other along ``dim``, or ``[B, T, ...]`` in the order
        of the whole text, zeros where padding is on no rank; x itself with a ``shard`` of a model
        whose text every rank runs whole. In backward every rank's gradient of the whole is summed,
        in fp32, and each gets its shard of the sum.

    Raises:
        ValueError: shapes that differ elsewhere than in ``dim``, or dtypes that differ, on all
            ranks; a ``dim`` that x does not have, or with ``shard`` another one than 1 or an x that
            has not as many tokens; no ``shard``, and as many as this rank's tokens of the last
            batch, which are not side by side.

    Collectives: one agreement on the CPU; an all-gather of ``(n - 1)`` times x's bytes, and in
    backward an all-to-all of as many as the other ranks' shards have. Every rank must run backward
    if one does.
    """
    if getattr((shard or {}).get("ds_lvx"), "whole_text", False):
        return x
    channel = resolve(groups)
    record: dict[str, Any] = {}
    error: Exception | None = None
    try:
        record = _record(x, dim) | {"with a shard": bool(shard)}
        if shard is None:
            _check_order(record, channel)
        elif shard:
            _check_tokens(x, record["dim"], shard)
    # Whatever it is: the other ranks must not wait for this one.
    except Exception as raised:  # noqa: BLE001
        error = raised
    records = channel.agree(record, error)
    same = ("dim", "other dimensions", "dtype", "grad_enabled", "with a shard")
    require_same(records, same, what="gather_sequence")
    lengths, dim = tuple(other["length"] for other in records), record["dim"]
    wants_grad = any(other["needs_grad"] for other in records)
    whole = gather_shards(x, dim, channel=channel, lengths=lengths, wants_grad=wants_grad)
    if not shard:
        return whole
    ordered: Tensor = shard["ds_lvx"].in_order(whole)
    return ordered


def gather_shards(
    x: Tensor, dim: int, *, channel: Channel, lengths: tuple[int, ...], wants_grad: bool
) -> Tensor:
    """`gather_sequence` of shards of which every rank knows the lengths; nothing is agreed on.

    Args:
        x: this rank's shard, any dtype.
        dim: the dimension that is split, 0 or more.
        channel: the ranks that hold shards.
        lengths: of their shards.
        wants_grad: a rank's shard wants a gradient; the same on every rank.
    """
    # A rank whose own shard wants none takes part in backward all the same.
    anchor = torch.zeros((), device=x.device, requires_grad=wants_grad and torch.is_grad_enabled())
    whole: Tensor = _GatherSequence.apply(channel, lengths, dim, anchor, x)
    return whole


def _check_order(record: Mapping[str, Any], channel: Channel) -> None:
    """Raise a ValueError where x seems to belong to tokens that are not side by side."""
    if channel.scattered and (record["dim"], record["length"]) == (1, channel.scattered):
        raise ValueError(
            f"gather_sequence: got {record['length']} along dim 1 without a shard; this rank has "
            "as many tokens of the last batch, and they are not side by side (zigzag, "
            "visual tokens among the text, or shared prefixes): expected shard=, what shard_batch "
            "returned, which puts them in order, or shard={} for one rank after the other"
        )


def _check_tokens(x: Tensor, dim: int, shard: Mapping[str, Any]) -> None:
    """Raise a ValueError unless x has something of each token of a shard."""
    if dim != 1:
        raise ValueError(f"dim: got {dim} with a shard; expected 1, the tokens' dimension")
    batch = shard["ds_lvx"]
    rows = next((len(each) for each in (batch.order, batch.branches) if each is not None), len(x))
    wanted = (rows, batch.text_lengths[batch.channel.rank])
    if tuple(x.shape[:2]) != wanted:
        raise ValueError(
            f"gather_sequence: got shape {list(x.shape)} for a shard of {list(wanted)} tokens; "
            "expected something of each of them: with ds_lvx.loss_tiles above 1 the model makes "
            "its loss without logits in training; remove loss_tiles"
        )


def _record(x: Any, dim: Any) -> dict[str, Any]:
    if not isinstance(x, Tensor) or not isinstance(dim, int):
        kinds = f"{type(x).__name__} and {type(dim).__name__}"
        raise ValueError(f"gather_sequence: got {kinds}; expected a tensor and an int")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: got {dim} for a tensor of {x.dim()} dimensions")
    dim %= x.dim()
    return {
        "length": x.shape[dim],
        "dim": dim,
        "other dimensions": [size for axis, size in enumerate(x.shape) if axis != dim],
        "dtype": str(x.dtype),
        "needs_grad": x.requires_grad,
        "grad_enabled": torch.is_grad_enabled(),
    }


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, channel: Channel, lengths: tuple[int, ...], dim: int, anchor: Tensor, x: Tensor
    ) -> Tensor:
        ctx.channel, ctx.lengths, ctx.dim = channel, lengths, dim
        (whole,) = channel.gather_rows([x], [dim], lengths).wait()
        return whole.contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # In order: a rank's own rows of everyone's gradient.
        (parts,) = ctx.channel.exchange_rows([gradient], [ctx.dim], ctx.lengths).wait()
        total = parts.sum(dim=0, dtype=accumulation_dtype(gradient.dtype))
        return None, None, None, None, total.to(gradient.dtype)
