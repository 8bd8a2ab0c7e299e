"""Warnings: on the first rank, once a process."""

from __future__ import annotations

import functools
import logging

from ds_lvx.distributed.channel import Channel

_logger = logging.getLogger("ds_lvx")


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, on the first rank of the job alone, unless it was logged before."""
    if Channel.world().rank == 0:
        _logger.warning("%s", message)
