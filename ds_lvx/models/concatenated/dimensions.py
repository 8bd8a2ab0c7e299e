"""What these models have in common for the planner. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ds_lvx.models.dimensions import Model


@dataclass(frozen=True)
class Merged(Model):
    """A model whose projector works on visual tokens, not on patches."""

    @property
    def projector_tokens(self) -> int:
        """See `ds_lvx.models.dimensions.Model.projector_tokens`."""
        return self.frame_tokens
