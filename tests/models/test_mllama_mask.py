"""The compact form of mllama's mask against transformers' own, dense one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.mllama.modeling_mllama import _prepare_cross_attention_mask

from ds_lvx.models import runs as runs_module
from ds_lvx.models.mllama import visible_images
from ds_lvx.models.runs import Runs
from ds_lvx.models.visual import pack_tiles, unpack_tiles
from tests.largest import LargestTensor
from tests.models.mllama_case import IMAGE, PATCHES, TILES, processor_mask


def random_streams(count: int, *, length: int, seed: int) -> tuple[Tensor, list[list[int]]]:
    """Texts with image tokens in random places, often adjacent, and the tiles of each image."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(count, 1, generator=generator) ** 2
    is_image = torch.rand(count, length, generator=generator) < share
    ids = torch.randint(1, IMAGE, (count, length), generator=generator)
    ids[is_image] = IMAGE
    counts = is_image.sum(dim=1).tolist()
    tiles = [torch.randint(1, TILES + 1, (n,), generator=generator).tolist() for n in counts]
    return ids, tiles


def dense_by_transformers(mask: Tensor) -> tuple[Tensor, Tensor]:
    """What a query really sees, bool ``[B, T, N * tiles * P]``, and its row mask."""
    bias, row_mask = _prepare_cross_attention_mask(mask, PATCHES, torch.float32)
    return bias[:, 0] == 0, row_mask


def tiles_of(num_tiles: list[list[int]], images: int) -> Tensor:
    tiles = torch.zeros(len(num_tiles), images, TILES, dtype=torch.bool)
    for sample, counts in enumerate(num_tiles):
        for image, count in enumerate(counts):
            tiles[sample, image, :count] = True
    return tiles


@pytest.mark.parametrize("seed", range(4))
def test_rule_reproduces_the_dense_mask_of_transformers(seed: int) -> None:
    ids, num_tiles = random_streams(6, length=23, seed=seed)
    mask = processor_mask(ids, num_tiles)
    runs = Runs.of_mask(mask)
    assert runs.tiles is not None
    whole = runs.visibility(runs.tiles, patches=PATCHES, blind_see_all=True)
    expected, row_mask = dense_by_transformers(mask)
    assert torch.equal(whole.mask(), expected)
    assert torch.equal(~runs.sees_nothing, row_mask[:, 0, :, 0].bool())


@pytest.mark.parametrize("images", [0, 1, 7, 3000])
def test_tiles_travel_in_a_short_text(images: int) -> None:
    tiles = torch.rand(2, images, 4, generator=torch.Generator().manual_seed(images)) < 0.5
    assert torch.equal(unpack_tiles(pack_tiles(tiles), (2, images, 4)), tiles)
    video = torch.zeros(1, images, 4, dtype=torch.bool)
    video[..., 0] = True
    assert len(pack_tiles(video)) < 40


def test_the_rule_of_a_long_video_is_made_at_once() -> None:
    """1.5M visual tokens: nothing larger than their positions, and those are int32."""
    visible = torch.arange(4096)[:, None].expand(-1, 2).contiguous()[None]
    with LargestTensor() as largest:
        rule = Runs.of_visible_images(visible).visibility(
            torch.ones(1, 234, 4).bool(), patches=1601
        )
    assert rule.kv_pos.shape == (1, 234 * 4 * 1601)
    assert rule.kv_pos.dtype == torch.int32
    assert largest.elements == rule.kv_pos.numel()


@pytest.mark.parametrize("seed", range(6))
def test_visible_images_is_the_rule_of_the_processor(seed: int) -> None:
    ids, num_tiles = random_streams(50, length=40, seed=100 + seed)
    mask = processor_mask(ids, num_tiles)
    runs = Runs.of_visible_images(visible_images(ids, IMAGE))
    images = mask.shape[2]
    runs.check_images(images)
    seen = runs.visibility(tiles_of(num_tiles, images), patches=1, blind_see_all=True)
    dense = mask.flatten(2) == 1
    expected = dense | ~dense.any(dim=2, keepdim=True)
    assert torch.equal(seen.mask(), expected)


def test_a_text_without_images() -> None:
    runs = Runs.of_visible_images(visible_images(torch.ones(2, 5, dtype=torch.long), IMAGE))
    assert runs.sees_nothing.all()
    runs.check_images(0)


def test_large_masks_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, num_tiles = random_streams(2, length=64, seed=3)
    mask = processor_mask(ids, num_tiles)
    expected = Runs.of_mask(mask)
    monkeypatch.setattr(runs_module, "_CHUNK_ELEMENTS", 3 * mask.shape[2] * TILES)
    pieces = Runs.of_mask(mask)
    assert torch.equal(pieces.start, expected.start)
    assert torch.equal(pieces.end, expected.end)


@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_a_mask_that_is_no_run_names_sample_and_token(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_module, "_CHUNK_ELEMENTS", chunk)
    mask = torch.ones(2, 6, 3, TILES, dtype=torch.long)
    mask[1, 4, 1] = 0  # images 0 and 2, but not 1
    with pytest.raises(ValueError, match="token 4 of sample 1"):
        Runs.of_mask(mask)


def test_tiles_that_differ_between_tokens_are_refused() -> None:
    mask = torch.ones(1, 6, 3, TILES, dtype=torch.long)
    mask[0, 2, 1, 1] = 0
    with pytest.raises(ValueError, match=r"token 2 of sample 0.*no run of images"):
        Runs.of_mask(mask)


def test_only_ones_are_visible_as_in_transformers() -> None:
    mask = torch.tensor([2.0, 1.0, 0.0]).view(1, 1, 3, 1)
    runs = Runs.of_mask(mask)
    assert (int(runs.start), int(runs.end)) == (1, 2)
    expected, _ = dense_by_transformers(mask)
    assert runs.tiles is not None
    rule = runs.visibility(runs.tiles, patches=PATCHES, blind_see_all=True)
    assert torch.equal(rule.mask(), expected)


def test_numbers_of_images_that_do_not_fit() -> None:
    runs = Runs.of_mask(torch.ones(1, 4, 2, TILES))
    with pytest.raises(ValueError, match="mask for 2 images a sample, and 3 images"):
        runs.check_images(3)
    visible = torch.tensor([[[0, 1], [0, 5]]])
    with pytest.raises(ValueError, match=r"reach to image 5.*3 images"):
        Runs.of_visible_images(visible).check_images(3)
