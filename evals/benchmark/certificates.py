"""Memory of certificates: which code was certified, and with which result, across comparisons and commands."""

from pathlib import Path

from evals.measure.clock import now
from evals.results.ledger import Ledger, Record


class Certificates:
    """Results of certificates by key. Finished ones are kept in a ledger; unfinished ones only as long as this object lives.

    A certificate that ran out of time or memory may well be finished another day, so it is not repeated in this command only.
    """

    def __init__(self, path: Path, writer: str = "") -> None:
        """Opens the memory.

        Args:
            path: file of the ledger.
            writer: node that writes to it, as `Ledger` takes it.
        """
        self._ledger = Ledger(path, writer)
        self._unfinished: list[Record] = []

    def failures(self) -> dict[str, str]:
        """By key of each known certificate: what speaks against the code, or an empty string if it is certified."""
        records = [*self._unfinished, *reversed(self._ledger.read()[0])]  # of records with one key, the oldest finished one counts
        return {record["key"]: str(record["failure"]) for record in records if "key" in record}

    def add(self, key: str, attention: str, failure: str, *, finished: bool) -> None:
        """Remembers a certificate.

        Args:
            key: digest of all that the certificate depends on.
            attention: name of the candidate.
            failure: what speaks against it; empty if nothing does.
            finished: whether all checks were made.
        """
        record = {"key": key, "attention": attention, "failure": failure, "time": now()}
        if finished:
            self._ledger.append(record)
        else:
            self._unfinished.append(record)
