"""The ledger loses no measurement, whatever happens to the process, the disk or the file."""

import json
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest

from evals.errors import describe_os_error
from evals.results.ledger import Ledger

RECORDS = [{"kind": "latency", "round": 0, "samples_s": [0.1, 0.25]}, {"kind": "memory", "peak_bytes": 3}, {"words": "µ ± \n"}]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "sweep" / "samples.jsonl")


def test_records_are_read_in_the_order_of_appending(ledger: Ledger) -> None:
    assert ledger.read() == ([], [])
    for record in RECORDS:
        ledger.append(record)
    assert ledger.read() == (RECORDS, [])
    assert len(ledger.path.read_bytes().splitlines()) == len(RECORDS)


@pytest.mark.parametrize("cut", range(1, len(json.dumps(RECORDS[0]))))
def test_an_incomplete_last_line_is_reported_and_loses_nothing_else(ledger: Ledger, cut: int) -> None:
    ledger.append(RECORDS[1])
    with ledger.path.open("a") as file:
        file.write(json.dumps(RECORDS[0])[:cut])
    assert ledger.read() == ([RECORDS[1]], ["2"])
    ledger.append(RECORDS[2])
    assert ledger.read() == ([RECORDS[1], RECORDS[2]], [])
    assert ledger.torn.read_text() == json.dumps(RECORDS[0])[:cut] + "\n"
    assert ledger.repair() == ""


def test_repair_moves_an_incomplete_line_and_reports_it_once(ledger: Ledger) -> None:
    assert ledger.repair() == ""
    ledger.append(RECORDS[1])
    with ledger.path.open("a") as file:
        file.write('{"kind": "lat')
    assert ledger.repair() == f"the last line of {ledger.path} was torn, and is set aside in {ledger.torn}"
    assert ledger.repair() == ""
    assert ledger.read() == ([RECORDS[1]], [])


def test_several_records_are_written_at_once(ledger: Ledger) -> None:
    ledger.append(*RECORDS)
    assert ledger.read() == (RECORDS, [])


def test_a_whole_last_line_without_its_newline_still_counts(ledger: Ledger) -> None:
    ledger.append(RECORDS[1])
    ledger.path.write_bytes(ledger.path.read_bytes().rstrip(b"\n"))
    ledger.append(RECORDS[2])
    assert ledger.read() == ([RECORDS[1], RECORDS[2]], [])


@pytest.mark.parametrize("garbage", [b"\x00\xff\xfe", b"[1, 2]", b"nonsense", b"3", b"{'a': 1}", b""])
def test_damaged_lines_are_reported(ledger: Ledger, garbage: bytes) -> None:
    ledger.append(RECORDS[0])
    with ledger.path.open("ab") as file:
        file.write(garbage + b"\n")
    ledger.append(RECORDS[1])
    assert ledger.read() == ([RECORDS[0], RECORDS[1]], ["2"])


def test_a_record_that_is_not_json_leaves_the_file_unchanged(ledger: Ledger) -> None:
    ledger.append(RECORDS[0])
    with pytest.raises(ValueError, match="Out of range float"):
        ledger.append({"latency_s": float("nan")})
    assert ledger.read() == ([RECORDS[0]], [])


def append_many(path: Path, writer: int) -> None:
    for number in range(50):
        Ledger(path).append({"writer": writer, "number": number, "padding": "x" * 1000 * (number % 10)})


def test_writers_at_the_same_time_lose_and_mix_nothing(ledger: Ledger) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=append_many, args=(ledger.path, writer)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    records, damaged = ledger.read()
    assert damaged == []
    for writer in range(4):
        assert [record["number"] for record in records if record["writer"] == writer] == list(range(50))


def test_a_full_disk_leaves_whole_lines_only(ledger: Ledger) -> None:
    """A file size limit stands in for the disk: the kernel writes what fits, then refuses."""
    ledger.append(RECORDS[0])
    size = ledger.path.stat().st_size
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(27)) as raised:
            ledger.append({"samples_s": [0.5] * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert describe_os_error(raised.value) == f"{ledger.path} cannot be used: {os.strerror(27)}"
    assert ledger.path.stat().st_size == size
    ledger.append(RECORDS[1])
    assert ledger.read() == ([RECORDS[0], RECORDS[1]], [])


# --- several nodes ------------------------------------------------------------------------------


def test_nodes_write_files_of_their_own_and_readers_merge_them_by_time(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    records = [{"number": number, "time": f"2026-01-01T00:00:{number:02}"} for number in range(6)]
    for number, record in enumerate(records):
        Ledger(path, ("", "node-a", "node-b")[number % 3]).append(record)
    assert Ledger(path).read() == (records, [])
    assert sorted(found.name for found in tmp_path.iterdir()) == ["samples.jsonl", "samples.node-a.jsonl", "samples.node-b.jsonl"]


def test_records_of_one_file_keep_their_order_whatever_the_clock(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    Ledger(path, "late").append({"number": 0, "time": "9"}, {"number": 1, "time": "1"})
    Ledger(path, "early").append({"number": 2, "time": "5"})
    numbers = [record["number"] for record in Ledger(path).read()[0]]
    assert sorted(numbers) == [0, 1, 2]
    assert numbers.index(0) < numbers.index(1)


def test_an_incomplete_line_of_a_node_is_repaired_by_that_node_alone(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    node = Ledger(path, "node-a")
    node.append(RECORDS[0])
    with node.writer_path.open("a") as file:
        file.write('{"to')
    assert Ledger(path).read() == ([RECORDS[0]], ["2 of samples.node-a.jsonl"])
    Ledger(path, "node-b").append(RECORDS[1])
    assert node.repair()
    records, damaged = Ledger(path).read()
    assert (len(records), damaged) == (2, [])
    assert (tmp_path / "samples.node-a.torn").read_text() == '{"to\n'
