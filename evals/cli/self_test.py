"""Tests of the instrument itself on this machine: A/A comparisons, a known slowdown, torch's clock, and kill -9."""

import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from torch.utils.benchmark import Timer
from tqdm import tqdm

from evals.benchmark.certificates import Certificates
from evals.benchmark.engine import Engine
from evals.benchmark.rounds import within_budget
from evals.benchmark.workloads import prepare
from evals.cli.false_alarms import guard
from evals.cli.jobs import read_job
from evals.config import Candidate, Comparison
from evals.errors import UsageError
from evals.isolation.worker import run_isolated
from evals.measure.clock import Stopwatch, make_clock, settle_allocator
from evals.paths import CONF, ROOT
from evals.results import latency_table, schema
from evals.results.ledger import Ledger

SLOWDOWN = 1.05
NAMES = ("standard", "bsbr", "linear", "sliding_window", "sparse", "hopfield", "delta_net", "gau")
CERTIFICATES = Certificates(Path(tempfile.gettempdir()) / "bsbr-validate" / "certificates.jsonl")


# --- verdicts -------------------------------------------------------------------------------------


def aa(numbers: range, overrides: Sequence[str]) -> bool:
    """Compares attentions with themselves: at least 92.5 % of intervals hold 1, at most 2 % are called faster or slower.

    Args:
        numbers: one comparison each; the number is the seed that draws an attention and a length.
        overrides: settings of the config, such as `device.threads=1`.
    """
    rows = list(_self_comparisons("aa", numbers, [64, 200, 512, 1000, 2048], overrides, factor=1.0))
    covered = sum(row["speedup_low"] <= 1 <= row["speedup_high"] for row in rows)
    wrong = sum(row["verdict"] in ("faster", "slower") for row in rows)
    count = len(numbers)
    print(f"aa: {covered} of {count} intervals hold 1 (at least {0.925 * count:.0f})")
    print(f"aa: {wrong} of {count} are called faster or slower (at most {0.02 * count:.0f})")
    return covered >= 0.925 * count and wrong <= 0.02 * count


def slowdown(numbers: range, overrides: Sequence[str]) -> bool:
    """Compares attentions with copies slowed down by `SLOWDOWN`: at least 9 of 10 are called slower. Arguments as of `aa`."""
    rows = list(_self_comparisons("slowdown", numbers, [512, 1000, 2048], overrides, factor=SLOWDOWN))
    detected: int = sum(row["verdict"] == "slower" for row in rows)
    count = len(numbers)
    print(f"slowdown: {detected} of {count} that take {SLOWDOWN:.0%} of the time are called slower (at least {0.9 * count:.0f})")
    return detected >= 0.9 * count


def _self_comparisons(
    test: str, numbers: range, lengths: Sequence[int], overrides: Sequence[str], factor: float
) -> Iterator[dict[str, Any]]:
    """Yields and prints the result of one comparison per number."""
    for number in tqdm(numbers, desc=test, disable=None):
        chance = random.Random(number)
        row = _against_itself(chance.choice(NAMES), chance.choice(lengths), number, overrides, factor)
        interval = f"{row['speedup']:.3f} ({row['speedup_low']:.3f} to {row['speedup_high']:.3f})"
        comparison = f"{row['relative_to']} at {row['seq_len']}, {row['rounds']} rounds"
        tqdm.write(f"{test} {number}: {comparison}: {interval}, {row['verdict']}")
        yield row


def _against_itself(name: str, seq_len: int, seed: int, overrides: Sequence[str], factor: float) -> dict[str, Any]:
    """The result of an attention that takes `factor` times as long as the reference, which is the same attention."""
    node = f"{{_target_: evals.benchmark.slowed.slowed, _recursive_: false, factor: {factor}, of: ${{attention.{name}}}}}"
    settings = (f"shape.seq_len={seq_len}", f"sampling.seed={seed}", f"relative_to={name}")
    comparison = compose_comparison(f"attention=[{name}]", f"+attention.again={node}", *settings, *overrides)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "samples.jsonl")
        for _ in Engine(comparison, ledger, CERTIFICATES).run(lambda _message, _done: None):
            pass
        rows = latency_table.build(ledger.read()[0])
    row = {str(column): value for column, value in rows[rows["attention"] == "again"].iloc[0].items()}
    if row["outcome"] != "ok":
        raise UsageError(f"{name} against itself ended as {row['outcome']}: {row['detail']}")
    return row


# --- the clock ------------------------------------------------------------------------------------


def clock(_: range, overrides: Sequence[str]) -> bool:
    """Compares latencies with torch.utils.benchmark on five shapes: they agree within 3 %."""
    agree = True
    for name, seq_len in (("standard", 512), ("bsbr", 1000), ("linear", 2048), ("delta_net", 300), ("gau", 4096)):
        comparison = compose_comparison(f"attention=[{name}]", f"shape.seq_len={seq_len}", *overrides)
        result = run_isolated(_both_clocks, comparison, comparison.candidates[0], timeout_s=120.0)
        if result.outcome != "ok":
            raise UsageError(f"{name} ended as {result.outcome}: {result.detail}")
        seconds, ratio = result.value
        agree &= abs(math.log(ratio)) < 0.03
        print(f"clock: {name} at {seq_len}: {seconds * 1e3:.3f} ms by torch.utils.benchmark, ours over that {ratio:.4f}")
    return agree


def _both_clocks(comparison: Comparison, candidate: Candidate) -> tuple[float, float]:
    """Median seconds of a call by torch's clock, and the ratio of our median to it. Runs in a child process."""
    settle_allocator()
    call = prepare(comparison, candidate).work.call
    ours = make_clock(call, comparison.device.kind, comparison.device.mode)
    ours.first_call()
    timer = Timer("call()", globals={"call": call}, num_threads=comparison.device.threads)
    pairs = []
    for _ in within_budget(400, 12.0, Stopwatch()):
        our_s = statistics.median(ours.time_slice(0.01).samples_s)
        # A median of calls, as ours is; each timeit(1) costs two more calls that warm up.
        torch_s = statistics.median(timer.timeit(1).median for _ in range(max(1, round(0.003 / our_s))))
        pairs.append((our_s, torch_s))
    # A disturbance that lasts longer than a time slice slows both clocks of a pair.
    ratio = statistics.median(our_s / torch_s for our_s, torch_s in pairs)
    return statistics.median(torch_s for _, torch_s in pairs), ratio


# --- the ledger -----------------------------------------------------------------------------------

SWEEP = (
    *("sweep=seq_len", "attention=[standard,linear,sliding_window]", "shape.seq_len=64,100,130,200,256,300,400,512,600,700"),
    *("model.hidden_dim=32", "model.num_heads=2", "device.threads=1"),
    *("sampling.min_rounds=20", "sampling.max_rounds=20", "sampling.time_slices=2"),
)


def kills(numbers: range, _: Sequence[str]) -> bool:
    """Kills a sweep as often as there are numbers: all lines of the ledger stay, none is there twice, the table is complete."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "results" / "seq_len" / "samples.jsonl")
        command = [sys.executable, "-m", "evals.run", *SWEEP, f"results_dir={folder}/results", f"plots_dir={folder}/plots"]
        chance, known_lines = random.Random(0), b""
        killed = finished = 0
        while killed < len(numbers):
            if not _kill_while_running(command, ledger.path, chance):
                ledger.path.unlink()  # the sweep is complete: start again
                known_lines, finished = b"", finished + 1
                continue
            killed += 1
            content = ledger.path.read_bytes() if ledger.path.exists() else b""
            complete_lines = content[: content.rfind(b"\n") + 1]
            if not complete_lines.startswith(known_lines):
                print(f"kills: after {killed}, lines that were in the ledger are gone")
                return False
            known_lines = complete_lines
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        records = [record for record in ledger.read()[0] if record["kind"] in ("preflight", "latency")]
        rows = schema.read(ledger.path.with_name("results.csv"))
    identity = ("comparison", "attention", "kind", "round", "is_control")
    duplicates = len(records) - len({tuple(record.get(key) for key in identity) for record in records})
    complete = len(rows) == 3 * 10 and (rows["outcome"] == "ok").all() and (rows["rounds"] >= 20).all()
    print(f"kills: {killed} in {finished + 1} sweeps; in the last {len(records)} records, {duplicates} of them twice")
    print(f"kills: the table is {'' if complete else 'not '}complete")
    return bool(complete) and not duplicates


def _kill_while_running(command: Sequence[str], ledger: Path, chance: random.Random) -> bool:
    """Starts a sweep and kills it at a random moment; False if it had ended by itself."""
    before = _size(ledger)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # A few are killed while they start, most of them only after the first new record, however slow the machine is.
    while chance.random() > 0.003 and process.poll() is None and _size(ledger) == before:
        time.sleep(0.1)
    try:
        process.wait(chance.uniform(0, 4))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# --- the registry ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SelfTest:
    """A test of the instrument."""

    function: Callable[[range, Sequence[str]], bool]
    default_count: int = 1  # of comparisons or kills

    def run(self, first: int, count: int | None, overrides: Sequence[str]) -> bool:
        """Runs the test; returns whether it passed."""
        return self.function(range(first, first + (count or self.default_count)), overrides)


SELF_TESTS = {
    "aa": SelfTest(aa, 200),
    "slowdown": SelfTest(slowdown, 10),
    "clock": SelfTest(clock),
    "kills": SelfTest(kills, 100),
    "guard": SelfTest(guard, 50),
}


def compose_comparison(*overrides: str) -> Comparison:
    """The comparison that a command with these overrides would measure."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return read_job(compose("config", list(overrides)))
