"""Types of GLM-4.1V's tokens: images and frames of videos stand at the same token, so that a video
is told by its begin and its end."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def token_types(ids: Tensor, config: Any) -> Tensor:
    """int64 ``[B, T]``: 1 for an image's tokens, 2 for a video's, 0 for text, as transformers'
    processor numbers them."""
    begun = (ids == config.video_start_token_id).cumsum(dim=1)
    ended = (ids == config.video_end_token_id).cumsum(dim=1)
    visual = (ids == config.image_token_id).long()
    return visual + visual * (begun > ended)
