"""The arguments of a forward of generation, of models whose code is not transformers'.

Code that comes with a checkpoint cuts masks and images to the tokens at hand, by arguments that
transformers no longer gives. With sharded keys all of that comes with the keyword, and
transformers' own way is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin

from ds_lvx.models.patch import KEYWORD, Hook

_PREPARE = "prepare_inputs_for_generation"


class PlainInputs(Hook):
    """A forward pre-hook of a model that generates; it only knows what to put back.

    In the place of the model's own way it puts itself as `prepare`.

    Args:
        model: of transformers' ``GenerationMixin``.
        visual: arguments by which the model's own generation is told.
    """

    def __init__(self, model: Any, visual: Collection[str]) -> None:
        self._model, self._visual = model, frozenset(visual)
        self._before = vars(model).get(_PREPARE)
        self._own = getattr(model, _PREPARE)
        setattr(model, _PREPARE, self.prepare)

    def __call__(self, module: nn.Module, args: Any) -> None:
        return None

    def prepare(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> dict[str, Any]:
        """What the model's forward gets: by its own way where it is to look at images itself.

        The cache has a name here, because transformers refuses one that no signature names.
        """
        kwargs["past_key_values"] = past_key_values
        if not self._visual.isdisjoint(kwargs):
            made: dict[str, Any] = self._own(*args, **kwargs)
            return made
        return GenerationMixin.prepare_inputs_for_generation(self._model, *args, **kwargs)

    def undo(self) -> None:
        """Give the model its own way back."""
        vars(self._model).pop(_PREPARE, None)
        if self._before is not None:
            setattr(self._model, _PREPARE, self._before)


def plain_inputs(model: Any, visual: Collection[str]) -> None:
    """Put `PlainInputs` on a model, where it can generate."""
    if _generates(model):
        model.register_forward_pre_hook(PlainInputs(model, visual))


class EncodePixels(Hook):
    """A forward pre-hook of the text model, the first: pixels of a prompt to features.

    It is for models whose generation is the text model's own, which is handed the pixels.

    Args:
        encoded: makes features of pixels.
        pixels, features: the arguments.
    """

    def __init__(self, encoded: Callable[[Tensor], Any], pixels: str, features: str) -> None:
        self._encoded, self._pixels, self._features = encoded, pixels, features

    def __call__(
        self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        given = dict(kwargs)
        pixels = given.pop(self._pixels, None)
        if given.get(KEYWORD) is None or pixels is None:
            return None
        return args, {**given, self._features: self._encoded(pixels)}


def generating(model: Any) -> Any:
    """The model itself, where it can generate.

    Raises:
        NotImplementedError: its code has no ``GenerationMixin``, which transformers 5 asks for.
    """
    if _generates(model):
        return model
    raise NotImplementedError(
        f"got a {type(model).__name__} that is no GenerationMixin of transformers; expected one: "
        "in transformers 5 no model generates without it, so add it to the bases of the class in "
        "the checkpoint's modeling file"
    )


def _generates(model: Any) -> bool:
    return isinstance(model, GenerationMixin)
