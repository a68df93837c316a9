"""A run's numbers as JSON lines."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from rlhf.runs.errors import UserError


class JsonLines:
    """Appends JSON objects, one per line and unbuffered: a run can be watched, and loses none."""

    def __init__(self, path: Path):
        self.file = path.open("ab", buffering=0)

    def write(self, row: dict[str, Any]) -> None:
        """Write a row. Numbers that are not finite are left out, as JSON cannot hold them.

        With fp16, a step with such a gradient is skipped now and then.
        """
        row = {
            name: value
            for name, value in row.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        if self.file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def position(self) -> int:
        """Bytes that are safely on disk, so that what relies on them survives a power cut."""
        if Path(self.file.name).is_file():  # /dev/null cannot be flushed
            os.fsync(self.file.fileno())
        return self.file.tell()

    def cut(self, position: int) -> None:
        """Forget everything after the first `position` bytes."""
        if position > self.file.seek(0, os.SEEK_END):
            raise UserError(
                f"{self.file.name} has lost its end: it ended at byte {position}; start over with "
                "--overwrite"
            )
        self.file.seek(position)
        self.file.truncate()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:  # splitlines would also split at U+2028 in a text
        return [json.loads(line) for line in file]
