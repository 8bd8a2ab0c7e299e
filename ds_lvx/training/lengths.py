"""What the order of samples goes by, found once, by all ranks together: how long each is, in text
tokens and visual tokens, and which have the same media."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable

from ds_lvx.data.chat import Chats
from ds_lvx.data.conversation import Conversation
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

    def length(chat: Conversation) -> int:
        sample = maker.sample(chat)
        return len(sample.text.input_ids) + sample.num_frames * frame_tokens

    return _of_all(chats, length, world)


def sample_media(chats: Chats, *, world: Channel) -> array[int]:
    """A number of every sample, the same for those of a file with the same media, all of them, in
    the same order, wherever a node has them; those without media, or in other files of the data,
    have others.

    Args:
        chats: the samples.
        world: all ranks, which take shares.

    Raises:
        ValueError: on all ranks: a sample that cannot be read.

    Collectives: one agreement on the control plane, 12 bytes a sample.
    """

    def number(chat: Conversation) -> int:
        if not chat.media:
            return -1
        media = repr(chat.media).replace(f"{chats.folder}/", "")
        return zlib.crc32(media.encode())

    found = _of_all(chats, number, world)
    file = (block for block, count in enumerate(chats.blocks) for _ in range(count))
    known: dict[tuple[int, int], int] = {}
    return array(
        "q",
        (
            known.setdefault((block, media), len(known)) if media >= 0 else -1 - index
            for index, (block, media) in enumerate(zip(file, found, strict=True))
        ),
    )


def _of_all(chats: Chats, find: Callable[[Conversation], int], world: Channel) -> array[int]:
    def mine() -> tuple[None, dict[str, list[int]]]:
        shares = range(world.rank, len(chats), world.size)
        return None, {"found": [find(chats[index]) for index in shares]}

    _, records = told(world, mine)
    numbers = array("q", [0]) * len(chats)
    for rank, record in enumerate(records):
        numbers[rank :: world.size] = array("q", record["found"])
    return numbers
