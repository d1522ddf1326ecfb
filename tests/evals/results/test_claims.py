"""Verdicts on claims about synthetic rounds with known truth: a table and a ledger as evals.run writes them."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from evals.claim import EXIT_CODES, main
from evals.errors import UsageError
from evals.results.claim_grammar import Claim, parse
from evals.results.claims import weigh
from evals.results.ledger import Ledger
from evals.stats.intervals import Interval, median_interval, speedup_interval
from evals.stats.verdicts import noise_floor

Time = Callable[[float], float]
SIZES = (128, 256, 512, 1024, 2048, 4096)
TIMES: dict[str, Time] = {
    "standard": lambda n: 1e-9 * n**2,
    "linear": lambda n: 1e-9 * 700 * n,
    "bsbr": lambda n: 1e-9 * 350 * n,
}
BYTES: dict[str, Time] = {"standard": lambda n: 4.0 * n * n, "linear": lambda n: 512.0 * n, "bsbr": lambda n: 256.0 * n}


def write(
    folder: Path, times: Mapping[str, Time] = TIMES, *, noise: float = 0.01, rounds: int = 6, ledger: bool = True, **columns: Any
) -> Path:
    """Writes one comparison per length. Each round slows all attentions alike by up to 30 %, and has noise for each of them."""
    generator = np.random.default_rng(0)
    rows, reference = [], "standard"
    for n in SIZES:
        shared = np.exp(generator.uniform(-0.3, 0.3, (rounds, 4, 1)))
        slices: dict[tuple[str, bool], list[list[list[float]]]] = {}
        for name, is_control in [*((name, False) for name in times), (reference, True)]:
            own = np.exp(generator.normal(0, noise, (rounds, 1, 1)) + generator.normal(0, noise, (rounds, 4, 5)))
            slices[name, is_control] = (times[name](n) * shared * own).tolist()
        if ledger:
            for (name, is_control), by_round in slices.items():
                for number, time_slices in enumerate(by_round):
                    Ledger(folder / "samples.jsonl").append(
                        {
                            "kind": "latency",
                            "comparison": f"c{n}",
                            "attention": name,
                            "round": number,
                            "is_control": is_control,
                            "outcome": "ok",
                            "round_s": 1.0,
                            "first_call_s": 0.1,
                            "time_slices": time_slices,
                        }
                    )
        floor = noise_floor(speedup_interval(slices[reference, False], slices[reference, True], generator=generator))
        for name in times:
            samples = [[sample for part in time_slices for sample in part] for time_slices in slices[name, False]]
            latency = median_interval(samples, generator=generator)
            speedup = speedup_interval(slices[reference, False], slices[name, False], generator=generator)
            rows.append(
                {
                    "sweep": "seq_len",
                    "swept": "shape.seq_len",
                    "attention": name,
                    "outcome": "ok",
                    "comparison": f"c{n}",
                    "workload": "prefill",
                    "batch_size": 1,
                    "seq_len": n,
                    "processor": "Test CPU",
                    "torch": "2.13.0",
                    "latency_s": latency.value,
                    "latency_low_s": latency.low,
                    "latency_high_s": latency.high,
                    "rounds": rounds,
                    "relative_to": reference,
                    "speedup": speedup.value,
                    "speedup_low": speedup.low,
                    "speedup_high": speedup.high,
                    "noise_floor": floor,
                    "peak_bytes": BYTES[name](n),
                    **columns,
                }
            )
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("results") / "seq_len")


# --- the grammar ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "claim"),
    [
        ("a 2x faster than b at seq_len 4096", Claim("a", "b", "faster", 2.0, {"seq_len": "4096"})),
        ("a is 2.5 x slower than b", Claim("a", "b", "slower", 2.5, {})),
        ("a 20% faster than b", Claim("a", "b", "faster", 1.2, {})),
        ("a faster than b at seq_len 4 and batch_size=2", Claim("a", "b", "faster", 1.0, {"seq_len": "4", "batch_size": "2"})),
        ("a uses 50% less memory than b", Claim("a", "b", "less", 2.0, {})),
        ("a uses 50% more memory than b", Claim("a", "b", "more", 1.5, {})),
        ("a uses less memory than my_b-2 at dtype bfloat16", Claim("a", "my_b-2", "less", 1.0, {"dtype": "bfloat16"})),
        ("a scales as n^1.5", Claim("a", "", "latency", 1.5, {})),
        ("a scales as n in memory at batch_size 2", Claim("a", "", "memory", 1.0, {"batch_size": "2"})),
        ("a overtakes b before seq_len 1e3", Claim("a", "b", "before", 1000.0, {})),
    ],
)
def test_the_grammar(text: str, claim: Claim) -> None:
    parsed = parse(text)
    assert parsed == Claim(claim.first, claim.second, claim.relation, pytest.approx(claim.amount), claim.settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no claim; one reads <a> "),
        ("bsbr is great", "'bsbr is great' is no claim.*bsbr 2x faster than standard at seq_len 4096"),
        ("a faster than b at seq_len", "is no claim"),
        ("a faster than b at seq_len 4 and", "is no claim"),
        ("a -2x faster than b", "is no claim"),
        ("a 0.5x faster than b", "at least 1, got 0.5x"),
        ("a uses 100% less memory than b", "nothing uses 100% less"),
        ("a faster than a", "compared with itself"),
    ],
)
def test_a_text_that_is_no_claim_is_refused_in_one_sentence(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text)
    assert main([text]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        # standard n², linear 700 n, bsbr 350 n: at 4096 bsbr is 11.7 times as fast as standard and twice as fast as linear.
        ("bsbr 10x faster than standard at seq_len 4096", "supported"),
        ("bsbr 14x faster than standard at seq_len 4096", "refuted"),
        ("standard 10x slower than bsbr at seq_len 4096", "supported"),
        ("standard faster than bsbr at seq_len 4096", "refuted"),
        ("bsbr faster than standard", "refuted"),  # not at 128 and 256
        ("bsbr 80% faster than linear", "supported"),
        ("bsbr 2x faster than linear at seq_len 4096", "undecided"),
        ("bsbr 0.1% faster than standard at seq_len 4096", "undecided"),  # smaller than the noise floor
        ("bsbr uses 2x less memory than linear", "supported"),
        ("bsbr uses 51% less memory than linear", "refuted"),
        ("standard uses 60x more memory than bsbr at seq_len 4096 and batch_size 1", "supported"),
        ("standard scales as n^2", "supported"),
        ("bsbr scales as n^2", "refuted"),
        ("bsbr scales as n^1 in memory", "supported"),
        ("bsbr overtakes standard before seq_len 400", "supported"),
        ("bsbr overtakes standard after seq_len 400", "refuted"),
        ("bsbr overtakes standard before seq_len 300", "refuted"),
        ("bsbr overtakes standard after seq_len 300", "supported"),
        ("bsbr overtakes linear before seq_len 200", "supported"),  # it leads from the start
        ("linear overtakes bsbr before seq_len 2048", "refuted"),
        ("linear overtakes bsbr before seq_len 100000", "undecided"),  # nobody looked there
        ("linear overtakes bsbr after seq_len 2048", "undecided"),
    ],
)
def test_verdicts(measured: Path, text: str, verdict: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main([text, str(measured)])
    printed = capsys.readouterr().out
    assert printed.startswith(f"{verdict}: ")
    assert code == EXIT_CODES[verdict]
    assert "processor Test CPU; torch 2.13.0" in printed
    assert str(measured) in printed
    assert ("would decide it: " in printed) == (verdict == "undecided")


def test_the_evidence_at_one_setting(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["bsbr 10x faster than standard at seq_len 4096", str(measured)])
    first, second, *_ = capsys.readouterr().out.splitlines()
    table = pd.read_csv(measured / "results.csv").query("attention == 'bsbr' and seq_len == 4096").iloc[0]
    numbers = f"{table['speedup']:.4g}x the speed of standard ({table['speedup_low']:.4g}x to {table['speedup_high']:.4g}x)"
    assert first == f"supported: bsbr runs at {numbers} at seq_len 4096, claimed 10x"
    assert second.strip() == f"paired, 6 rounds; noise floor {table['noise_floor']:.1%}"


def test_without_a_setting_the_worst_one_decides(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["bsbr faster than standard", str(measured)])
    printed = capsys.readouterr().out
    assert "at seq_len 128" in printed.splitlines()[0]
    assert "the worst of 6 settings: 4 supported, 2 refuted, 0 undecided" in printed


def test_two_attentions_other_than_the_reference_are_paired_from_the_ledger(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The drift of 30 % between rounds cancels only in pairs."""
    claim = "bsbr 80% faster than linear at seq_len 4096"
    assert main([claim, str(measured)]) == 0
    assert "\n  paired, 6 rounds" in capsys.readouterr().out
    assert main([claim, str(write(tmp_path / "alone", ledger=False))]) == 3
    assert "computed from two intervals, not paired" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ratio", "claimed", "floor", "verdict"),
    [
        (Interval(2.1, 2.0, 2.2), 2.0, 0.02, "supported"),
        (Interval(1.9, 1.8, 1.999), 2.0, 0.02, "refuted"),
        (Interval(2.1, 1.9, 2.2), 2.0, 0.02, "undecided"),
        (Interval(1.01, 1.005, 1.015), 1.0, 0.02, "undecided"),  # within the noise floor
        (Interval(0.99, 0.985, 0.995), 1.0, 0.02, "undecided"),
        (Interval(0.9, 0.85, 0.95), 1.0, 0.02, "refuted"),
        (Interval(1.5, 1.4, 1.6), 1.01, 0.02, "undecided"),  # the claim itself is within it
        (Interval(1.5, 1.4, 1.6), 1.4, math.inf, "undecided"),
        (Interval(1.5, 1.4, 1.6), 2.0, math.inf, "refuted"),
        (Interval(1.5, math.nan, math.nan), 1.2, 0.02, "undecided"),
        (Interval(1.0, 1.0, 1.0), 1.0, 0.0, "refuted"),  # exactly equal memory is not less
    ],
)
def test_weighing_by_hand(ratio: Interval, claimed: float, floor: float, verdict: str) -> None:
    decided, missing = weigh(ratio, claimed, floor, 5)
    assert decided == verdict
    assert bool(missing) == (verdict == "undecided")


def test_an_undecided_claim_says_how_many_rounds_it_takes() -> None:
    # The half-width is twice the distance to the claim: 4 times the rounds.
    ratio = Interval(math.exp(0.1), math.exp(-0.1), math.exp(0.3))
    assert "about 20 rounds" in weigh(ratio, 1.0, 0.02, 5)[1]


def test_noise_supports_no_claim_about_equal_attentions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = dict.fromkeys(TIMES, TIMES["standard"])
    folder = str(write(tmp_path / "same", same, noise=0.05))
    for text in (
        "bsbr faster than standard",
        "bsbr slower than standard",
        "bsbr 1% faster than linear",
        "bsbr overtakes linear before seq_len 500",
    ):
        assert main([text, folder]) in (1, 3)
    assert "supported: " not in capsys.readouterr().out


def test_ff_dims_of_matched_parameters_are_not_a_setting(tmp_path: Path) -> None:
    """With match=params ff_dim differs between candidates, and they are still measured side by side."""
    folder = write(tmp_path, ledger=False, match="params")
    table = pd.read_csv(folder / "results.csv")
    table["ff_dim"] = table["attention"].map({"standard": 1024, "linear": 1000, "bsbr": 900})
    table.to_csv(folder / "results.csv", index=False)
    assert main(["bsbr uses less memory than standard at seq_len 512", str(folder)]) == EXIT_CODES["supported"]


def test_a_failed_row_decides_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "seq_len")
    table = pd.read_csv(folder / "results.csv")
    failed = (table["attention"] == "standard") & (table["seq_len"] == 4096)
    table.loc[failed, ["outcome", "latency_s", "latency_low_s", "latency_high_s", "peak_bytes"]] = ["oom", *[math.nan] * 4]
    table.to_csv(folder / "results.csv", index=False)
    assert main(["bsbr 2x faster than standard at seq_len 4096", str(folder)]) == 3
    assert "standard gave oom at seq_len 4096" in capsys.readouterr().out
    assert main(["standard scales as n^2 in memory", str(folder)]) == 0
    assert "over 5 lengths, 128 to 2048" in capsys.readouterr().out


# --- where it looks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine faster than bsbr", "mine was not measured; known are bsbr, linear, standard"),
        (
            "bsbr faster than linear at seq_len 1000",
            "seq_len 1000 was not measured in .*; measured are 128, 256, 512, 1024, 2048, 4096",
        ),
        (
            "bsbr faster than linear at colour red",
            "colour is no setting of .*; known are workload, batch_size, seq_len, processor, torch",
        ),
    ],
)
def test_an_unmeasured_name_or_setting_is_reported_with_the_measured_ones(
    measured: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([text, str(measured)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert pd.Series([printed]).str.contains(message).all()


def test_own_sweeps_are_searched_before_those_of_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bsbr faster than linear"]) == 2
    assert "there are no results" in capsys.readouterr().err
    write(Path("results/paper/seq_len"))
    assert main(["bsbr faster than linear"]) == 0
    assert "results/paper/seq_len" in capsys.readouterr().out
    write(Path("results/mine"), {**TIMES, "bsbr": lambda n: 1e-9 * 1400 * n})
    assert main(["bsbr faster than linear"]) == 1
    assert "results/mine" in capsys.readouterr().out


def test_a_folder_without_a_table_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bsbr faster than linear", str(tmp_path / "none")]) == 2
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    assert main(["bsbr faster than linear", str(tmp_path)]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert "none does not exist; give a folder" in printed[0]
    assert "has no column attention" in printed[1]
