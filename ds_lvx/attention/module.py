"""`LVXAttention`: lvx where code expects DeepSpeed's ``DistributedAttention``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepspeed.sequence.layer import apply_rotary_pos_emb
from torch import Tensor, nn

from ds_lvx.attention.call import Group
from ds_lvx.attention.lvx import lv_xattn
from ds_lvx.distributed.agreement import require_same
from ds_lvx.distributed.groups import resolve
from ds_lvx.distributed.together import telling
from ds_lvx.kernels.visibility import Visibility


class LVXAttention(nn.Module):
    """Takes the place of ``deepspeed.sequence.layer.DistributedAttention``, same calls and layouts.

    Args:
        local_attention: accepted for compatibility; the kernel computes attention itself.
        sequence_process_group: as lv_xattn's ``group``.
        scatter_idx, gather_idx: accepted for compatibility; nothing is scattered over heads.
        sp_stream: accepted for compatibility; transfers overlap without a stream of the caller.
        softmax_scale, schedule, kernel: as in `lv_xattn`.
    """

    def __init__(
        self,
        local_attention: nn.Module | None = None,
        sequence_process_group: Group = None,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any = None,
        *,
        softmax_scale: float | None = None,
        schedule: str = "auto",
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        self.local_attn = local_attention
        self.spg = sequence_process_group
        self.scatter_idx = scatter_idx
        self.gather_idx = gather_idx
        self.sp_stream = sp_stream
        self.softmax_scale = softmax_scale
        self.schedule = schedule
        self.kernel = kernel

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int,
        rotary_pos_emb: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        visibility: Visibility | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention over the whole sequence.

        Args:
            query: ``[batch, seqlen_q, num_heads, head_dim]`` for ``batch_dim_idx`` 0, or
                ``[seqlen_q, batch, num_heads, head_dim]`` for 1; this rank's shard.
            key, value: the same layout, ``seqlen_kv`` and ``num_kv_heads``.
            batch_dim_idx: 0 or 1.
            rotary_pos_emb: ``(cos, sin)``, each ``[1, seqlen, 1, rotary_dim]`` over the **whole**
                sequence, applied to query and key at this rank's place in it.
            args, kwargs: DistributedAttention hands them to ``local_attention``, which does not
                run here: only None is accepted.
            visibility: as in `lv_xattn`.

        Returns:
            query's shape, layout and dtype.

        Raises:
            ValueError: a ``batch_dim_idx`` other than 0 and 1; rotary tables of another shape, or
                shorter than the sequence; what `lv_xattn` raises.
            NotImplementedError: further arguments, such as a dense mask; pass ``visibility``.

        Collectives: those of `lv_xattn`; with ``rotary_pos_emb`` one more agreement.
        """
        with telling(resolve(self.spg)):
            _check_arguments(batch_dim_idx, args, kwargs)
            if batch_dim_idx == 1:
                query, key, value = (_swapped(tensor) for tensor in (query, key, value))
            if rotary_pos_emb is not None:
                _check_rotary(query, key, rotary_pos_emb)
        if rotary_pos_emb is not None:
            query, key = self._rotate(query, key, rotary_pos_emb)
        out = lv_xattn(
            query,
            key,
            value,
            group=self.spg,
            visibility=visibility,
            softmax_scale=self.softmax_scale,
            schedule=self.schedule,
            kernel=self.kernel,
        )
        return out.transpose(0, 1) if batch_dim_idx == 1 else out

    def _rotate(
        self, query: Tensor, key: Tensor, rotary_pos_emb: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        channel = resolve(self.spg)
        _, positions, _, rotary_dim = rotary_pos_emb[0].shape
        record = {"operation": "rotary_pos_emb", "positions": positions, "rotary_dim": rotary_dim}
        shards = channel.agree(record | {"q": query.shape[1], "kv": key.shape[1]})
        require_same(shards, list(record), what="LVXAttention")
        longest = max(sum(shard[name] for shard in shards) for name in ("q", "kv"))
        if positions < longest:
            raise ValueError(
                f"rotary_pos_emb: got {positions} positions for a sequence of {longest} over all "
                "ranks; expected cos and sin of the whole sequence"
            )
        rotated = []
        for name, tensor in (("q", query), ("kv", key)):
            start = sum(shard[name] for shard in shards[: channel.rank])
            cos, sin = (
                table.permute(1, 0, 2, 3)[start : start + tensor.shape[1]]
                for table in rotary_pos_emb
            )
            rotated.append(apply_rotary_pos_emb(tensor.transpose(0, 1), cos, sin).transpose(0, 1))
        return rotated[0], rotated[1]


def _check_arguments(batch_dim_idx: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if batch_dim_idx not in (0, 1):
        raise ValueError(f"batch_dim_idx: got {batch_dim_idx!r}; expected 0 or 1")
    unknown = [f"argument {i + 6}" for i, value in enumerate(args) if value is not None]
    unknown += [name for name, value in kwargs.items() if value is not None]
    if unknown:
        raise NotImplementedError(
            f"LVXAttention: got {', '.join(unknown)}, which would go to local_attention; none runs "
            "here; describe masks by visibility=ds_lvx.Visibility(...)"
        )


def _swapped(tensor: Any) -> Any:
    """Batch first. What is no tensor of two dimensions stays, for `lv_xattn` to say so."""
    fits = isinstance(tensor, Tensor) and tensor.dim() > 1
    return tensor.transpose(0, 1) if fits else tensor


def _check_rotary(query: Any, key: Any, tables: Any) -> None:
    for name, tensor in {"query": query, "key": key}.items():
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            raise ValueError(f"{name}: got {_kind(tensor)}; expected a tensor of 4 dimensions")
    pair = list(tables) if isinstance(tables, Sequence | Tensor) else [tables]
    widest = min(query.shape[3], key.shape[3]) // 2 * 2
    fits = len(pair) == 2 and all(
        isinstance(table, Tensor)
        and table.device == query.device == key.device
        and table.dim() == 4
        and table.shape == pair[0].shape == (1, table.shape[1], 1, table.shape[3])
        and table.shape[3] in range(2, widest + 1, 2)
        for table in pair
    )
    if not fits:
        raise ValueError(
            f"rotary_pos_emb: got {', '.join(map(_kind, pair))}; expected (cos, sin), each [1, "
            f"seqlen, 1, rotary_dim] on {query.device}, with an even rotary_dim up to {widest}"
        )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} on {value.device}"
    return type(value).__name__
