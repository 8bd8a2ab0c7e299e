"""What a GPU can do at most, by its data sheet."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A device, as its maker's data sheet has it."""

    name: str  # how it is asked for
    matrix_flops: float  # bf16 matrix products without sparsity, operations a second
    memory_bytes_per_s: float  # of the device's memory
    memory_bytes: int  # of the device's memory
    # To its neighbours in a node, one way, where they are joined by NVLink; 0 where only PCIe joins
    # them.
    link_bytes_per_s: float
    source: str  # the data sheet


CARDS = {
    card.name: card
    for card in (
        Card("A30", 165e12, 933e9, 24 * GIB, 100e9, "NVIDIA A30 data sheet"),
        Card("A100-40", 312e12, 1555e9, 40 * GIB, 300e9, "NVIDIA A100 data sheet"),
        Card("A100-80", 312e12, 2039e9, 80 * GIB, 300e9, "NVIDIA A100 data sheet"),
        Card("H100", 989.4e12, 3350e9, 80 * GIB, 450e9, "NVIDIA H100 data sheet (SXM)"),
        Card("H200", 989.4e12, 4800e9, 141 * 10**9, 450e9, "NVIDIA H200 data sheet (SXM)"),
        Card("B200", 2250e12, 8000e9, 180 * 10**9, 900e9, "NVIDIA DGX B200 data sheet"),
    )
}


def card(name: str) -> Card:
    """The card of this name, in any case.

    Raises:
        ValueError: an unknown one; lists the known.
    """
    for known, found in CARDS.items():
        if known.lower() == name.lower():
            return found
    near = get_close_matches(name.upper(), CARDS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"card: got {name!r}; expected one of {list(CARDS)}{hint}")
