"""How long each sample is, in text tokens and visual tokens: found once, by all ranks together."""

from __future__ import annotations

from array import array

from ds_lvx.data.chat import Chats
from ds_lvx.distributed.channel import Channel
from ds_lvx.distributed.together import told
from ds_lvx.training.check import Checks
from ds_lvx.training.model import Source


def tokens_beside(source: Source) -> int:
    """Visual tokens of a frame that do not stand among the text's, which counts those itself."""
    return source.family.frame_tokens(source.config) if source.family.features_key else 0


def sample_lengths(chats: Chats, checks: Checks, source: Source, *, world: Channel) -> array[int]:
    """Text tokens and visual tokens of every sample, the frames' headers read, no frame decoded.

    Args:
        chats: the samples.
        checks: how they are written and which frames are taken.
        source: of the model.
        world: all ranks, which take shares.

    Raises:
        ValueError: on all ranks: a sample that cannot be written.

    Collectives: one agreement on the control plane, 10 bytes a sample.
    """
    maker = checks.maker(source)
    frame_tokens = tokens_beside(source)

    def mine() -> tuple[None, dict[str, list[int]]]:
        found = []
        for index in range(world.rank, len(chats), world.size):
            sample = maker.sample(chats[index])
            found.append(len(sample.text.input_ids) + sample.num_frames * frame_tokens)
        return None, {"lengths": found}

    _, records = told(world, mine)
    lengths = array("q", [0]) * len(chats)
    for rank, record in enumerate(records):
        lengths[rank :: world.size] = array("q", record["lengths"])
    return lengths
