"""The most memory that a rank needs in a step: weights, gradients, optimizer and activations.

The cross-attention's share follows `ds_lvx.plan.memory`. The text's is 34 bytes a token, layer and
unit of width where attention keeps no scores (Korthikanti et al., arXiv:2205.05198, equation 1
without the quadratic term); a checkpointed layer keeps its input.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_lvx.attention.shape import evenly
from ds_lvx.plan.job import Job
from ds_lvx.plan.memory import CrossAttention, Load, Setting, peak

_LAYER_BYTES = 34
_LOGIT_BYTES = 10  # bf16, their copy in fp32, its gradient
_OPTIMIZER_BYTES = 12  # fp32 weight and two moments
# A query that is gathered: q and dout, dq in fp32, what leaves, PyTorch's stand-in for out.
_GATHERED_BYTES = 14


@dataclass(frozen=True)
class Footprint:
    """Bytes of a rank.

    Attributes:
        states: weights, gradients and optimizer.
        vision: the vision tower's activations at their peak.
        cross: the cross-attention's at their peak, features included.
        text: the text's activations and logits, and the queries of other ranks.
        vision_stays: what of ``vision`` is still there in the text's backward.
    """

    states: int
    vision: int
    cross: int
    text: int
    vision_stays: int

    @property
    def peak(self) -> int:
        """The most at any moment: in the vision tower, or in the text's backward."""
        return self.states + max(self.vision, self.vision_stays + self.cross + self.text)


def footprint(job: Job, *, gpus: int, ranks: int, method: str, schedule: str) -> Footprint:
    """Predict the memory of the rank that needs most."""
    model = job.model
    tokens = job.frames_of_a_rank(ranks) * model.tower_tokens
    vision, stays = _vision(job, tokens)
    cross = CrossAttention(
        hidden=model.cross.features_dim or model.cross.hidden,
        heads=model.cross.heads,
        kv_heads=model.cross.kv_heads,
        head_dim=model.cross.head_dim,
        layers=model.cross.count,
        element_bytes=job.element_bytes,
    )
    setting = Setting(
        method=method,
        recompute_kv=job.recompute and method == "lvx",
        checkpointing=job.checkpointing,
    )
    queries = max(evenly(job.text_tokens, ranks))
    load = Load(keys=job.frames_of_a_rank(ranks) * model.frame_tokens, queries=queries, ranks=ranks)
    return Footprint(
        states=_states(job, gpus),
        vision=vision,
        cross=peak(cross, setting, load),
        text=_text(job, queries) + _travelling(job, ranks, queries, method, schedule),
        vision_stays=stays,
    )


def _states(job: Job, gpus: int) -> int:
    weights = job.element_bytes * job.model.parameters
    gradients = job.element_bytes * job.trained_parameters
    optimizer = _OPTIMIZER_BYTES * job.trained_parameters
    shared = [1 if job.zero_stage < stage else gpus for stage in (3, 2, 1)]
    parts = zip((weights, gradients, optimizer), shared, strict=True)
    return sum(-(-size // ranks) for size, ranks in parts)


def _vision(job: Job, tokens: int) -> tuple[int, int]:
    """The tower's activations at their peak, and what of them waits for its backward."""
    tower = job.model.tower
    layer = _LAYER_BYTES * tower.hidden
    kept = job.element_bytes * tower.hidden * job.model.tower_states
    if job.trains != "all":
        return tokens * (kept + layer), 0
    if job.checkpointing:
        kept = max(kept, job.element_bytes * tower.hidden * tower.count)
        return tokens * (kept + layer), tokens * kept
    kept = tower.count * layer
    return tokens * kept, tokens * kept


def _text(job: Job, queries: int) -> int:
    text, cross = job.model.text, job.model.cross
    layer = _LAYER_BYTES * text.hidden
    # Cross-attention layers with an MLP are layers of their own; what attention itself keeps is in
    # the cross-attention's share.
    layers = text.count + (cross.count if cross.mlp else 0)
    kept = layers * (job.element_bytes * text.hidden if job.checkpointing else layer)
    return queries * (kept + layer + _LOGIT_BYTES * job.model.vocabulary)


def _travelling(job: Job, ranks: int, queries: int, method: str, schedule: str) -> int:
    """Queries of other ranks that are here, with their gradients."""
    if method != "lvx" or ranks == 1:
        return 0
    here = job.text_tokens if schedule == "gather" else 2 * queries
    return _GATHERED_BYTES * here * job.model.cross.heads * job.model.cross.head_dim
