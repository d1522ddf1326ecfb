"""The identity of a machine: its name, and how the records of a ledger are told apart by it.

Two machines are alike if their processors have the same model and number of cores: the column `processor`. They are the same if
they have the same name as well, which is the processor and the host.
"""

import re
from collections.abc import Iterable, Iterator

from evals.results.ids import digest
from evals.results.ledger import Record

MACHINE = "machine"
"""The setting and the column that hold the name of a machine in merged results."""

JOBS = ("comparison", "search")
"""The kinds of jobs that a machine decides: their results are kept apart. Training gives the same anywhere."""

BUILD = ("memory_bytes", "physical_cores", "cpu_capability")
"""Facts of the provenance that do not change while a machine stays the same."""

FILLERS = re.compile(r"\((r|tm)\)|\b(cpu|processor)\b|@ *[\d.]+ *ghz")


def machine_name(processor: str, host: str | None) -> str:
    """Makes the name of a machine, fit for a folder: 'Intel(R) Xeon(R) Processor (2 cores)' on vm is intel-xeon-2-cores-vm."""
    text = " ".join([FILLERS.sub(" ", processor.lower()), (host or "").lower()])
    return re.sub(r"[^a-z0-9.]+", "-", text).strip("-.") or "machine"


def machine_of(description: Record) -> str:
    """The name of the machine in the description of a job."""
    settings = description["settings"]
    known = settings.get(MACHINE)
    return str(known) if known else machine_name(str(settings.get("processor")), description.get("provenance", {}).get("host"))


def is_told_apart(records: Iterable[Record]) -> bool:
    """Whether the jobs of a ledger carry the names of their machines."""
    return all(MACHINE in record["settings"] for record in records if record.get("kind") in JOBS)


def told_apart(records: Iterable[Record], name: str | None = None) -> Iterator[Record]:
    """Yields the records of a ledger with the name of the machine among the settings of each job, and with an id for each machine.

    Two machines that are alike give a comparison the same id, and one that was continued on another machine has one id too.

    Args:
        records: in the order of the ledger.
        name: of the machine that all of them are from; None: as `machine_name` says.
    """
    machines: dict[str, str] = {}  # of each job, where it is worked on at the moment
    processors: dict[str, str] = {}
    for record in records:
        kind = next((kind for kind in JOBS if kind in record), None)
        described = record.get("described", record)
        if kind is None or MACHINE in described.get("settings", {}):
            yield record
            continue
        key = record[kind]
        if "settings" in described:
            machines[key] = name or machine_of(described)
            processors[key] = described["settings"].get("processor")
            described = described | {kind: digest([key, machines[key]])}
            described["settings"] = described["settings"] | {MACHINE: machines[key]}
            yield described if record.get("kind") == kind else record | {kind: described[kind], "described": described}
        elif record["kind"] == "restart":  # from here on it is the comparison of another machine
            machines[key] = name or machine_name(str(processors.get(key)), record["host"])
        elif key in machines:
            yield record | {kind: digest([key, machines[key]])}
        else:  # already told apart
            yield record


def doubtful_names(records: Iterable[Record]) -> list[str]:
    """A sentence for each name under which machines of different build measured, as hosts of a cloud may share a name."""
    builds: dict[str, dict[str, set[object]]] = {}
    for record in records:
        if record.get("kind") in JOBS and MACHINE in record["settings"]:
            known = builds.setdefault(record["settings"][MACHINE], {name: set() for name in BUILD})
            for name in BUILD:
                known[name] |= {record.get("provenance", {}).get(name)} - {None}
    return [
        f"{machine} has different {name} in different records, and may be two machines: --machine DIR=NAME tells them apart"
        for machine, known in builds.items()
        for name, values in known.items()
        if len(values) > 1
    ]
