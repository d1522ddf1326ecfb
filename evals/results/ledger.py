"""The ledger: an append-only file of JSON lines with all raw measurements, safe against crashes and concurrent writers.

In a folder shared by the nodes of a cluster each node writes a file of its own, and a reader merges them: between the clients of
a network file system neither appending nor flock is reliable. Between the processes of one node both are.
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

from evals.errors import naming

Record = dict[str, Any]


@dataclass(frozen=True)
class Ledger:
    """A file of JSON objects, one a line. Any number of processes may append at once, and may be killed while they do."""

    path: Path
    """The main file, such as samples.jsonl. Readers also read the files of all nodes beside it."""
    writer: str = ""
    """The node that appends, to samples.<writer>.jsonl; empty if there is only this machine, which appends to `path`."""

    @property
    def writer_path(self) -> Path:
        """The file that this writer appends to."""
        return self.path.with_suffix(f".{self.writer}{self.path.suffix}") if self.writer else self.path

    def append(self, *records: Record) -> None:
        """Appends records, all or none, and returns once they are on the disk.

        Raises:
            OSError: if they cannot be written.
        """
        lines = b"".join(json.dumps(record, allow_nan=False).encode() + b"\n" for record in records)
        self.writer_path.parent.mkdir(parents=True, exist_ok=True)
        # One writer at a time, so that the end of the file does not move.
        with naming(self.writer_path), self.writer_path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._repair(file)
            end = file.seek(0, os.SEEK_END)
            try:
                _write(file, lines)
            except OSError:
                file.truncate(end)
                raise

    def repair(self) -> str:
        """Moves a line that a killed process left incomplete to another file.

        Returns:
            A sentence that says so; empty if there was none.
        """
        if not self.writer_path.exists():
            return ""
        with self.writer_path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return self._repair(file)

    def _repair(self, file: FileIO) -> str:
        end = file.seek(0, os.SEEK_END)
        if not end or os.pread(file.fileno(), 1, end - 1) == b"\n":
            return ""
        content = os.pread(file.fileno(), end, 0)
        start = content.rfind(b"\n") + 1
        if _parsed(content[start:]) is not None:  # complete but for the newline
            _write(file, b"\n")
            return ""
        with self.torn.open("ab", buffering=0) as aside:
            _write(aside, content[start:] + b"\n")
        file.truncate(start)
        return f"the last line of {self.writer_path} was torn, and is set aside in {self.torn}"

    @property
    def torn(self) -> Path:
        """The file that incomplete lines are moved to."""
        return self.writer_path.with_suffix(".torn")

    def files(self) -> list[Path]:
        """The files that exist, the main one first."""
        nodes = sorted(self.path.parent.glob(f"{self.path.stem}.*{self.path.suffix}"))
        return [path for path in (self.path, *nodes) if path.exists()]

    def intact(self) -> list[Record]:
        """The records of `read`; prints a warning on standard error if lines are damaged."""
        records, damaged = self.read()
        if damaged:
            print(f"warning: {self.path} is damaged in line {', '.join(damaged)}, which is left out", file=sys.stderr)
        return records

    def read(self) -> tuple[list[Record], list[str]]:
        """Reads all records, and the numbers of damaged lines, which stay in their file.

        Records of one file keep their order. Those of several files are merged by their `time`, which is as exact as the nodes'
        clocks agree.
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
    """The name of this machine in a form that file names allow."""
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
