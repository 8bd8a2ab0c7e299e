"""Which rank holds which part of a sample, and the losses of the parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from ds_lvx.attention.checkpointing import is_partitioned
from ds_lvx.distributed.failures import named
from ds_lvx.distributed.groups import SequenceParallelGroups, resolve
from ds_lvx.distributed.together import telling
from ds_lvx.kernels.transfer import HOST
from ds_lvx.models import family_of
from ds_lvx.models.cuts import before, parts_of, span, split
from ds_lvx.models.draft import Draft
from ds_lvx.models.patch import KEYWORD
from ds_lvx.models.shard import shard


def owned(
    count: int | Sequence[int],
    *,
    groups: SequenceParallelGroups | None = None,
    model: nn.Module | None = None,
    costs: Sequence[float] | None = None,
) -> Sequence[int]:
    """Which of a sample's frames this rank holds, so that it decodes only those.

    Args:
        count: frames of the sample. With a model whose visual tokens stand among the text's: its
            units (images, and temporal patches of videos), or, where they differ, the tokens of
            each.
        groups: the groups; None is the current ones, or all ranks as one group.
        model: that will get them. Needed for a model whose visual tokens stand among the text's: a
            rank holds early frames and late ones, because a token sees those before it.
        costs: of each frame, in any unit, 0 or more: what it takes to decode or to encode, such as
            its pixels or tiles; the same on every rank. For models whose frames stand beside the
            text, with `shard_batch` of ``frames="local"``.

    Returns:
        A contiguous range, balanced: the first ``count % sp_size`` ranks hold one more; empty
        where there are fewer frames than ranks. With ``costs`` each rank's frames cost about as
        much: a frame goes where the middle of its cost lies, and is off by half of it at most. With
        a model of that kind a list, in order.

    Raises:
        ValueError: a negative count; other costs than one for each frame, or one that is negative
            or not finite; costs beside a model whose visual tokens stand among the text's.
    """
    tokens = [1] * max(count, 0) if isinstance(count, int) else list(count)
    if (isinstance(count, int) and count < 0) or any(each < 0 for each in tokens):
        raise ValueError(f"got count={count}; expected the number of frames, 0 or more")
    channel = resolve(groups)
    with HOST:
        if costs is not None:
            place = channel.rank, channel.size
            return _owned_by_cost(len(tokens), costs, model=model, place=place)
        if model is not None:
            return family_of(model)[0].owned(tokens, channel.rank, channel.size)
    part = span(split(len(tokens), channel.size), channel.rank)
    return range(part.start, part.stop)


def _owned_by_cost(
    count: int, costs: Sequence[float], *, model: nn.Module | None, place: tuple[int, int]
) -> range:
    """A contiguous range of about a rank's share of the costs."""
    each = torch.tensor([*costs], dtype=torch.float64)
    if len(each) != count or not bool(each.isfinite().all()) or bool((each < 0).any()):
        wrong = [cost for cost in each.tolist() if not 0 <= cost < float("inf")]
        found = f"{len(each)} costs" if len(each) != count else f"costs with {wrong[0]}"
        raise ValueError(
            f"got {found} for {count} frames; expected a number from 0 on for each of them"
        )
    if model is not None and not family_of(model)[0].features_key:
        raise ValueError(
            "got costs for a model whose visual tokens stand among the text's, which deals them by "
            "tokens; expected the tokens of each unit in place of count, and no costs"
        )
    rank, size = place
    if not bool(each.any()):
        each = torch.ones_like(each)
    holder = parts_of(before(each), each, each.sum(), size) if count > 0 else each
    held = (holder == rank).nonzero()[:, 0].tolist()
    first = int((holder < rank).sum())
    return range(first, first + len(held))


def draft_batch(
    batch: Mapping[str, Any],
    *,
    model: nn.Module,
    groups: SequenceParallelGroups | None = None,
    frames: str = "all",
) -> Draft:
    """What `shard_batch` can do of its work without other ranks and without the device.

    A data loader's worker may run it, e.g. in its ``collate_fn``: it checks, makes the checksums,
    reads the mask and cuts out this rank's frames, on the CPU. `shard_batch`, in the training
    process, takes the result in place of the batch: there the ranks agree, which no worker can, and
    the shard goes to the device. With ``pin_memory=True`` the loader pins what is to be copied::

        collate = lambda samples: draft_batch(processor(samples), model=model)
        for draft in DataLoader(data, collate_fn=collate, num_workers=2, pin_memory=True):
            out = engine(**ds_lvx.shard_batch(draft, model=engine.module))

    Args:
        batch, model, groups, frames: as in `shard_batch`; of the model only its shapes are read,
            and of the groups this rank's place. The batch must be on the CPU.

    Returns:
        A `Draft`, which pickles. An error in the batch is kept in it, and raised by `shard_batch`
        on all ranks.
    """
    family, inside = family_of(model)
    channel = resolve(groups)
    place = channel.rank, channel.size
    with HOST:
        draft = Draft.of(family, batch, inside, place=place, frames=frames)
        # Pickled, a part of a tensor would take the whole along.
        return draft.each(Tensor.clone)


def shard_batch(
    batch: Mapping[str, Any] | Draft,
    *,
    model: nn.Module,
    groups: SequenceParallelGroups | None = None,
    frames: str = "all",
) -> dict[str, Any]:
    """A batch as a processor returns it -> this rank's shard, ready for ``model(**shard)``.

    Every rank of a sequence-parallel group calls it with the same text. The text is split evenly
    by token (in runs or zigzag, by the config's ``text_order``), the frames by image as `owned`
    says. The loss of ``model(**shard)`` is this rank's share: summed over the group it is the loss
    that one process computes (`mean_loss`).

    Args:
        batch: what the processor of the model's family returns: ``input_ids [B, T]``, where they
            apply ``attention_mask [B, T]``, ``position_ids [B or 1, T]`` and ``labels [B, T]``, and
            the visual input (``docs/configuration.md`` lists the keys of each family). On any
            device; only the shard is moved to the model's, by way of pinned memory where it is
            not pinned, so that the host does not wait. ``num_items_in_batch``, a number: what
            the sum of the losses is divided by, in place of the labelled tokens of this batch.
            With the labelled tokens of a whole optimizer step over (forwards of a step x
            replicas), every one of them weighs the same in the step. Or what `draft_batch` made of
            all this.
        model: the model that will get the shard, e.g. ``engine.module``.
        groups: the groups; None is the current ones, or all ranks as one group.
        frames: of a batch that is no draft. ``"all"``: it holds every frame, this rank's are cut.
            ``"local"``: it holds this rank's frames already (any number, none included, as long as
            the ranks' frames are those of the sample in order), while masks are of the whole.

    Returns:
        Keyword arguments for the model: text with its positions in the whole, ``labels``,
        ``shift_labels`` (shifted before the cut) and ``num_items_in_batch``, local frames,
        ``use_cache=False``, and ``ds_lvx``, which the patched attention reads.

    Raises:
        ValueError: on all ranks of the group, naming the rank that is wrong: unknown or misshapen
            entries, texts that differ between ranks, fewer tokens than ranks, tokens or labels that
            the model has no row for, a mask that is not of the processor's kind.
        NotImplementedError: the model is of no family that is known.
        RankOutOfMemoryError: names this rank and the size, as in an engine's calls, where what it
            holds does not fit on its device.
        RuntimeError: called in a data loader's worker, which the other ranks cannot hear.

    Collectives: one agreement of 2 KiB a rank on the control plane, and a second one where
    ``frames="local"`` and padding makes a longer record; no data moves.
    """
    if get_worker_info() is not None:
        raise RuntimeError(
            "got shard_batch in a data loader's worker, where ranks cannot agree; call "
            "ds_lvx.sharding.draft_batch there, and shard_batch on its result in the training loop"
        )
    return _shard(batch, model=model, groups=groups, frames=frames)


def finish_batch(
    draft: Draft,
    records: Sequence[Mapping[str, Any]],
    *,
    model: nn.Module,
    groups: SequenceParallelGroups | None = None,
) -> dict[str, Any]:
    """`shard_batch` of a draft of which the ranks have told each other on another occasion.

    Args:
        draft: of this rank.
        records: `Draft.record` of every rank of the group, by rank.
        model, groups: as in `shard_batch`.

    Raises:
        ValueError: on all ranks of the group: the records differ in what must be the same.
    """
    return _shard(draft, model=model, groups=groups, records=records)


def _shard(
    batch: Mapping[str, Any] | Draft,
    *,
    model: nn.Module,
    groups: SequenceParallelGroups | None,
    frames: str = "local",
    records: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    channel = resolve(groups)
    with telling(channel) if records is None else nullcontext():
        family, inside = family_of(model)
    current = SequenceParallelGroups.current() if groups is None else groups
    world = None if current is None or current.dp_size == 1 else current.world_channel
    # What the ranks have agreed on goes to the device, where there may be no memory for it.
    with named("shard_batch", groups), HOST:
        made = shard(
            family,
            batch,
            inside,
            channel=channel,
            frames=frames,
            always_vision=world is not None or is_partitioned(inside),
            records=records,
        )
    return {**made, KEYWORD: replace(made[KEYWORD], world=world)}


def mean_loss(loss: Tensor, *, groups: SequenceParallelGroups | None = None) -> Tensor:
    """The loss one process would have computed, on every rank, for logging.

    Args:
        loss: ``out.loss`` of this rank's shard, a scalar of any floating dtype.
        groups: the groups; None is the current ones, or all ranks as one group.

    Returns:
        fp32 scalar without gradient: the sum over each sequence-parallel group, averaged over the
        data-parallel replicas.

    Raises:
        ValueError: on all ranks: a rank has no loss, or more than one number.

    Collectives: one all-reduce of 4 bytes over all ranks, for which the host waits; where the sum
    is NaN, one agreement on whose fault that is.
    """
    current = SequenceParallelGroups.current() if groups is None else groups
    channel, replicas = (
        (resolve(None), 1) if current is None else (current.world_channel, current.dp_size)
    )
    error = None
    if isinstance(loss, Tensor) and loss.numel() == 1:
        value = loss.detach().to(torch.float32)
    else:
        found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        error = ValueError(
            f"mean_loss: got {found}; expected out.loss, a scalar tensor: give shard_batch labels"
        )
        value = torch.full((), math.nan, device=get_accelerator().current_device_name())
    total = channel.all_reduce(value)
    if bool(total.isnan()):  # a loss that is NaN by itself passes
        channel.agree({}, error)
    return total / replicas
