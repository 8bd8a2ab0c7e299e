"""What the experts of a rank's tokens need, and what their routers cannot be given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn

from ds_lvx.models.concatenated.forward import Embed
from ds_lvx.models.patch import KEYWORD, Hook

ROUTERS = "output_router_logits"
_LEAF = "_z3_leaf"
"""Where DeepSpeed marks a module whose own modules it does not ask."""


class AllExperts(Hook):
    """A forward hook of a layer's experts: ranks whose tokens choose others are one for ZeRO-3.

    It gathers the experts as one module. Transformers' loop over those that are chosen calls an
    activation for each, a module too, and ZeRO-3 would find that ranks run different modules.
    Without a token that loop would leave router and experts out of the graph; here their gradients
    are 0 then, and not none.
    """

    def __init__(self, experts: nn.Module) -> None:
        self._experts = experts
        set_z3_leaf_module(experts, True)

    def undo(self) -> None:
        """Let ZeRO-3 see the modules again."""
        vars(self._experts).pop(_LEAF, None)

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, Tensor, Tensor], made: Tensor
    ) -> Tensor | None:
        """
        Args:
            module: with all experts' weights.
            args: the tokens ``[n, hidden]``, their experts and the weights of these ``[n, k]``.
            made: ``[n, hidden]``.
        """
        tokens, _, weights = args
        if len(tokens) > 0:
            return None
        nothing = weights.sum()
        for parameter in module.parameters():
            nothing = nothing + parameter[:0].sum()
        return made + tokens + nothing


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


def router_loss(what: str) -> NotImplementedError:
    """What to do where a model is to learn from its routers."""
    return NotImplementedError(
        f"got {what} with {ROUTERS}, which adds a loss of the routers over all tokens of a batch; "
        "a rank has only its own: set it to false in the text's config, as the published models "
        "have it, and leave it out of the forward"
    )
