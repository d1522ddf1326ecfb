"""TODO: what lives here."""

import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from torch.utils.benchmark import Timer
from tqdm import tqdm

from evals.benchmark.engine import Engine
from evals.benchmark.rounds import within_budget
from evals.benchmark.workloads import prepare
from evals.cli.jobs import read_job
from evals.config import Candidate, Comparison
from evals.errors import UsageError
from evals.isolation.worker import run_isolated
from evals.measure.clock import Stopwatch, make_clock, settle_allocator
from evals.paths import CONF, ROOT
from evals.results import latency_table, schema
from evals.results.ledger import Ledger

NAMES = ("standard", "bsbr", "linear", "sliding_window", "sparse", "hopfield", "delta_net", "gau")


# --- of things that are equal, none is faster -----------------------------------------------------


def aa(numbers: range, *options: str) -> bool:
    """Of comparisons of an attention with itself, 92.5 % hold 1 and at most 2 % are called faster or slower."""
    held = wrong = 0
    for number in tqdm(numbers, desc="aa", disable=None):
        chance = random.Random(number)
        row = against_itself(chance.choice(NAMES), chance.choice([64, 200, 512, 1000, 2048]), number, *options, slower=1.0)
        held += row["speedup_low"] <= 1 <= row["speedup_high"]
        wrong += row["verdict"] in ("faster", "slower")
        tqdm.write(f"aa {number}: {told(row)}")
    count = len(numbers)
    print(f"aa: {held} of {count} intervals hold 1 (at least {0.925 * count:.0f})")
    print(f"aa: {wrong} of {count} are called faster or slower (at most {0.02 * count:.0f})")
    return held >= 0.925 * count and wrong <= 0.02 * count


def slowdown(numbers: range, *options: str, factor: float = 1.05) -> bool:
    """Of comparisons with an attention that takes 5 % longer, 9 of 10 call it slower."""
    found = 0
    for number in tqdm(numbers, desc="slowdown", disable=None):
        chance = random.Random(number)
        row = against_itself(chance.choice(NAMES), chance.choice([512, 1000, 2048]), number, *options, slower=factor)
        found += row["verdict"] == "slower"
        tqdm.write(f"slowdown {number}: {told(row)}")
    count = len(numbers)
    print(f"slowdown: {found} of {count} that take {factor:.0%} of the time are called slower (at least {0.9 * count:.0f})")
    return found >= 0.9 * count


def against_itself(name: str, seq_len: int, seed: int, *options: str, slower: float) -> dict[str, Any]:
    """The row of an attention that runs against itself, which takes `slower` times as long."""
    node = f"{{_target_: evals.benchmark.slowed.slowed, _recursive_: false, factor: {slower}, of: ${{attention.{name}}}}}"
    place = (f"shape.seq_len={seq_len}", f"sampling.seed={seed}", f"relative_to={name}")
    comparison = composed(f"attention=[{name}]", f"+attention.again={node}", *place, *options)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "samples.jsonl")
        for _ in Engine(comparison, ledger, CERTIFICATES).run(lambda _words, _part: None):
            pass
        rows = latency_table.build(ledger.read()[0])
    row = {str(column): value for column, value in rows[rows["attention"] == "again"].iloc[0].items()}
    if row["outcome"] != "ok":
        raise UsageError(f"{name} against itself ended as {row['outcome']}: {row['detail']}")
    return row


def told(row: dict[str, Any]) -> str:
    interval = f"{row['speedup']:.3f} ({row['speedup_low']:.3f} to {row['speedup_high']:.3f})"
    return f"{row['relative_to']} at {row['seq_len']}, {row['rounds']} rounds: {interval}, {row['verdict']}"


CERTIFICATES = Ledger(Path(tempfile.gettempdir()) / "bsbr-validate" / "certificates.jsonl")


# --- the clock ------------------------------------------------------------------------------------


def clock_agrees(*options: str) -> bool:
    """Latencies agree within 3 % with torch.utils.benchmark on five shapes."""
    agree = True
    for name, seq_len in (("standard", 512), ("bsbr", 1000), ("linear", 2048), ("delta_net", 300), ("gau", 4096)):
        comparison = composed(f"attention=[{name}]", f"shape.seq_len={seq_len}", *options)
        result = run_isolated(both_clocks, comparison, comparison.candidates[0], timeout_s=120.0)
        if result.outcome != "ok":
            raise UsageError(f"{name} ended as {result.outcome}: {result.detail}")
        seconds, ratio = result.value
        agree &= abs(math.log(ratio)) < 0.03
        print(f"clock: {name} at {seq_len}: {seconds * 1e3:.3f} ms by torch.utils.benchmark, ours over that {ratio:.4f}")
    return agree


def both_clocks(comparison: Comparison, candidate: Candidate) -> tuple[float, float]:
    """Median seconds of a call by torch's clock, and our seconds over its: the two take turns."""
    settle_allocator()
    call = prepare(comparison, candidate).call
    ours = make_clock(call, comparison.device.kind, comparison.device.mode)
    ours.first_call()
    timer = Timer("call()", globals={"call": call}, num_threads=comparison.device.threads)
    pairs = []
    for _ in within_budget(400, 12.0, Stopwatch()):
        mine = statistics.median(ours.time_slice(0.01).samples_s)
        # A median of calls, as ours is; each of them costs two more that warm up.
        theirs = statistics.median(timer.timeit(1).median for _ in range(max(1, round(0.003 / mine))))
        pairs.append((mine, theirs))
    # What slowed the machine for longer than a turn slowed both.
    ratio = statistics.median(a / b for a, b in pairs)
    return statistics.median(b for _, b in pairs), ratio


# --- nothing is lost ------------------------------------------------------------------------------

SWEEP = (
    *("sweep=seq_len", "attention=[standard,linear,sliding_window]", "shape.seq_len=64,100,130,200,256,300,400,512,600,700"),
    *("model.hidden_dim=32", "model.num_heads=2", "device.threads=1"),
    *("sampling.min_rounds=20", "sampling.max_rounds=20", "sampling.time_slices=2"),
)


def kills(count: int) -> bool:
    """After `count` times kill -9 and a restart, every line that was ever in the ledger is there, once, and the table is whole."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "results" / "seq_len" / "samples.jsonl")
        command = [sys.executable, "-m", "evals.run", *SWEEP, f"results_dir={folder}/results", f"plots_dir={folder}/plots"]
        chance, kept = random.Random(0), b""
        killed = finished = 0
        while killed < count:
            before = _size(ledger.path)
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                # A few while it begins; most of them after it has come to measure something, however slow the machine is.
                while chance.random() > 0.003 and process.poll() is None and _size(ledger.path) == before:
                    time.sleep(0.1)
                process.wait(chance.uniform(0, 4))
                ledger.path.unlink()  # it was through: from the beginning, then
                kept, finished = b"", finished + 1
                continue
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            killed += 1
            content = ledger.path.read_bytes() if ledger.path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            if not whole.startswith(kept):
                print(f"kills: after {killed}, lines that were in the ledger are gone")
                return False
            kept = whole
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        records = [record for record in ledger.read()[0] if record["kind"] in ("preflight", "latency")]
        places = [
            tuple(record.get(key) for key in ("comparison", "attention", "kind", "round", "is_control")) for record in records
        ]
        rows = schema.read(ledger.path.with_name("results.csv"))
    complete = len(rows) == 3 * 10 and (rows["outcome"] == "ok").all() and (rows["rounds"] >= 20).all()
    twice = len(places) - len(set(places))
    print(f"kills: {killed} in {finished + 1} sweeps; in the last {len(places)} records, {twice} of them twice")
    print(f"kills: the table is {'' if complete else 'not '}complete")
    return bool(complete) and not twice


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# --- the command ----------------------------------------------------------------------------------


def composed(*overrides: str) -> Comparison:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return read_job(compose("config", list(overrides)))
