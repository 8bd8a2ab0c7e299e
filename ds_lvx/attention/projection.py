"""A layer's projection of visual features to K and V: run, run again, and its gradients pushed.

In backward the projection runs again under a graph of its own, and dk and dv are pushed through
it. Chunk by chunk, a parameter gets a gradient from each; they are added up in fp32 and arrive in
one piece, because ZeRO's hooks expect a parameter's gradient once a backward.

Worked example, two chunks of one layer's features. Chunk 1 is projected under a graph, the kernel
gives dk and dv, and `_Graph.gradients` takes those of the features (into their place) and of the
weights (into ``totals``), without a hook firing. Chunk 2 likewise, but `_Graph.push` runs backward
for real: a hook on each weight adds the total of chunk 1 before the weight's own hooks see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, KeysView, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ds_lvx.attention.features import Chunks, FeatureGradient
from ds_lvx.attention.random_state import Playback
from ds_lvx.kernels.merge import accumulation_dtype

ProjectKV: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Placed:
    """A projection that depends on the place of a token, as rotary embeddings of keys do.

    Attributes:
        project: features ``[B, t, ...]``, and which of this rank's tokens they are.
    """

    project: Callable[[Tensor, slice], tuple[Tensor, Tensor]]

    def __call__(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of all tokens."""
        return self.project(features, slice(None))


def project(project_kv: ProjectKV, tokens: slice, features: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of some tokens."""
    if isinstance(project_kv, Placed):
        return project_kv.project(features, tokens)
    return project_kv(features)


class Turns:
    """The projections of one layer that a backward runs again: one for each forward that it is of.

    All but the last leave the gradients of their parameters in ``totals``. ZeRO-3 would keep those
    of the last one alone, and stages 1 and 2 refuse a second.
    """

    def __init__(self) -> None:
        self.totals: dict[Tensor, Tensor] = {}
        self._nodes: WeakSet[Any] = WeakSet()
        self._had: WeakSet[Any] = WeakSet()
        self._backward = -1

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()  # a copy of a model has no graph

    def add(self, node: Any) -> None:
        """A forward has this node in its graph."""
        self._nodes.add(node)

    def is_last(self, node: Any) -> bool:
        """Whether the node, whose turn it is, is the last one of the layer in this backward."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:  # what is there is of one that failed
            self._backward, self._had = backward, WeakSet()
            self.totals.clear()
        self._had.add(node)
        return not any(is_wanted(each) for each in self._nodes if each not in self._had)


def is_wanted(node: Any) -> bool:
    """Whether this backward goes on to a node: ``torch.autograd.grad`` may want others only."""
    # The public register_multi_grad_hook asks the same way.
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        # PyTorch refuses to say it of the leaves that ``torch.autograd.grad`` is asked for.
        return True


@dataclass(frozen=True)
class Part:
    """K and V ``[B, t, K, D]`` of some tokens.

    Attributes:
        tokens: which of this rank's visual tokens.
        k, v: without a graph.
        last: no part follows.
    """

    tokens: slice
    k: Tensor
    v: Tensor
    last: bool


class Projection:
    """The projection in forward: runs, and keeps nothing.

    Args:
        project_kv: features ``[B, t, ...]`` -> K, V ``[B, t, K, D]``, token by token.
        chunks: the features.
    """

    def __init__(self, project_kv: ProjectKV, chunks: Chunks) -> None:
        self._project_kv = project_kv
        self._chunks = chunks

    def parts(self) -> Iterator[Part]:
        """K and V, a chunk of tokens at a time."""
        for number, (tokens, features) in enumerate(self._chunks, start=1):
            # In no variable: what is yielded lives only as long as who asked for it holds it.
            yield Part(tokens, *self._run(tokens, features), last=number == len(self._chunks))

    def whole(self) -> tuple[Tensor, Tensor]:
        """K and V of features that are one chunk."""
        (part,) = self.parts()
        return part.k, part.v

    def push(self, gradients: list[Tensor], *, last: bool) -> None:
        """Hand ``[dk, dv]`` of the part made last to features and parameters; in backward only.

        The list is emptied on the way: dk and dv are let go as soon as they are used.
        """
        raise NotImplementedError(f"{type(self).__name__} has no graph to push gradients through")

    def _run(self, tokens: slice, features: Tensor) -> tuple[Tensor, Tensor]:
        return project(self._project_kv, tokens, features)


class ProjectionAgain(Projection):
    """The projection in backward: runs under a graph, and pushes gradients through it.

    Args:
        project_kv, chunks: as in forward.
        playback: random numbers and autocast of forward.
        gradient: where the features' gradient adds up; None when they want none.
        totals: what the parameters have had so far in this backward; None: nothing.
        more: they will have more after this projection, whose part stays in the totals.
    """

    def __init__(
        self,
        project_kv: ProjectKV,
        chunks: Chunks,
        *,
        playback: Playback,
        gradient: FeatureGradient | None,
        totals: dict[Tensor, Tensor] | None = None,
        more: bool = False,
    ) -> None:
        super().__init__(project_kv, chunks)
        self._playback = playback
        self._gradient = gradient
        self._graph: _Graph | None = None
        self._totals = {} if totals is None else totals
        self._more = more

    def push(self, gradients: list[Tensor], *, last: bool) -> None:
        """See `Projection.push`. With the last part of all, the parameters' own hooks fire."""
        graph, self._graph = self._graph, None
        assert graph is not None
        if last and not self._more:
            of_features = graph.push(gradients, self._totals)
            self._totals.clear()
        else:
            of_features, of_parameters = graph.gradients(gradients)
            for parameter, gradient in of_parameters:
                total = self._totals.get(parameter)
                wide = gradient.to(accumulation_dtype(gradient.dtype))
                self._totals[parameter] = wide if total is None else total.add_(wide)
        if self._gradient is not None:
            self._gradient.add(self._chunks, graph.tokens, of_features)
            if last:
                self._gradient.end_of_layer()

    def _run(self, tokens: slice, features: Tensor) -> tuple[Tensor, Tensor]:
        leaf = features.detach().requires_grad_(self._gradient is not None)
        with torch.enable_grad(), self._playback.piece():
            k, v = project(self._project_kv, tokens, leaf)
        self._graph = _Graph(tokens, leaf, (k, v))
        return k.detach(), v.detach()


class _Graph:
    """The autograd graph of one part, without K and V themselves: they are needed no more."""

    def __init__(self, tokens: slice, leaf: Tensor, projected: Sequence[Tensor]) -> None:
        self.tokens = tokens
        self._leaf = leaf
        self._edges = [get_gradient_edge(t) if t.requires_grad else None for t in projected]

    def gradients(
        self, gradients: list[Tensor]
    ) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
        """Gradients of the features and of the parameters; no hook of a parameter fires."""
        edges = [edge for edge in self._edges if edge is not None]
        given = self._given(gradients)
        parameters = _leaves(edges, but=self._leaf)
        inputs = [*parameters, *([self._leaf] if self._leaf.requires_grad else [])]
        if not inputs:
            return None, []
        results = list(torch.autograd.grad(edges, inputs, given, allow_unused=True))
        of_leaf = results.pop() if self._leaf.requires_grad else None
        found = zip(parameters, results, strict=True)
        return of_leaf, [(p, g) for p, g in found if g is not None]

    def push(self, gradients: list[Tensor], totals: dict[Tensor, Tensor]) -> Tensor | None:
        """Run backward, hooks and all, with ``totals`` added to the parameters' gradients."""
        edges = [edge for edge in self._edges if edge is not None]
        given = self._given(gradients)
        waiting = dict(totals)
        with ExitStack() as stack:
            for parameter in totals:
                hook = parameter.register_hook(partial(_added, waiting, parameter))
                stack.callback(hook.remove)
            if len(edges) == 2 and _are_apart(*edges, but=self._leaf):
                # K first: what its norm's backward needs is gone before V's gradient arrives.
                torch.autograd.backward([edges.pop(0)], [given.pop(0)])
            if edges:
                torch.autograd.backward(edges, given)
        for parameter, total in waiting.items():
            _accumulate(parameter, total)
        return self._leaf.grad

    def _given(self, gradients: list[Tensor]) -> list[Tensor]:
        pairs = zip(self._edges, gradients, strict=True)
        given = [gradient for edge, gradient in pairs if edge is not None]
        gradients.clear()
        return given


def _added(waiting: dict[Tensor, Tensor], parameter: Tensor, gradient: Tensor) -> Tensor:
    total = waiting.pop(parameter)
    return (gradient.to(total.dtype) + total).to(gradient.dtype)


def _accumulate(parameter: Tensor, total: Tensor) -> None:
    """Give a parameter what earlier chunks have for it, when the last one did not use it."""
    if parameter.shape != total.shape:
        raise RuntimeError(
            f"project_kv: got a parameter of shape {list(total.shape)} that the last chunk of "
            "tokens did not use and earlier ones did, under ZeRO-3; expected the same parameters "
            "for every chunk, one without tokens included"
        )
    torch.autograd.backward([parameter], [total.to(parameter.dtype)])


def _are_apart(one: GradientEdge, other: GradientEdge, *, but: Tensor) -> bool:
    """Whether two results have nothing in common but the leaf."""
    return not _nodes([one], but) & _nodes([other], but)


def _leaves(edges: Sequence[GradientEdge], *, but: Tensor) -> list[Tensor]:
    """The leaves of a graph that want a gradient: parameters, mostly."""
    # An AccumulateGrad has its leaf for a variable.
    variables = (getattr(node, "variable", None) for node in _nodes(edges, but))
    return list(dict.fromkeys(leaf for leaf in variables if leaf is not None))


def _nodes(edges: Sequence[GradientEdge], but: Tensor) -> KeysView[Node]:
    """Every node of a graph, in a fixed order, except that of the leaf ``but``."""
    found: dict[Node, None] = {}
    pending: list[Node | None] = [edge.node for edge in edges]
    while pending:
        node = pending.pop()
        if node is None or node in found or getattr(node, "variable", None) is but:
            continue
        found[node] = None
        pending += [following for following, _ in node.next_functions]
    return found.keys()
