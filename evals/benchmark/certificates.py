"""Memory of certificates: which code was certified, and with which result, across comparisons and commands."""

from pathlib import Path

from evals.measure.clock import now
from evals.results.ledger import Ledger, Record


class Certificates:
    """Results of certificates by key: finished ones in a ledger, unfinished ones only for the lifetime of this object.

    A certificate that ran out of time or memory may finish another day, so only the same command does not repeat it.
    """

    def __init__(self, path: Path, writer: str = "") -> None:
        self._ledger = Ledger(path, writer)
        self._unfinished: list[Record] = []

    def failures(self) -> dict[str, str]:
        """The failure of each known certificate, by its key; empty if the code is certified."""
        records = [*self._unfinished, *reversed(self._ledger.read()[0])]  # of records with one key, the oldest finished one counts
        return {record["key"]: str(record["failure"]) for record in records if "key" in record}

    def is_unfinished(self, key: str) -> bool:
        """Whether a certificate ran out of time or memory, or crashed, in this command."""
        return any(record["key"] == key for record in self._unfinished)

    def add(self, key: str, attention: str, failure: str, *, finished: bool) -> None:
        """Remembers a certificate. failure: the failed check and its finding, or empty. finished: whether all checks ran."""
        record = {"key": key, "attention": attention, "failure": failure, "time": now()}
        if finished:
            self._ledger.append(record)
        else:
            self._unfinished.append(record)
