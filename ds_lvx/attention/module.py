"""`LVXAttention`: lvx where code expects DeepSpeed's ``DistributedAttention``."""

from __future__ import annotations

from typing import Any, NoReturn

from deepspeed.sequence.layer import apply_rotary_pos_emb
from torch import Tensor, nn

from ds_lvx.attention.call import Group
from ds_lvx.attention.lvx import lv_xattn
from ds_lvx.distributed.agreement import require_same
from ds_lvx.distributed.groups import resolve
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
            ValueError: a ``batch_dim_idx`` other than 0 and 1; what `lv_xattn` raises.
            NotImplementedError: further arguments, such as a dense mask; pass ``visibility``.

        Collectives: those of `lv_xattn`; with ``rotary_pos_emb`` one more agreement.
        """
        if batch_dim_idx not in (0, 1):
            self._refuse(ValueError(f"batch_dim_idx: got {batch_dim_idx!r}; expected 0 or 1"))
        unknown = [f"argument {i + 6}" for i, value in enumerate(args) if value is not None]
        unknown += [name for name, value in kwargs.items() if value is not None]
        if unknown:
            self._refuse(
                NotImplementedError(
                    f"LVXAttention: got {', '.join(unknown)}, which would go to local_attention; "
                    "none runs here; describe masks by visibility=ds_lvx.Visibility(...)"
                )
            )
        if batch_dim_idx == 1:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
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

    def _refuse(self, error: Exception) -> NoReturn:
        """Raise on every rank: the others are in, or on their way to, an agreement of their own."""
        resolve(self.spg).agree({}, error)
        raise error

    def _rotate(
        self, query: Tensor, key: Tensor, rotary_pos_emb: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        channel = resolve(self.spg)
        record = {"operation": "rotary_pos_emb", "q": query.shape[1], "kv": key.shape[1]}
        shards = channel.agree(record)
        require_same(shards, ["operation"], what="LVXAttention")
        rotated = []
        for name, tensor in (("q", query), ("kv", key)):
            start = sum(shard[name] for shard in shards[: channel.rank])
            cos, sin = (
                table.permute(1, 0, 2, 3)[start : start + tensor.shape[1]]
                for table in rotary_pos_emb
            )
            rotated.append(apply_rotary_pos_emb(tensor.transpose(0, 1), cos, sin).transpose(0, 1))
        return rotated[0], rotated[1]
