"""Frames, masks and positions of the double of MOSS-VL (`tests.models.moss_vl_double`)."""

from __future__ import annotations

import torch


def frames_of(grid_thw, media_nums_per_sample, merge):
    """For each sample the ``(h, w)`` of its frames, in merged patches."""
    rows = iter(grid_thw.tolist())
    samples = [[next(rows) for _ in range(count)] for count in media_nums_per_sample]
    return [[(h // merge, w // merge) for t, h, w in rows for _ in range(t)] for rows in samples]


def expanded(mask, tokens, length):
    """``[B, 1, T, F]``, True = hidden -> ``[B, 1, T, length]``."""
    out = torch.ones(*mask.shape[:3], length, dtype=torch.bool)
    for row, counts, filled in zip(mask, tokens, out, strict=True):
        each = row[..., : len(counts)].repeat_interleave(torch.tensor(counts, dtype=int), dim=-1)
        filled[..., : each.shape[-1]] = each
    return out


def xrope(pads, valid, frames, length):
    """Positions of the text ``[3, B, T]`` and of the visual tokens ``[3, B, length]``.

    A walk through each sample: a text token takes one position, a frame as many as the longer of
    its sides, and one for the separator, which it shares with its token in the text.
    """
    text = torch.zeros(pads.shape, dtype=torch.long)
    vision = torch.zeros(3, len(pads), length, dtype=torch.long)
    for row, sample in enumerate(frames):
        waiting, place, now = iter(sample), 0, 0
        for column in range(pads.shape[1]):
            if not valid[row, column]:
                continue
            frame = next(waiting, None) if pads[row, column] else None
            if frame is not None:
                h, w = frame
                across = torch.stack(
                    [
                        torch.full((h, w), now),
                        *torch.meshgrid(
                            torch.arange(now, now + h), torch.arange(now, now + w), indexing="ij"
                        ),
                    ]
                )
                now += max(h, w)
                end = place + h * w
                vision[:, row, place:end] = across.flatten(1)
                vision[:, row, end] = now
                place = end + 1
            text[row, column] = now
            now += 0 if pads[row, column] and frame is None else 1
    return text.expand(3, -1, -1), vision
