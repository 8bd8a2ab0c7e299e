"""What experts need where ranks choose others, and what their routers cannot be given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepspeed.utils import set_z3_leaf_module, z3_leaf_module
from torch import nn

from ds_lvx.models.concatenated.family import Concatenated
from ds_lvx.models.concatenated.forward import Embed
from ds_lvx.models.layers import LayerPlan
from ds_lvx.models.patch import KEYWORD, Hook

ROUTERS = "output_router_logits"
_LEAF = "_z3_leaf"
"""Where DeepSpeed marks a module whose own modules it does not ask."""


class OneForZero(Hook):
    """A forward pre-hook that does nothing: for ZeRO-3 a layer's experts are one module.

    Transformers' loop over the experts that a rank's tokens choose calls an activation for each, a
    module too, and ZeRO-3 would find that ranks run different modules, or hang.
    """

    def __init__(self, experts: nn.Module) -> None:
        self._experts = experts
        self._was_one = z3_leaf_module(experts)
        set_z3_leaf_module(experts, True)

    def __call__(self, module: nn.Module, args: Any) -> None:
        return None

    def undo(self) -> None:
        """Let ZeRO-3 see the modules again, where it did before."""
        if not self._was_one:
            vars(self._experts).pop(_LEAF, None)


class EmbedOfExperts(Embed):
    """`Embed` that hears of the routers' own loss.

    That experts are used evenly, which it asks for, is not linear in the tokens: what ranks find
    of theirs does not add up to it.
    """

    def __call__(
        self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        if kwargs.get(KEYWORD) is not None and kwargs.get(ROUTERS):
            raise router_loss("a forward")
        return super().__call__(module, args, kwargs)


class OfExperts(Concatenated):
    """Base of families whose text has experts.

    Attributes:
        of_experts: class of a layer's.
    """

    embed: type[Embed] = EmbedOfExperts
    of_experts: type[nn.Module]

    def check(self, model: Any, *, sp_size: int) -> None:
        super().check(model, sp_size=sp_size)
        if getattr(model.config.text_config, ROUTERS, False):
            raise router_loss("a text model")

    def install(self, model: Any, plans: Sequence[LayerPlan]) -> None:
        super().install(model, plans)
        for module in self.text_model(model).modules():
            if isinstance(module, self.of_experts):
                module.register_forward_pre_hook(OneForZero(module))


def router_loss(what: str) -> NotImplementedError:
    """What to do where a model is to learn from its routers."""
    return NotImplementedError(
        f"got {what} with {ROUTERS}, which adds a loss of the routers over all tokens of a batch; "
        "a rank has only its own: set it to false in the text's config, as the published models "
        "have it, and leave it out of the forward (with TRL say router_aux_loss_coef=0.0)"
    )
