"""The distribution draws the raw samples of the ledger, all of them and without the control."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.figure import Figure

from evals.plots.distribution import distribution, raw_samples
from evals.plots.registry import draw_sweep
from evals.plots.style import render
from evals.results.frames import check_table, sweeps
from tests.evals.sweeps import LENGTHS, failing, table, words


def record(comparison: str, attention: str, *slices: list[float], **changes: object) -> dict[str, object]:
    fields = {"kind": "latency", "outcome": "ok", "is_control": False, "round": 0}
    return {**fields, "comparison": comparison, "attention": attention, "time_slices": [*slices], **changes}


def measured() -> tuple[pd.DataFrame, list[dict[str, object]]]:
    """A table, and a ledger with two rounds of each cell: 40 samples around 1 µs times the length, and one outlier."""
    results = table().assign(comparison=table()["seq_len"].astype(str))
    generator = np.random.default_rng(0)
    records = [
        record(str(length), name, (length * generator.normal(1e-6, 1e-7, 20)).tolist(), [5e-6 * length] * (turn == 1), round=turn)
        for name in ("standard", "bsbr", "linear")
        for length in LENGTHS
        for turn in (0, 1)
    ]
    return results, records


def draw(results: pd.DataFrame, records: list[dict[str, object]]) -> Figure | None:
    ((_, sweep),) = sweeps(check_table(results), {})
    return render(distribution, sweep, raw_samples(records))


def test_samples_come_from_all_ok_time_slices_except_those_of_the_control() -> None:
    records = [
        record("a", "bsbr", [1.0, 2.0], [3.0]),
        record("a", "standard", [9.0], is_control=True),
        {"kind": "latency", "outcome": "oom", "comparison": "a", "attention": "linear", "is_control": False, "round": 0},
        {"kind": "stop", "comparison": "a"},
    ]
    samples = raw_samples(records)
    assert samples["latency_s"].tolist() == [1.0, 2.0, 3.0]
    assert {*samples["attention"]} == {"bsbr"}


def test_a_violin_spans_the_fastest_to_the_slowest_sample() -> None:
    results, records = measured()
    figure = draw(results, records)
    assert figure is not None
    samples = raw_samples(records)
    for axes, length in zip(figure.axes, ("1", "1000", "8192"), strict=True):
        violins = [found for found in axes.collections if isinstance(found, FillBetweenPolyCollection)]
        assert len(violins) == 3
        for violin, name in zip(violins, ("standard", "bsbr", "linear"), strict=True):
            own = samples[(samples["comparison"] == length) & (samples["attention"] == name)]["latency_s"]
            reach = np.asarray(violin.get_paths()[0].vertices)[:, 0]
            assert (reach.min(), reach.max()) == (
                np.float64(own.min() / own.median()).round(12),
                np.float64(own.max() / own.median()).round(12),
            ) or np.allclose([reach.min(), reach.max()], [own.min() / own.median(), own.max() / own.median()])
    assert "all samples of all rounds" in words(figure)


def test_a_failure_and_a_ledger_without_samples_have_no_violin(tmp_path: Path) -> None:
    results, records = measured()
    figure = draw(failing(results, "linear", 8192, "oom"), records)
    assert figure is not None
    assert len([found for found in figure.axes[-1].collections if isinstance(found, FillBetweenPolyCollection)]) == 2
    assert draw(results, []) is None
    names = {path.stem for path in draw_sweep(results, tmp_path / "with", records=records)}
    assert names - {path.stem for path in draw_sweep(results, tmp_path / "without")} == {"distribution"}
