"""Checkpointed layers of a Hugging Face model: each call of theirs goes through `checkpointing`.

transformers gives every layer a checkpoint function when checkpointing is switched on, at any time
before or after `ds_lvx.initialize`. A hook on the model looks at them before each forward.
"""

from __future__ import annotations

import functools
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, cast

import deepspeed
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.modeling_layers import GradientCheckpointingLayer

from ds_lvx.attention.checkpointing import Checkpointing, checkpointing
from ds_lvx.config.activation_checkpointing import ActivationCheckpointing
from ds_lvx.models.patch import Hook, is_patched

_FUNCTION = "_gradient_checkpointing_func"
_FLAG = "gradient_checkpointing"
_SWITCH = "_set_gradient_checkpointing"
_DEFAULT = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)


class LayerCheckpointing:
    """Takes the place of a layer's checkpoint function.

    transformers hands a layer's tensors over as keywords inside a ``functools.partial``, out of
    sight of the reentrant variants, which lose their gradients. Here every tensor that wants a
    gradient is an argument.

    Args:
        layer: whose function it is.
        previous: the function, as it was found.
        function: the one to use.
        keeps_arguments: the layer's positional arguments are used elsewhere, too, so DeepSpeed
            must not empty them.
    """

    def __init__(
        self,
        layer: nn.Module,
        previous: Callable[..., Any],
        *,
        function: Checkpointing,
        keeps_arguments: bool,
    ) -> None:
        self.layer = layer
        self.previous = previous
        self.function = function
        self._keeps_arguments = keeps_arguments

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)``, checkpointed."""
        trains = any(parameter.requires_grad for parameter in self.layer.parameters())
        run, tensors, lifted, stored = _lift(function, args)
        wanted = [tensor for tensor in (*tensors, *lifted) if tensor.requires_grad]
        if not torch.is_grad_enabled() or not (wanted or trains):
            return function(*args)
        if not wanted:
            # The reentrant variants give no gradient to parameters when no argument wants one.
            lifted = (torch.zeros((), requires_grad=True, device=_device(tensors)),)
        # What follows the states, such as features, is the same for all layers.
        for tensor in (*(tensors if self._keeps_arguments else tensors[1:]), *lifted):
            tensor.no_checkpointing = True  # type: ignore[attr-defined]
        return stored.settle(self.function(run, *tensors, *lifted))


def _lift(
    function: Callable[..., Any], args: Sequence[Any]
) -> tuple[Callable[..., Any], tuple[Tensor, ...], tuple[Tensor, ...], Stored]:
    """A function of tensors alone, and those: positional ones, and the gradient-wanting keywords.

    What is no tensor is not handed to DeepSpeed 0.19.8, which with partition_activations hands it
    back with a None behind it (``merge_tensors``).
    """
    keywords = function.keywords if isinstance(function, functools.partial) else {}
    stored = Stored({name: x for name, x in keywords.items() if isinstance(x, UserDict)})
    leaves, structure = tree_flatten({**keywords, **stored.before})
    places = [i for i, x in enumerate(args) if isinstance(x, Tensor)]
    wanted = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
    tensors, lifted = tuple(args[i] for i in places), tuple(leaves[i] for i in wanted)
    # What is handed over must not be held back here: a checkpoint decides where it lies.
    others = [None if i in places else x for i, x in enumerate(args)]
    leaves = [None if i in wanted else x for i, x in enumerate(leaves)]

    def run(*given: Tensor) -> Any:
        positional, filled = list(others), list(leaves)
        for place, tensor in zip(places, given, strict=False):
            positional[place] = tensor
        for place, tensor in zip(wanted, given[len(places) :], strict=False):
            filled[place] = tensor
        if not isinstance(function, functools.partial):
            return function(*positional)
        keywords = stored.opened(tree_unflatten(filled, structure))
        out = function.func(*function.args, *positional, **keywords)
        return stored.behind(out, keywords)

    return run, tensors, lifted, stored.forget()


class Stored:
    """What a layer puts into dictionaries among its keywords, which later layers read.

    A checkpoint knows of arguments and results alone. So what is in them is handed over with the
    arguments, and what the layer puts in comes back behind its result: Gemma 4's keys and values of
    layers that have none of their own get their gradients under the reentrant variants as well.

    Args:
        shared: the dictionaries, whose values are tuples of tensors.

    Attributes:
        before: their entries.
    """

    def __init__(self, shared: Mapping[str, UserDict[Any, Any]]) -> None:
        self._shared = shared
        self.before = {name: dict(each) for name, each in shared.items()}
        self._kinds = {name: type(each) for name, each in shared.items()}
        self._new: list[tuple[str, Any, int]] = []

    def forget(self) -> Self:
        """The same without the entries, which are handed over."""
        self.before = {name: dict.fromkeys(each) for name, each in self.before.items()}
        return self

    def opened(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """A call's keywords, with dictionaries of its own."""
        return {**keywords, **{name: kind(keywords[name]) for name, kind in self._kinds.items()}}

    def behind(self, out: Any, keywords: Mapping[str, Any]) -> Any:
        """A layer's result, and behind it the tensors that it put in."""
        found = [
            (name, key, values)
            for name, known in self.before.items()
            for key, values in keywords[name].items()
            if key not in known
        ]
        self._new = [(name, key, len(values)) for name, key, values in found]
        return (out, *(x for *_, values in found for x in values)) if found else out

    def settle(self, result: Any) -> Any:
        """The result alone; the tensors behind it go into the dictionaries."""
        if not self._new:
            return result
        out, *values = result
        for name, key, count in self._new:
            self._shared[name][key] = tuple(values[:count])
            del values[:count]
        return out


def _device(tensors: Sequence[Tensor]) -> torch.device | None:
    return next((tensor.device for tensor in tensors), None)


class EncoderForward:
    """Takes the place of an encoder layer's ``forward``: checkpointed when its encoder says so.

    transformers' encoders of images have the switch, but do nothing with it.

    Args:
        layer: of the encoder.
        encoder: which transformers tells whether to checkpoint, and how.
        function: the one to use; None is what transformers gave the encoder.
    """

    def __init__(
        self, layer: nn.Module, encoder: nn.Module, function: Checkpointing | None
    ) -> None:
        self.layer = layer
        self.encoder = encoder
        self.function = function
        self._previous = layer.__dict__.get("forward")
        layer.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward."""
        forward = self._previous
        if forward is None:
            forward = functools.partial(type(self.layer).forward, self.layer)
        run = functools.partial(forward, **kwargs)
        return run_layer(run, self.layer, self.encoder, args=args, function=self.function)

    def remove(self) -> None:
        """Give the layer its forward back."""
        del self.layer.__dict__["forward"]
        if self._previous is not None:
            self.layer.forward = self._previous


def run_layer(
    forward: Callable[..., Any],
    layer: nn.Module,
    owner: nn.Module,
    *,
    args: Sequence[Any],
    function: Checkpointing | None = None,
) -> Any:
    """A layer's result, checkpointed where the module that has the layers says so.

    Args:
        forward: of the layer, with its keywords.
        layer: whose parameters tell whether it trains.
        owner: which transformers tells whether to checkpoint, and how.
        args: positional arguments of ``forward``.
        function: the one to use; None is what transformers gave the owner.
    """
    if not (getattr(owner, _FLAG, False) and layer.training):
        return forward(*args)
    # Models with a switch of their own, from before transformers had one, have no function.
    given = getattr(owner, _FUNCTION, _DEFAULT)
    run = LayerCheckpointing(
        layer,
        given,
        function=checkpointing(given) if function is None else function,
        # A layer of an encoder: what it is given is used elsewhere, too.
        keeps_arguments=not is_patched(layer),
    )
    return run(forward, *args)


class CheckpointLayers(Hook):
    """A forward pre-hook of the model: sees to it that checkpointed layers attend once.

    Args:
        model: a transformers model whose attention modules are patched.
        section: of the ds_config; None leaves it to transformers whether layers are checkpointed,
            and how.
        encoders: encoders of images, with ``layers``.
    """

    def __init__(
        self,
        model: nn.Module,
        section: ActivationCheckpointing | None,
        encoders: Sequence[nn.Module] = (),
    ) -> None:
        self._layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        owners = [m for m in model.modules() if hasattr(m, _FLAG)]
        # Modules whose own code checkpoints the layers that it loops over.
        self._loops = [m for m in owners if m not in encoders and _loops(m)]
        self._before = [(m, m.__dict__.get(_FLAG)) for m in owners]
        self._section = section
        if section is not None:
            section.check_layers(self._count())
            self._switch_on(model)
        self._wrap()
        function = None if section is None else checkpointing(deepspeed.checkpointing.checkpoint)
        self._encoder_layers = [
            EncoderForward(layer, encoder, function)
            for encoder in encoders
            for layer in cast(Sequence[nn.Module], encoder.layers)
        ]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._wrap()
        if self._section is None:
            return
        self._section.make_room(self._count())
        asks = kwargs.get("output_hidden_states") or _configured(module, "output_hidden_states")
        if asks and self._section.empties_arguments:
            raise ValueError(
                "got output_hidden_states=True, in the call or in the model's config, with "
                "partition_activations or cpu_checkpointing, under which DeepSpeed empties the "
                "states between layers; leave it out, or remove those keys from "
                "activation_checkpointing"
            )

    def undo(self) -> None:
        """Give the layers back as they were."""
        for forward in self._encoder_layers:
            forward.remove()
        for module in (*self._layers, *self._loops):
            function = module.__dict__.get(_FUNCTION)
            if isinstance(function, LayerCheckpointing):
                setattr(module, _FUNCTION, function.previous)
        if self._section is None:
            return
        for module, flag in self._before:
            if flag is None:
                module.__dict__.pop(_FLAG, None)
            else:
                setattr(module, _FLAG, flag)

    def _count(self) -> int:
        looped = [layer for loop in self._loops for layer in _stack(loop)]
        return sum(map(is_patched, (*self._layers, *looped)))

    def _switch_on(self, model: Any) -> None:
        if not any(layer.gradient_checkpointing for layer in self._layers):
            # Some models are no transformers models and hold one, or several.
            owners = (m for m in model.modules() if hasattr(m, _SWITCH))
            owner = next(m for m in owners if {*self._layers[:1]} <= {*m.modules()})
            # Not by calling it: a switch of older code takes other arguments.
            for module in owner.modules():
                if hasattr(module, _FLAG):
                    setattr(module, _FLAG, True)
                    setattr(module, _FUNCTION, deepspeed.checkpointing.checkpoint)

    def _wrap(self) -> None:
        for layer in self._layers:
            # A layer of an encoder: what it is given is used elsewhere, too.
            self._wrap_one(layer, keeps_arguments=not is_patched(layer))
        if self._section is not None:
            for encoder in self._loops:
                if not is_patched(encoder):
                    self._wrap_one(encoder, keeps_arguments=True)

    def _wrap_one(self, module: nn.Module, *, keeps_arguments: bool) -> None:
        found = module.__dict__.get(_FUNCTION)
        if found is None or not getattr(module, _FLAG) or isinstance(found, LayerCheckpointing):
            return
        chosen = found if self._section is None else deepspeed.checkpointing.checkpoint
        wrapped = LayerCheckpointing(
            module, found, function=checkpointing(chosen), keeps_arguments=keeps_arguments
        )
        setattr(module, _FUNCTION, wrapped)


def _loops(module: Any) -> bool:
    """Whether a module with the switch has layers without one."""
    layers = _stack(module)
    return len(layers) > 0 and not any(hasattr(layer, _FLAG) for layer in layers)


def _stack(module: Any) -> Sequence[nn.Module]:
    """The layers of a module, by the names that they have in models."""
    found = (getattr(module, name, None) for name in ("layers", "h"))
    return next((tuple(each) for each in found if isinstance(each, nn.ModuleList)), ())


def _configured(model: nn.Module, key: str) -> bool:
    config = getattr(model, "config", None)
    return any(getattr(c, key, False) for c in (config, getattr(config, "text_config", None)))
