"""What other trainers need for the same sample, where visual tokens stand among the text's.

Both run Ulysses in the text, on contiguous pieces of a sequence of embeddings that every rank has
whole. Legend: ``T`` tokens of a sample, ``V`` visual ones, ``h`` the text's width, n ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_lvx.plan.memory import footprint, tower_bytes
from ds_lvx.plan.scenario import Scenario


@dataclass(frozen=True)
class Peers:
    """Bytes of a rank."""

    # At the peak, where each rank encodes its frames, and all embeddings are gathered.
    gathered: int
    sent: int  # for that, in a step, beside what attention sends
    whole_towers: int  # at the peak, where each rank encodes all frames


def peers(scenario: Scenario, *, gpus: int, ranks: int) -> Peers:
    """Predict them for ``ranks`` ranks that share a sample.

    Embeddings are gathered when nothing of the text is there yet, and their gradients when nothing
    is there any more. At once there are then, ``h`` numbers a token: the gradient of the embeddings
    of the text, that of the features, what is sent of it and what comes, ``T + 3 V``. In forward it
    is ``2 T + V``, or with the whole tower, whose features come from nowhere, as much.
    """
    own = footprint(scenario, gpus=gpus, ranks=ranks, way="ulysses")
    width = scenario.element_bytes * scenario.model.text.hidden
    visual, both = scenario.visual_tokens, scenario.sequence
    gathering = width * (both + 3 * visual) if scenario.trains_all else width * (2 * both + visual)
    tower, stays = tower_bytes(scenario, scenario.frames * scenario.model.tower_tokens)
    text = own.cross + own.text
    whole = max(tower, stays + max(text, width * (2 * both + visual)))
    return Peers(
        gathered=max(own.peak, own.states + own.vision_stays + gathering),
        sent=2 * width * (ranks - 1) * (visual // ranks),
        whole_towers=own.states + whole,
    )
