"""The tables of latencies and of fits, from synthetic rounds with known truth."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from evals.results import latency_table
from evals.results.ledger import Record
from evals.results.scaling_table import build

PEAKS = {
    "flops_per_s": 1e11,
    "bytes_per_s": [[65536, 1e11], [1 << 28, 1e10]],
    "threads": 2,
    "thread_flops_per_s": 5e10,
    "thread_bytes_per_s": [[65536, 5e10], [1 << 28, 1e10]],
}


def sweep(lengths: dict[int, dict[str, float]], *, rounds: int = 6, noise: float = 0.01, **preflight: Any) -> list[Record]:
    """The records of a sweep, from the latencies in seconds of each attention at each length."""
    generator = np.random.default_rng(0)
    records: list[Record] = []
    for n, seconds in lengths.items():
        key = f"comparison {n}"
        settings = {"workload": "prefill", "scope": "attention", "device": "cpu", "dtype": "float32", "threads": 2}
        settings |= {"batch_size": 1, "seq_len": n, "hidden_dim": 64, "num_heads": 2, "processor": "P", "torch": "T"}
        described = {"kind": "comparison", "comparison": key, "sweep": "s", "swept": "shape.seq_len", "relative_to": "standard"}
        records.append({**described, "settings": settings, "candidates": {name: {} for name in seconds}, "peaks": PEAKS})
        declared = {"flops": 1000 * n, "min_bytes": 100 * n, "held_bytes": 10 * n, "parameter_bytes": 4096, "state_bytes": n}
        for name in seconds:
            shared = {"comparison": key, "attention": name, "outcome": "ok", "detail": ""}
            records.append({"kind": "preflight", **shared, **declared, "peak_bytes": 100 * n, "call_s": 1.0, **preflight})
        for number in range(rounds):
            drift = math.exp(generator.normal(0, 0.3))  # of the whole machine
            for name, is_control in [*((name, False) for name in seconds), ("standard", True)]:
                slices = [[drift * seconds[name] * math.exp(generator.normal(0, noise)) for _ in range(3)] for _ in range(8)]
                shared = {"comparison": key, "attention": name, "is_control": is_control, "round": number}
                shared |= {"outcome": "ok", "detail": ""}
                records.append(
                    {"kind": "latency", **shared, "tokens": n, "first_call_s": 1.0, "time_slices": slices, "round_s": 1.0}
                )
        records.append({"kind": "stop", "comparison": key, "stop_reason": "target"})
    return records


def test_drift_of_the_machine_cancels_in_speed_ups() -> None:
    rows = latency_table.build(sweep({128: {"standard": 0.01, "twice": 0.005, "same": 0.01}})).set_index("attention")
    assert rows.loc["twice", "speedup"] == pytest.approx(2, rel=0.02)
    assert rows.loc["twice", "speedup_high"] / rows.loc["twice", "speedup_low"] < 1.05
    assert rows.loc["twice", "latency_high_s"] / rows.loc["twice", "latency_low_s"] > 1.2
    assert rows["verdict"].dropna().to_dict() == {"twice": "faster", "same": "same"}
    assert (rows["noise_floor"] < 0.02).all()
    assert (rows["stop_reason"] == "target").all()


def test_a_row_has_its_fraction_of_the_roofline() -> None:
    # 1e8 FLOPs at 1e11 a second, 1e7 bytes at 1e11 a second at most: compute binds, a thousandth of a second.
    row = latency_table.build(sweep({128: {"standard": 0.01}}, flops=10**8, min_bytes=10**7)).iloc[0]
    assert row["bound"] == "compute"
    assert row["roofline_s"] == pytest.approx(1e-3)
    assert row["roofline_fraction"] == pytest.approx(1e-3 / row["latency_s"])
    row = latency_table.build(sweep({128: {"standard": 0.01}}, flops=10**7, min_bytes=5 * 10**7)).iloc[0]
    assert (row["bound"], row["roofline_s"]) == ("memory", pytest.approx(5e-4))


@pytest.mark.parametrize(
    ("preflight", "message"),
    [
        ({"flops": 10**11}, "faster than physics: a call took .* but its FLOPs and bytes take at least 1 s"),
        ({"peak_bytes": 5, "held_bytes": 1280}, "a peak of 5 bytes, where its output alone takes 1280"),
    ],
)
def test_an_impossible_number_is_not_published(preflight: dict[str, int], message: str) -> None:
    rows = latency_table.build(sweep({128: {"standard": 0.01, "other": 0.02}}, **preflight))
    assert set(rows["outcome"]) == {"impossible"}
    assert rows["detail"].str.contains(message).all()
    assert rows[["latency_s", "speedup", "peak_bytes"]].isna().all(axis=None)


def test_declared_flops_bound_a_call_whose_bytes_cannot_be_traced() -> None:
    rows = latency_table.build(sweep({128: {"standard": 0.01, "other": 1e-9}}, flops=10**8, min_bytes=None)).set_index("attention")
    assert (rows.loc["standard", "bound"], rows.loc["standard", "roofline_s"]) == ("compute", pytest.approx(1e-3))
    assert pd.isna(rows.loc["standard", "min_bytes"])
    assert rows.loc["other", "outcome"] == "impossible"


def test_nobody_is_compared_with_an_impossible_reference() -> None:
    records = sweep({128: {"standard": 0.01, "other": 0.02}})
    for record in records:
        if record["kind"] == "preflight" and record["attention"] == "standard":
            record["flops"] = 10**11
    rows = latency_table.build(records).set_index("attention")
    assert rows["outcome"].to_dict() == {"standard": "impossible", "other": "ok"}
    assert rows.loc["other", "latency_s"] == pytest.approx(0.02, rel=0.2)
    assert rows[["relative_to", "speedup", "p_value", "verdict"]].isna().all(axis=None)


def test_an_attention_whose_timed_output_is_wrong_has_no_number() -> None:
    records = sweep({128: {"standard": 0.01, "other": 0.02}})
    shared = {"comparison": "comparison 128", "attention": "other", "is_control": False, "round": 0, "round_s": 1.0}
    records.append({"kind": "latency", **shared, "outcome": "uncertified", "detail": "its tensor 0 differs"})
    rows = latency_table.build(records).set_index("attention")
    assert rows.loc["other", "outcome"] == "uncertified"
    assert rows.loc["other", ["latency_s", "speedup", "peak_bytes", "certified_as"]].isna().all()
    assert rows.loc["standard", "outcome"] == "ok"


def test_a_candidate_that_fails_in_a_later_round_has_no_number() -> None:
    records = sweep({128: {"standard": 0.01, "other": 0.02}})
    shared = {"comparison": "comparison 128", "attention": "other", "is_control": False, "round": 9, "round_s": 1.0}
    records.append({"kind": "latency", **shared, "outcome": "oom", "detail": "killed"})
    rows = latency_table.build(records).set_index("attention")
    assert rows["outcome"].to_dict() == {"standard": "ok", "other": "oom"}
    assert math.isnan(rows.loc["other", "latency_s"])


def test_unmatched_costs_are_named() -> None:
    records = sweep({128: {"standard": 0.01, "other": 0.02}})
    for record in records:
        if record["kind"] == "preflight" and record["attention"] == "other":
            record["parameter_bytes"] *= 2
    assert set(latency_table.build(records)["unmatched"]) == {"parameters 1× to 2× (other)"}


def test_exponents_and_crossings_of_known_curves() -> None:
    lengths = {n: {"standard": 1e-9 * n**2, "line": 1e-6 * n, "slow": 1e-5 * n} for n in (128, 256, 512, 1024, 2048, 4096)}
    records = sweep(lengths, noise=0.02)
    fits = build(latency_table.build(records), records)
    scaling = fits["scaling"].set_index(["attention", "quantity"])
    assert scaling.loc[("standard", "latency"), "exponent_low"] <= 2 <= scaling.loc[("standard", "latency"), "exponent_high"]
    assert scaling.loc[("line", "latency"), "exponent_low"] <= 1 <= scaling.loc[("line", "latency"), "exponent_high"]
    assert scaling.loc[("line", "memory"), "exponent"] == pytest.approx(1, abs=1e-3)
    assert scaling.loc[("standard", "latency"), "declared_exponent"] == pytest.approx(1, abs=1e-3)
    assert scaling.loc[("standard", "latency"), "agreement"] == "steeper than declared"
    crossing = fits["crossovers"].set_index(["first", "second"])
    found = crossing.loc[("standard", "line")]
    assert found["at_low"] <= 1000 <= found["at_high"]
    assert found["at_high"] / found["at_low"] < 1.2
    assert found["after"] == "slower"
    assert crossing.loc[("standard", "slow"), "note"] == "none in range"


def test_attentions_with_matched_parameters_are_compared() -> None:
    """With match=params ff_dim differs between attentions, and changes with the size of the model."""
    lengths = {n: {"standard": 1e-9 * n**2, "line": 1e-6 * n} for n in (128, 512, 1024, 4096)}
    records = sweep(lengths, noise=0.02)
    rows = latency_table.build(records)
    alike, matched = (
        build(rows.assign(ff_dim=ff_dim, match=match), records)
        for match, ff_dim in (("", 64), ("params", rows["attention"].map({"standard": 64, "line": 60}) + rows["seq_len"]))
    )
    assert len(matched["crossovers"]) == 1
    for kind in ("scaling", "crossovers"):
        pd.testing.assert_frame_equal(matched[kind], alike[kind])


def test_a_swept_setting_that_is_no_number_has_no_exponent() -> None:
    records = sweep({128: {"standard": 0.01}})
    for record in records:
        if record["kind"] == "comparison":
            record["swept"] = "device.dtype"
    assert build(latency_table.build(records), records) == {}
