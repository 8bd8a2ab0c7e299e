"""A worker of the kernel benchmark that ends in the middle of `triton` and after `native`.

Without PyTorch, so that it starts at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Do what `ds_lvx.compare.kernels.worker` does, by the same file."""
    request = json.loads(Path(sys.argv[1]).read_text())
    with Path(request["path"]).open("a", buffering=1) as file:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")

        if request["rates"]:
            write({"rates": {"matrix_flops": 1.0, "memory_bytes_per_s": 1.0}})
        for item in request["items"]:
            case, candidate = item["case"], item["candidate"]
            suffix = "-visibility" if case["visibility"] else ""
            name = f"{case['model']}-{case['queries']}{suffix}/{candidate}/{item['direction']}"
            write({"began": name})
            if candidate == "triton" and item["direction"] == "forward":
                os._exit(3)
            write({"item": name, "record": {"status": "left out", "reason": "a test"}})
            if candidate == "native" and item["direction"] == "backward":
                sys.exit("CUDA is broken behind this one")
    Path(sys.argv[1]).with_name(f"answer-{os.environ['RANK']}.json").write_text("null")


if __name__ == "__main__":
    main()
