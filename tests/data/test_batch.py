from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from ds_lvx import SequenceParallelGroups, owned
from ds_lvx.data.batch import BatchMaker, FrameRate
from ds_lvx.data.chat import Conversation, read_conversations
from ds_lvx.data.errors import DataError
from ds_lvx.data.frames import decode, probe
from ds_lvx.data.limits import Limits
from ds_lvx.data.order import SampleOrder
from ds_lvx.data.text import TextEncoder
from ds_lvx.models import FAMILIES
from ds_lvx.models.mllama.tiny import tiny_processor
from tests.data.media import BUNNY, chat, write_image, write_jsonl, write_png_header, write_video
from tests.elsewhere import ElsewhereByDefault
from tests.ranks import run_ranks

MLLAMA = FAMILIES.named("mllama")


def _maker(count: int, owned: range | None = None, *, min_tokens: int = 1) -> BatchMaker:
    processor = tiny_processor()
    processor.image_processor.max_image_tiles = 2
    return BatchMaker(
        TextEncoder(processor, 500, family=MLLAMA),
        FrameRate(count=count),
        owned=lambda total: range(total) if owned is None else owned,
        min_tokens=min_tokens,
    )


@pytest.fixture
def conversations(tmp_path: Path) -> list[Conversation]:
    """Five frames in two places of the text; and one."""
    write_video(tmp_path / "a.mp4")
    write_image(tmp_path / "a.png", (100, 40))
    write_image(tmp_path / "b.jpg")
    first = chat(("text", "look"), ("video", "a.mp4"), ("image", "a.png"), ("text", "here"))
    more = chat(("image", "b.jpg"), ("text", "and here?"), answer="No")
    first["messages"] += more["messages"]
    second = chat(("text", "What?"), ("image", "b.jpg"), answer="Red")
    return read_conversations(write_jsonl(tmp_path / "d.jsonl", first, second))


def test_a_batch_is_what_the_processor_makes(conversations: list[Conversation]) -> None:
    maker = _maker(3)
    with ElsewhereByDefault():
        made = maker.batch(conversations)
    batch = made.inputs
    assert (made.num_tokens, made.num_frames) == (int(batch["attention_mask"].sum()), 6)

    processor = tiny_processor()
    processor.image_processor.max_image_tiles = 2
    folder = Path(conversations[0].source.path).parent
    video = probe(str(folder / "a.mp4"))
    images = [*decode(video, (6, 20, 33))]
    images += [Image.open(folder / name).convert("RGB") for name in ("a.png", "b.jpg")]
    texts = [maker.encoder.tokenizer.decode(row) for row in batch["input_ids"]]
    texts = [text.replace("<|end_of_text|>", "") for text in texts]
    expected = processor(
        text=texts,
        images=[images, [images[-1]]],
        add_special_tokens=False,
        padding=True,
        return_tensors="pt",
    )
    for key in ("input_ids", "attention_mask", "pixel_values", "aspect_ratio_ids"):
        torch.testing.assert_close(batch[key], expected[key], rtol=0, atol=0, msg=key)
    torch.testing.assert_close(batch["aspect_ratio_mask"], expected["aspect_ratio_mask"])

    index = torch.arange(5)
    start, end = batch["visible_images"][..., :1], batch["visible_images"][..., 1:]
    seen = (start <= index) & (index < end)
    tiles = torch.ones(2, 5, 2, dtype=torch.bool)
    tiles[:, :, 1] = batch["aspect_ratio_ids"] > 1
    dense = seen[..., None] & tiles[:, None]
    torch.testing.assert_close(dense.long(), expected["cross_attention_mask"])
    assert 262 not in batch["labels"], "the image token is nothing to learn"


def test_ranks_hold_and_decode_their_own_frames(conversations: list[Conversation]) -> None:
    whole = _maker(3).batch(conversations).inputs
    parts, decoded = [], []
    for mine in (range(2), range(2, 2), range(2, 5)):
        maker = _maker(3, mine)
        parts.append(maker.batch(conversations).inputs)
        decoded.append(maker.counter.frames)
    assert decoded == [7 + 1, 0, 4]  # frames 6 and 20 (a keyframe); none; 33 from 30 on
    for key in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        joined = torch.cat([part[key] for part in parts], dim=1)
        torch.testing.assert_close(joined, whole[key], rtol=0, atol=0, msg=key)
    for key in ("input_ids", "labels", "visible_images"):
        assert all(torch.equal(part[key], whole[key]) for part in parts), key


def _encoder() -> TextEncoder:
    return TextEncoder(tiny_processor(), 500, family=MLLAMA)


def decoded_on_this_rank(data: Path) -> tuple[int, int, torch.Tensor]:
    """On a rank: frames in the batch, frames that left the decoder, and the pixels' sums."""
    SequenceParallelGroups(2)
    maker = BatchMaker(_encoder(), FrameRate(fps=25), owned=owned)
    pixels = maker.batch(read_conversations(data)).inputs["pixel_values"]
    return pixels.shape[1], maker.counter.frames, pixels.flatten(2).sum(dim=-1)[0]


@pytest.mark.exhaustive
def test_two_ranks_share_the_132_frames_of_a_real_video(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", chat(("video", str(BUNNY))))
    (held, decoded, sums), (held_too, decoded_too, sums_too) = run_ranks(
        decoded_on_this_rank, 2, data
    )
    assert (held, held_too) == (66, 66)
    # The only keyframe is the first frame: the second rank's lead-in is the first rank's half.
    assert (decoded, decoded_too) == (66, 132)
    maker = BatchMaker(_encoder(), FrameRate(fps=25), owned=range)
    whole = maker.batch(read_conversations(data)).inputs["pixel_values"]
    torch.testing.assert_close(torch.cat([sums, sums_too]), whole.flatten(2).sum(dim=-1)[0])


@pytest.mark.parametrize("name", ["a.avi", "a.ts", "a.mp4"])
def test_ranks_agree_on_films_of_every_kind(tmp_path: Path, name: str) -> None:
    """An AVI is counted by decoding, a TS read by its packets, an MP4 by its header."""
    write_video(tmp_path / name)
    data = read_conversations(write_jsonl(tmp_path / "d.jsonl", chat(("video", name))))

    def pixels(mine: range) -> torch.Tensor:
        rate = FrameRate(fps=12.5, max_frames=7)
        return (
            BatchMaker(_encoder(), rate, owned=lambda total: mine)
            .batch(data)
            .inputs["pixel_values"]
        )

    whole = pixels(range(7))
    assert whole.shape[1] == 7
    parts = torch.cat([pixels(mine) for mine in (range(3), range(3, 4), range(4, 7))], dim=1)
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def test_limits_hold_for_images_and_films_with_file_and_line(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    write_image(tmp_path / "a.png", (100, 40))
    lines = [chat(("video", "a.mp4")), chat(("image", "a.png"))]
    data = read_conversations(write_jsonl(tmp_path / "d.jsonl", *lines))
    for limits, number in ((Limits(max_film_frames=39), 1), (Limits(max_pixels=3999), 2)):
        maker = BatchMaker(_encoder(), FrameRate(fps=1), owned=range, limits=limits)
        with pytest.raises(DataError, match=rf"d\.jsonl:{number}: .*/a\.(mp4|png): got"):
            maker.batch(data[number - 1 : number])
        maker.batch(data[2 - number : 3 - number])


def test_text_alone_has_no_pixels(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", chat(("text", "Hi")))
    assert set(_maker(3).batch(read_conversations(path)).inputs) == {
        "input_ids",
        "attention_mask",
        "labels",
    }


@pytest.mark.slow
def test_a_bad_file_is_named_with_its_line_by_the_rank_that_decodes_it(tmp_path: Path) -> None:
    damaged = bytearray(BUNNY.read_bytes())
    damaged[800_000:1_000_000] = bytes(7 * n % 256 for n in range(200_000))
    (tmp_path / "bad.mp4").write_bytes(damaged)
    write_png_header(tmp_path / "huge.png", 40_000, 25_000)
    (tmp_path / "text.mp4").write_text("hello")
    samples = read_conversations(
        write_jsonl(
            tmp_path / "d.jsonl",
            chat(("video", "bad.mp4")),
            chat(("image", "huge.png")),
            chat(("video", "text.mp4")),
        )
    )
    _maker(132, range(20)).batch(samples[:1])  # the damage lies in the second half
    for number, mine in ((1, range(66, 132)), (2, range(1)), (3, range(0))):
        with pytest.raises(DataError, match=rf"d\.jsonl:{number}: .*(mp4|png): got"):
            _maker(132, mine).batch(samples[number - 1 : number])


def test_a_line_says_which_frames_of_its_video_are_taken(tmp_path: Path) -> None:
    """40 frames, 25 a second."""
    write_video(tmp_path / "a.mp4")
    record = chat(*[("video", "a.mp4")] * 3)
    _, fps, nframes = record["messages"][0]["content"]
    fps["fps"], nframes["nframes"] = 5, 2
    (conversation,) = read_conversations(write_jsonl(tmp_path / "d.jsonl", record))
    taken = [frames.indices for frames in _maker(3).sample(conversation).frames]
    assert taken == [(6, 20, 33), (0, 5, 10, 15, 20, 25, 30, 35), (10, 30)]


def test_every_rank_needs_a_token(conversations: list[Conversation]) -> None:
    tokens = len(_maker(3).sample(conversations[1]).text.input_ids)
    assert _maker(3, min_tokens=tokens).batch(conversations[1:])
    with pytest.raises(DataError, match=rf"d\.jsonl:2: got {tokens} text tokens"):
        _maker(3, min_tokens=tokens + 1).batch(conversations[1:])


def test_order_is_a_permutation_each_epoch_and_knows_its_place() -> None:
    order = SampleOrder(5, seed=3)
    epochs = [[order.sample(5 * epoch + n) for n in range(5)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    stream = [n for epoch in epochs for n in epoch]
    both = [order.micro_batch(4, 2, replica=r) for r in range(2)]
    assert both == [stream[4:6], stream[6:8]]
    assert [SampleOrder(5, seed=3).sample(n) for n in range(15)] == stream
    assert [SampleOrder(5, seed=4).sample(n) for n in range(15)] != stream
    assert [SampleOrder(3, seed=4, shuffle=False).sample(n) for n in range(4)] == [0, 1, 2, 0]


@pytest.mark.parametrize("count", [40, 41, 43])
def test_samples_of_one_length_come_together(count: int) -> None:
    """2 replicas of 2 samples: every batch inside of an epoch, wherever the epoch begins."""
    lengths = [(7 * n) % count for n in range(count)]
    order = SampleOrder(count, seed=3, lengths=lengths, together=4)
    places = [order.sample(place) for place in range(3 * count)]
    epochs = [places[first : first + count] for first in range(0, 3 * count, count)]
    assert all(sorted(epoch) == [*range(count)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    spreads = []
    for first in range(0, 3 * count - 3, 4):
        batch = [n for r in (0, 1) for n in order.micro_batch(first, 2, replica=r)]
        assert batch == places[first : first + 4]
        found = [lengths[n] for n in batch]
        spreads.append(max(found) - min(found))
    # A batch over the end of an epoch, and what is left of one, may be of any lengths.
    assert sum(spread > 3 for spread in spreads) <= 2 * 3
    assert [order.sample(place) for place in range(count, count + 9)] == epochs[1][:9]
