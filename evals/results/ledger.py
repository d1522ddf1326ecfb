"""An append-only file of JSON lines: what was measured, raw, and nothing that was measured is ever lost.

On the shared folder of a cluster every node writes a file of its own, and a reader merges them: neither appending nor flock can
be relied on between the clients of a network file system, and between the processes of one node both can.
"""

import fcntl
import heapq
import json
import os
import platform
import re
import sys
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Ledger:
    """One JSON object a line. Any number of processes may append to it at once, and die while they do.

    path: the file of the command, as samples.jsonl. writer: the node that appends, to samples.<writer>.jsonl beside it; empty
    where there is only this machine. Whoever reads sees all of them.
    """

    path: Path
    writer: str = ""

    @property
    def own(self) -> Path:
        """The file that this one appends to."""
        return self.path.with_suffix(f".{self.writer}{self.path.suffix}") if self.writer else self.path

    def append(self, *records: Record) -> None:
        """Adds a line each, whole or not at all, and returns when they are on the disk. Raises OSError where it cannot."""
        lines = b"".join(json.dumps(record, allow_nan=False).encode() + b"\n" for record in records)
        self.own.parent.mkdir(parents=True, exist_ok=True)
        # One writer at a time: whoever holds the lock knows where the file ends.
        with self.own.open("a+b", buffering=0) as file:
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
        if not self.own.exists():
            return ""
        with self.own.open("a+b", buffering=0) as file:
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
        return f"the last line of {self.own} was torn, and is set aside in {self.torn}"

    @property
    def torn(self) -> Path:
        """Where torn lines go, as they were found."""
        return self.own.with_suffix(".torn")

    def files(self) -> list[Path]:
        """Those that there are, the command's own first."""
        nodes = sorted(self.path.parent.glob(f"{self.path.stem}.*{self.path.suffix}"))
        return [path for path in (self.path, *nodes) if path.exists()]

    def intact(self) -> list[Record]:
        """The records of `read`; that there are damaged lines is a warning on standard error."""
        records, damaged = self.read()
        if damaged:
            print(f"warning: {self.path} is damaged in line {', '.join(damaged)}, which is left out", file=sys.stderr)
        return records

    def read(self) -> tuple[list[Record], list[str]]:
        """All records, and the numbers of the lines that are none: torn, or not ours. Those stay in their file.

        Records of one file keep their order; those of several are merged by their `time`, as far as the nodes' clocks agree.
        """
        merged, damaged = [], []
        for path in self.files():
            records: list[Record] = []
            for number, line in enumerate(path.read_bytes().splitlines(), start=1):
                record = _parsed(line)
                if record is None:
                    damaged.append(f"{number}" if path == self.path else f"{number} of {path.name}")
                else:
                    records.append(record)
            merged.append(records)
        return list(heapq.merge(*merged, key=lambda record: str(record.get("time", "")))), damaged


def node_name() -> str:
    """This machine's name, as part of a file's."""
    return re.sub(r"[^\w-]+", "-", platform.node()) or "node"


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
