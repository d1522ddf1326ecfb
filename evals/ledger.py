"""An append-only file of JSON lines: what was measured, raw, and nothing that was measured is ever lost."""

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Ledger:
    """One JSON object a line. Any number of processes may append to it at once, and die while they do."""

    path: Path

    def append(self, record: Record) -> None:
        """Adds one line, whole or not at all, and returns when it is on the disk. Raises OSError where it cannot."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One writer at a time: whoever holds the lock knows where the file ends.
        with self.path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if end and _last_byte(file.fileno(), end) != b"\n":
                line = b"\n" + line  # behind what a killed process left
            try:
                written = 0
                while written < len(line):
                    written += file.write(line[written:])
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise

    def read(self) -> tuple[list[Record], list[int]]:
        """All records in order, and the numbers of the lines that are none: torn, or not ours. Those stay in the file."""
        if not self.path.exists():
            return [], []
        records, damaged = [], []
        for number, line in enumerate(self.path.read_bytes().splitlines(), start=1):
            record = _parsed(line)
            if record is None:
                damaged.append(number)
            else:
                records.append(record)
        return records, damaged


def _parsed(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _last_byte(file: int, end: int) -> bytes:
    return os.pread(file, 1, end - 1)
