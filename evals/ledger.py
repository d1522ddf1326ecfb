"""An append-only file of JSON lines: what was measured, raw, and nothing that was measured is ever lost."""

import fcntl
import json
import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Ledger:
    """One JSON object a line. Any number of processes may append to it at once, and die while they do."""

    path: Path

    def append(self, *records: Record) -> None:
        """Adds a line each, whole or not at all, and returns when they are on the disk. Raises OSError where it cannot."""
        lines = b"".join(json.dumps(record, allow_nan=False).encode() + b"\n" for record in records)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One writer at a time: whoever holds the lock knows where the file ends.
        with self.path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._mend(file)
            end = file.seek(0, os.SEEK_END)
            try:
                _write(file, lines)
            except OSError:
                file.truncate(end)
                raise

    def mend(self) -> str:
        """Sets aside what a killed process left behind the last whole line; says so in words, empty if there was nothing."""
        if not self.path.exists():
            return ""
        with self.path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return self._mend(file)

    def _mend(self, file: FileIO) -> str:
        end = file.seek(0, os.SEEK_END)
        if not end or os.pread(file.fileno(), 1, end - 1) == b"\n":
            return ""
        content = os.pread(file.fileno(), end, 0)
        start = content.rfind(b"\n") + 1
        if _parsed(content[start:]) is not None:  # whole but for its end
            _write(file, b"\n")
            return ""
        with self.torn.open("ab", buffering=0) as aside:
            _write(aside, content[start:] + b"\n")
        file.truncate(start)
        return f"the last line of {self.path} was torn, and is set aside in {self.torn}"

    @property
    def torn(self) -> Path:
        """Where torn lines go, as they were found."""
        return self.path.with_suffix(".torn")

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


def _write(file: FileIO, data: bytes) -> None:
    written = 0
    while written < len(data):
        written += file.write(data[written:])
    os.fsync(file.fileno())
