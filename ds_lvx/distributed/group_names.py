"""Names of process groups that only their members make.

torch names such a group by its ranks and by how many groups this process is in
(``_hash_ranks_to_str``, torch 2.1 to 2.13). Where members are in different numbers of groups, they
wait for each other under two names, until the timeout; and a group that is made after another has
ended gets its name, and finds its addresses. The name is ours here, as long as torch asks itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ASKED = "_process_group_name"


@contextmanager
def named(c10d: Any, name: str) -> Iterator[None]:
    """Give the group that torch makes inside this name.

    Args:
        c10d: ``torch.distributed.distributed_c10d``.
        name: the same on all members, and of no other group before or after.
    """
    torchs_own = getattr(c10d, _ASKED, None)
    if torchs_own is None:  # a torch that names its groups in another way
        yield
        return
    setattr(c10d, _ASKED, lambda *_, **__: name)
    try:
        yield
    finally:
        setattr(c10d, _ASKED, torchs_own)
