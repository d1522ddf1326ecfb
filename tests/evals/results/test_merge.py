"""Merging of made-up ledgers: three machines, copies that went on apart, and measurements that contradict each other."""

import json
import random
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from evals.cli.outputs import build_tables
from evals.merge import main
from evals.results.frames import read_table
from evals.results.ledger import Ledger, Record
from evals.results.machines import doubtful_names, machine_name, told_apart
from evals.results.merge import Merged, Source, content, merge
from evals.results.schema import write_table
from tests.evals.results.test_latency_table import PEAKS
from tests.evals.results.test_latency_table import sweep as records_of_a_sweep

Lengths = Sequence[int]
START = datetime(2026, 1, 1, tzinfo=UTC)


def measured(
    host: str = "a",
    processor: str = "Slow 3000 (2 cores)",
    *,
    speed: float = 1.0,
    day: int = 0,
    rounds: int = 2,
    lengths: Lengths = (128,),
) -> list[Record]:
    """The ledger of a machine: `twice` is twice as fast as `standard` on each. `speed` is that of the machine and its roofline."""
    seconds = {n: {"standard": 1e-4 * n / speed, "twice": 0.5e-4 * n / speed} for n in lengths}
    records = records_of_a_sweep(seconds, rounds=rounds, flops=10**6)
    records.insert(0, {"kind": "command", "command": "python -m evals.run sweep=seq_len"})
    peaks = {**PEAKS, "flops_per_s": PEAKS["flops_per_s"] * speed, "thread_flops_per_s": PEAKS["thread_flops_per_s"] * speed}  # type: ignore[operator]
    for number, record in enumerate(records):
        record["time"] = (START + timedelta(days=day, seconds=number)).isoformat(timespec="milliseconds")
        if record["kind"] == "comparison":
            record |= {"peaks": peaks, "varied": ["seq_len"], "provenance": {"host": host, "commit": "c" * 40}}
            record["settings"] = {**record["settings"], "processor": processor}
        if record["kind"] == "latency":  # no two machines have the very same seconds
            factor = 1 + 1e-6 * (day + ord(host[-1]))
            record["time_slices"] = [[factor * seconds for seconds in part] for part in record["time_slices"]]
    return records


def folder(path: Path, records: Sequence[Record]) -> Path:
    Ledger(path / "samples.jsonl").append(*records)
    for kind, table in build_tables(records).items():
        write_table(table, path, kind)
    return path


def source(name: str, records: Sequence[Record]) -> Source:
    return Source(Path(name), list(told_apart(records)))


def again(merged: Merged, name: str = "merged") -> Source:
    return Source(Path(name), list(told_apart(merged.records)), merged.superseded)


def facts(merged: Merged) -> tuple[list[str], list[str]]:
    return ([json.dumps(one, sort_keys=True) for one in merged.records], [content(one) for one in merged.superseded])


# --- three machines -------------------------------------------------------------------------------

BOTH = (128, 512)
ALIKE = [
    measured("a", lengths=BOTH),
    measured("b", day=1, lengths=BOTH),
    measured("c", "Fast 9000 (64 cores)", speed=2, day=2, lengths=BOTH),
]
NAMES = ["fast-9000-64-cores-c", "slow-3000-2-cores-a", "slow-3000-2-cores-b"]


def test_three_machines_stay_apart_and_nothing_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [folder(tmp_path / name, records) for name, records in zip("abc", ALIKE, strict=True)]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    to = tmp_path / "to"
    assert main([*map(str, folders), "--to", str(to)]) == 0
    out = capsys.readouterr().out
    assert "conflict" not in out
    assert "12 rows of " + ", ".join(NAMES) in " ".join(out.split())
    assert {path: path.read_bytes() for path in before} == before
    assert not (to / "superseded.jsonl").exists()
    table = read_table(to)
    assert sorted(table["machine"].unique()) == NAMES
    assert not table.duplicated(["machine", "attention", "seq_len"]).any()
    for one, name in zip(folders, (NAMES[1], NAMES[2], NAMES[0]), strict=True):
        own, alone = table[table["machine"] == name].reset_index(drop=True), read_table(one)
        speed, roofline = ("latency_s", "speedup", "speedup_low", "speedup_high"), ("roofline_s", "roofline_fraction")
        for column in (*speed, *roofline, "rounds", "noise_floor"):
            assert own[column].tolist() == alone[column].tolist(), column
    # The machine that is twice as fast has half the time and half the least time: the same fraction of its roofline.
    fast, slow = (table[table["machine"] == name].set_index(["attention", "seq_len"]) for name in NAMES[:2])
    assert (fast["latency_s"] / slow["latency_s"]).tolist() == pytest.approx([0.5] * 4, rel=1e-3)
    assert (fast["roofline_fraction"] / slow["roofline_fraction"]).tolist() == pytest.approx([1.0] * 4, rel=1e-3)
    everything = [content(record) for records in ALIKE for record in told_apart(records)]
    assert sorted(map(content, Ledger(to / "samples.jsonl").read()[0])) == sorted(set(everything))

    again = {path: path.read_bytes() for path in to.iterdir()}
    assert main([*map(str, reversed(folders)), "--to", str(to)]) == 0  # into the same folder, which gives the same
    assert {path: path.read_bytes() for path in to.iterdir()} == again
    assert main([*map(str, folders[1:]), "--to", str(tmp_path / "two")]) == 0
    assert main([str(folders[0]), "--to", str(tmp_path / "two")]) == 0  # one after another
    assert (tmp_path / "two" / "samples.jsonl").read_bytes() == again[to / "samples.jsonl"]


def test_names_of_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert machine_name("Intel(R) Xeon(R) Processor (2 cores)", "vm") == "intel-xeon-2-cores-vm"
    assert machine_name("Intel(R) Core(TM) i7-8700 CPU @ 3.20GHz (12 cores)", "Box.lan") == "intel-core-i7-8700-12-cores-box.lan"
    assert machine_name("NVIDIA H200", None) == "nvidia-h200"
    a, b = (str(folder(tmp_path / name, measured(name, lengths=[n]))) for name, n in (("a", 128), ("b", 256)))
    assert main([a, b, "--to", str(tmp_path / "to"), "--machine", "cluster", "--machine", f"{b}=node_2"]) == 0
    assert set(read_table(tmp_path / "to")["machine"]) == {"cluster", "node_2"}
    assert main([a, b, "--to", str(tmp_path / "one"), "--machine", "cluster"]) == 0  # nodes that are one machine by the user's word
    table = read_table(tmp_path / "one").drop_duplicates(["machine", "seq_len"])
    assert (table["machine"].tolist(), table["seq_len"].tolist()) == (["cluster"] * 2, [128, 256])


def test_two_machines_behind_one_name_are_doubted() -> None:
    one, two = measured(), measured(day=1)
    for records, memory in ((one, 2**34), (two, 2**35)):
        records[1]["provenance"]["memory_bytes"] = memory
    (doubt,) = doubtful_names(merge([source("x", one), source("y", two)]).records)
    assert doubt.startswith(f"{NAMES[1]} has different memory_bytes in different records, and may be two machines")
    assert doubtful_names(merge([source("x", one), source("x", one)]).records) == []


def test_a_comparison_that_went_on_elsewhere_is_one_of_each_machine() -> None:
    first, second = measured("a"), measured("b", day=1)
    moved = [*first, {"kind": "restart", "comparison": "comparison 128", "host": "b", "time": second[0]["time"]}, *second[1:]]
    table = build_tables(merge([source("one", moved)]).records)["latency"]
    assert table.groupby("machine")["rounds"].unique().map(list).to_dict() == {NAMES[1]: [2], NAMES[2]: [2]}


def test_the_nodes_of_a_cluster_wrote_a_ledger_each(tmp_path: Path) -> None:
    one, two = measured("a"), measured("b", day=1)
    Ledger(tmp_path / "samples.jsonl", "a").append(*one)
    Ledger(tmp_path / "samples.jsonl", "b").append(*two)
    records = Ledger(tmp_path / "samples.jsonl").read()[0]
    assert facts(merge([source("cluster", records)])) == facts(merge([source("a", one), source("b", two)]))


# --- properties -----------------------------------------------------------------------------------


def scrambled(generator: random.Random) -> list[list[Record]]:
    """Ledgers of machines, parts of them, copies that were continued, and copies in which other things happened."""
    ledgers = [measured(generator.choice("ab"), day=day, rounds=generator.randint(1, 3)) for day in range(2)]
    ledgers += [[*ledgers[0], *measured(ledgers[0][1]["provenance"]["host"], day=5, rounds=1)]]
    for record in generator.sample(ledgers[1], 2):
        if "outcome" in record:
            record |= {"outcome": "oom", "detail": "killed"}
    copies = [json.loads(json.dumps(record)) for record in ledgers[1]]
    ledgers.append([one for one in copies if generator.random() < 0.7 or one["kind"] == "comparison"])
    for record in generator.sample(ledgers[-1], 2):
        if record["kind"] == "preflight":
            record |= {"peak_bytes": 12900, "time": "2027"}
    return ledgers


@pytest.mark.parametrize("seed", range(25))
def test_merging_is_commutative_idempotent_and_keeps_everything(seed: int) -> None:
    generator = random.Random(seed)
    sources = [source(str(number), records) for number, records in enumerate(scrambled(generator))]
    merged = merge(sources)
    assert facts(merge(generator.sample(sources, len(sources)))) == facts(merged)
    assert facts(merge([again(merged)])) == facts(merged)
    assert facts(merge([again(merged), *generator.sample(sources, 2)])) == facts(merged)
    assert facts(merge([again(merge(sources[:2]), "some"), *sources[2:]]))[0] != []
    kept = sorted([*map(content, merged.records), *map(content, merged.superseded)])
    assert kept == sorted({content(record) for one in sources for record in one.records})
    for comparison in {record["comparison"] for record in merged.records if "comparison" in record}:
        timed = [one for one in merged.records if one.get("comparison") == comparison and one["kind"] == "latency"]
        rounds = sorted({one["round"] for one in timed})
        assert rounds == list(range(len(rounds)))


# --- the same cell twice ----------------------------------------------------------------------------


def test_rounds_of_one_machine_are_pooled_and_paired_as_they_were() -> None:
    first, second = measured(), measured(day=1)
    table = build_tables(merge([source("x", first), source("y", second)]).records)["latency"]
    assert table["rounds"].tolist() == [4, 4]
    # The drift of a round, of up to a factor of two, cancels only between processes of that round.
    assert table["speedup"].tolist() == pytest.approx([1, 2], rel=0.02)


def changed(records: Sequence[Record], kind: str, **fields: Any) -> list[Record]:
    """The records with other fields in the first of a kind, which is about `twice`."""
    copies = [json.loads(json.dumps(record)) for record in records]
    one = next(record for record in copies if record["kind"] == kind and record.get("attention", "twice") == "twice")
    one |= {"time": "2026-01-09", **fields}
    return copies


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("preflight", {"peak_bytes": 12900}, "with different peak_bytes; peak_bytes 12900 of y counts"),
        (
            "preflight",
            {"outcome": "unsupported", "detail": "no"},
            "with different detail, outcome; outcome unsupported of y counts",
        ),
        ("latency", {"outcome": "oom", "detail": "killed"}, "with different outcomes; oom of y counts"),
    ],
)
def test_what_contradicts_is_named_and_the_newest_or_the_preferred_counts(kind: str, fields: dict[str, Any], words: str) -> None:
    old = measured()
    sources = [source("x", old), source("y", changed(old, kind, **fields))]
    newest, preferred = merge(sources), merge(sources, Path("x"))
    assert newest.conflicts == [f"twice seq_len=128 on {NAMES[1]} was measured twice, in x and y, {words}"]
    rows = [build_tables(one.records)["latency"].set_index("attention").loc["twice"] for one in (newest, preferred)]
    name, value = next(iter(fields.items()))
    assert rows[0][name] == value
    assert rows[1][name] == {"peak_bytes": 12800, "outcome": "ok"}[name]
    assert "of x counts" in preferred.conflicts[0]
    assert facts(merge([again(preferred), *sources], Path("x"))) == facts(preferred)
    assert facts(merge([again(newest), *sources], Path("x"))) == facts(preferred)  # a change of mind


def test_other_code_is_named_and_the_preferred_counts() -> None:
    old, new = measured(), measured(day=1, speed=3)
    for record in new:
        if "comparison" in record:
            record["comparison"] = "of the new code"
    sources = [source("old", old), source("new", new)]
    for preferred, factor in ((None, 3), (Path("new"), 3), (Path("old"), 1)):
        merged = merge(sources, preferred)
        words = "was measured twice, in new and old, with other code or sampling; that of"
        assert merged.conflicts == [f"standard, twice seq_len=128 on {NAMES[1]} {words} {preferred or 'new'} counts"]
        rows = build_tables(merged.records)["latency"]
        assert rows["latency_s"].tolist() == pytest.approx([0.0128 / factor, 0.0064 / factor], rel=0.5)
        assert facts(merge([again(merged)])) == facts(merged)


# --- what cannot be merged --------------------------------------------------------------------------


def test_what_cannot_be_merged_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = folder(tmp_path / "a", measured())
    other = [record | ({"swept": "shape.batch_size"} if "swept" in record else {}) for record in measured("b")]
    b = folder(tmp_path / "b", other)
    old = shutil.copytree(a, tmp_path / "old")
    (old / "results.csv").write_text((old / "results.csv").read_text().replace(",4\n", ",3\n"))
    bare = shutil.copytree(a, tmp_path / "bare")
    (bare / "samples.jsonl").unlink()
    merged = tmp_path / "merged"
    assert main([str(a), "--to", str(merged)]) == 0
    capsys.readouterr()
    recall = Path("results/paper/recall")
    cases: list[tuple[list[object], str]] = [
        ([a, b, "--to", tmp_path / "new"], f"{a} sweeps shape.seq_len and {b} shape.batch_size: one table holds one sweep"),
        ([a, recall, "--to", tmp_path / "new"], f"{a} holds timings and {recall} training runs: one table cannot hold both"),
        ([a, "results/paper/distillation", "--to", tmp_path / "new"], "holds conversions of pretrained models, which evals.merge"),
        ([a, old, "--to", tmp_path / "new"], f"{old / 'results.csv'} was written under version 3 of latency.schema.json"),
        ([a, bare, "--to", tmp_path / "new"], f"{bare} holds no samples.jsonl with a record"),
        ([a, "--to", a], f"{a} is no merged folder, and evals.run could not go on in it"),
        ([a, "--to", tmp_path / "new", "--prefer", b], f"--prefer must be one of {a}, got {b}"),
        ([merged, "--to", tmp_path / "new", "--machine", "x"], f"{merged} is merged and names its machines already"),
        ([a, "--to", tmp_path / "new", "--machine", "x y"], "--machine must be NAME, of letters, digits and ._-"),
    ]
    for arguments, words in cases:
        assert main(list(map(str, arguments))) == 2, words
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()
