"""`Job`, the base class of all work on one comparison: timing, the context search and training. Its records go to a ledger."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, ClassVar

import torch

from evals.benchmark import code_hash
from evals.benchmark.certificates import Certificates
from evals.benchmark.preflight import Preflight
from evals.config import Comparison
from evals.errors import UsageError
from evals.measure import machine
from evals.measure.clock import now
from evals.measure.limits import memory_limit_bytes
from evals.measure.memory import available_bytes
from evals.results.ids import digest
from evals.results.ledger import Ledger, Record
from evals.results.machines import MACHINE
from evals.results.schema import column_of

ProgressCallback = Callable[[str, float], None]
"""Called with a description of the next step and the finished share of the job, from 0 to 1."""


class Job(ABC):
    """Work on one comparison. What the ledger already holds of it is not done again, so a killed job resumes.

    Subclasses set `id` in their constructor.
    """

    kind: ClassVar[str]  # kind of the record that describes the job; also the field under which all its records carry its id
    id: str  # digest of all facts that the job's records depend on
    settings: dict[str, Any]  # columns of the job's table: the comparison's settings, the processor and the version of torch

    def __init__(self, comparison: Comparison, ledger: Ledger, certificates: Certificates) -> None:
        """Prepares the work on a comparison; starts nothing.

        Raises:
            UsageError: if the ledger belongs to a sweep of another kind, or over another setting.
        """
        check_axis(comparison, ledger)
        self.comparison = comparison
        self.ledger = ledger
        self.machine = {"processor": machine.processor_name(comparison.device.kind), "torch": torch.__version__}
        self.settings = {**comparison.settings, **self.machine}
        with torch.device("meta"):
            self.code = {one.name: code_hash.attention_digest(one.build(comparison.model)) for one in comparison.candidates}
        gib = comparison.sampling.memory_limit_gib
        self.memory_limit_bytes = int(0.8 * available_bytes() if gib is None else gib * 2**30)
        self.preflight = Preflight(comparison, self.code, certificates, self.memory_limit_bytes)

    @abstractmethod
    def run(self, report: ProgressCallback) -> Iterator[Record]:
        """Does the remaining work; yields each record once it is in the ledger. Must run in the main thread."""

    @abstractmethod
    def remaining(self) -> tuple[int, float | None]:
        """Number of units (rounds, probes or training runs) done, and estimated seconds left; None if unknown."""

    @abstractmethod
    def is_complete(self) -> bool:
        """Whether the ledger holds everything that `run` would add."""

    def description(self) -> Record:
        """Record of the candidates, the settings and the machine."""
        comparison = self.comparison
        return self.record(
            self.kind,
            sweep=comparison.sweep,
            swept=comparison.swept,
            varied=list(comparison.option),
            settings=self.settings,
            candidates={candidate.name: candidate.node for candidate in comparison.candidates},
            provenance=machine.provenance(comparison.device.kind),
        )

    def record(self, kind: str, **values: Any) -> Record:
        """A record of this job, with the job's id and the time."""
        return {"kind": kind, self.kind: self.id, **values, "time": now()}

    def measurement_digest(self, *modules: str) -> str:
        """Digest of all that decides a measurement: the comparison, the attentions' code, these harness modules, the machine."""
        comparison, sampling = self.comparison, self.comparison.sampling
        return digest(
            {
                "settings": comparison.settings,
                "workload": comparison.workload,
                "candidates": [asdict(candidate) for candidate in comparison.candidates],
                "relative_to": comparison.relative_to,
                "code": self.code,
                "harness": code_hash.modules_digest(*modules),
                "limits": [
                    sampling.timeout_s,
                    sampling.memory_limit_gib,
                    sampling.time_slice_s,
                    sampling.seed,
                    memory_limit_bytes(),
                ],
                "machine": self.machine,
            }
        )

    def append(self, record: Record) -> Record:
        """Appends a record to the ledger and returns it."""
        self.ledger.append(record)
        return record

    def records(self, kind: str) -> list[Record]:
        """Records of one kind that the ledger holds of this job, oldest first."""
        return [one for one in self.ledger.read()[0] if (one.get("kind"), one.get(self.kind)) == (kind, self.id)]


def check_axis(comparison: Comparison, ledger: Ledger) -> None:
    """Checks that a ledger's table is of one kind, and has a single x axis, once the comparison is added.

    Raises:
        UsageError: if the ledger holds work of another kind (timing, training, search), sweeps another setting, or was merged.
    """
    labels = {"comparison": "timing", "study": "training", "search": "search for the longest context"}
    kind = "study" if comparison.task is not None else "search" if comparison.search is not None else "comparison"
    for record in ledger.read()[0]:
        if record.get("kind") not in labels:
            continue
        if record["kind"] != kind:
            raise UsageError(f"{ledger.path.parent} holds no {labels[kind]}: give this a folder of its own, as in sweep_name=mine")
        if MACHINE in record["settings"]:
            raise UsageError(f"{ledger.path.parent} holds merged results: give this a folder of its own, as in sweep_name=mine")
        column = column_of(comparison.swept or "", comparison.option)
        if record["swept"] != comparison.swept or column_of(record["swept"] or "", record["settings"]) != column:
            raise UsageError(
                f"{ledger.path.parent} holds a sweep over {record['swept'] or 'nothing'}, and this is one over "
                f"{comparison.swept or 'nothing'}: give it a folder of its own, as in sweep_name=mine"
            )
