"""A whole training step, part by part, for one group size, method and schedule.

docs/planning.md has the formulas. Matrix products take the longer of computing and of reading their
weights; a backward through trained weights takes two of them, through frozen ones one.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_lvx.plan.choose import obstacle
from ds_lvx.plan.cluster import Cluster, Device
from ds_lvx.plan.cost import Cost, cost
from ds_lvx.plan.footprint import Footprint, footprint
from ds_lvx.plan.job import Job
from ds_lvx.plan.transfers import Ranks

# fp32 weight, two moments and gradient: read, and all but the gradient written; the bf16 weight.
_ADAM_BYTES = 30


@dataclass(frozen=True)
class Step:
    """One step of a rank.

    Attributes:
        ranks: of the group that shares a sample.
        method, schedule: of the cross-attention.
        text_method: of the text's self-attention.
        parts: seconds by part; they add up to ``seconds``.
        cross: one cross-attention layer.
        bytes_sent: by a rank for all cross-attention layers.
        footprint: memory.
    """

    ranks: int
    method: str
    schedule: str
    text_method: str
    parts: dict[str, float]
    cross: Cost
    bytes_sent: float
    footprint: Footprint

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.parts.values())

    @property
    def cross_seconds(self) -> float:
        """Of all cross-attention: kernels, merging, projection of K and V, and waiting."""
        names = ("cross-attention", "projection of K and V", "cross-attention, network")
        return sum(self.parts[name] for name in names)

    @property
    def limited_by(self) -> str:
        """The part that takes most."""
        return max(self.parts, key=lambda part: self.parts[part])


def step(job: Job, cluster: Cluster, *, ranks: int, method: str, schedule: str) -> Step:
    """Predict a step in which ``ranks`` adjacent ranks share a sample.

    Raises:
        ValueError: the method cannot run this layer on so many ranks.
    """
    recompute = job.recompute and method == "lvx"
    shape = job.cross_shape(ranks, recompute=recompute)
    problem = obstacle(shape, method, schedule)
    if problem is not None:
        raise ValueError(problem)
    layer = cost(shape, cluster, method=method, schedule=schedule)
    text_method = "ulysses" if job.model.text.heads >= ranks else "ring"
    parts = _cross(job, cluster.device, layer, recompute=recompute)
    parts |= _text(job, cluster, ranks, text_method)
    parts |= {"vision": _vision(job, cluster.device, ranks)}
    computed = sum(parts.values())
    parts["ZeRO, network"] = max(0.0, _zero(job, cluster) - computed)
    parts["optimizer"] = _optimizer(job, cluster)
    return Step(
        ranks=ranks,
        method=method,
        schedule=schedule,
        text_method=text_method,
        parts=parts,
        cross=layer,
        bytes_sent=job.model.cross.count * layer.bytes_sent,
        footprint=footprint(job, gpus=cluster.gpus, ranks=ranks, method=method, schedule=schedule),
    )


def _cross(job: Job, device: Device, layer: Cost, *, recompute: bool) -> dict[str, float]:
    count = job.model.cross.count
    passes = (layer.forward, layer.backward)
    projection = sum(each.projection_s for each in passes)
    if job.checkpointing and not recompute:
        projection += layer.forward.projection_s  # in the layer's second forward
    return {
        "cross-attention": count * sum(each.kernel_s + each.other_s for each in passes),
        "projection of K and V": count * projection,
        "cross-attention, network": count * layer.exposed_s,
    }


def _text(job: Job, cluster: Cluster, ranks: int, method: str) -> dict[str, float]:
    model, device = job.model, cluster.device
    tokens = -(-job.text_tokens // ranks)
    own = model.text.query_parameters + model.text.key_parameters
    layers = model.text.count * _layer(job, device, own, tokens, trained=job.trains == "all")
    layers += model.cross.count * _layer(
        job, device, model.cross.query_parameters, tokens, trained=True
    )
    head = model.vocabulary * model.text.hidden
    layers += _products(device, head, tokens) * (3 if job.trains == "all" else 2)
    attention = cost(job.text_shape(ranks), cluster, method=method)
    waiting = model.text.count * attention.exposed_s
    return {
        "text layers": layers + model.text.count * attention.seconds - waiting,
        "text, network": waiting,
    }


def _layer(job: Job, device: Device, parameters: int, tokens: int, *, trained: bool) -> float:
    """Forward and backward of one layer's matrix products."""
    passes = 1 + (2 if trained else 1) + (1 if job.checkpointing else 0)
    return passes * _products(device, parameters, tokens)


def _products(device: Device, parameters: int, tokens: int) -> float:
    """One pass of so many tokens through so many weights."""
    computing = 2 * parameters * tokens / device.matmul_flops
    reading = parameters * device.element_bytes / device.stream_bytes_per_s
    return max(computing, reading)


def _vision(job: Job, device: Device, ranks: int) -> float:
    """The tower and the projector, over the frames of a rank."""
    model, tower = job.model, job.model.tower
    tokens = job.frames_of_a_rank(ranks) * model.tower_tokens
    trained = job.trains == "all"
    passes = (3 + (1 if job.checkpointing else 0)) if trained else 1
    # Frames attend within themselves: 4 T^2 H D operations forward, 10 backward.
    pairs = tokens * model.tower_tokens * tower.heads * tower.head_dim
    attention = pairs * device.whole.pair_s
    if trained:
        attention += pairs * device.backward.pair_s
    layers = passes * _products(device, tower.parameters // tower.count, tokens) + attention
    projector = 3 * _products(device, model.projector_parameters, tokens)
    return tower.count * layers + projector


def _zero(job: Job, cluster: Cluster) -> float:
    """Seconds of the network for weights and gradients, hidden or not."""
    ranks = Ranks(cluster, cluster.gpus)
    if ranks.size == 1:
        return 0.0
    every = job.element_bytes * job.model.parameters / ranks.size
    gradients = job.element_bytes * job.trained_parameters / ranks.size
    # Stage 3: weights in forward and in backward, gradients once. Else: gradients are summed, or
    # reduced and the new weights gathered, which is as much.
    sizes = [every, every, gradients] if job.zero_stage == 3 else [gradients, gradients]
    return sum(ranks.gather(size).busy_s for size in sizes)


def _optimizer(job: Job, cluster: Cluster) -> float:
    shared = cluster.gpus if job.zero_stage >= 1 else 1
    return job.trained_parameters / shared * _ADAM_BYTES / cluster.device.stream_bytes_per_s
