"""A worker of which rank 1 fails and rank 0 misses it, but is gone before it."""

from __future__ import annotations

import os
import sys
import time


def main() -> None:
    """The last words of rank 1 come first, its end second."""
    if os.environ["RANK"] == "1":
        print("rank 1 is broken", flush=True)
        time.sleep(1.0)
        sys.exit(5)
    time.sleep(0.3)
    sys.exit("rank 0 lost its peer")


if __name__ == "__main__":
    main()
