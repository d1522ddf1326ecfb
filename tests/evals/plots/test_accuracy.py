"""Figures of accuracy draw the rows of the best learning rates, and are left out without data."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from evals import figures
from evals.plots import accuracy, registry
from evals.plots.needle import needle_depth
from evals.results import frames
from tests.evals import sweeps
from tests.evals.learned import NAMES, losses, recalled, sized


def learned(rows: pd.DataFrame, swept: str = "num_pairs") -> accuracy.AccuracySweep:
    ((suffix, sweep),) = accuracy.accuracy_sweeps(rows, losses(), swept)
    assert suffix == ""
    return sweep


def drawn(picture: Figure | None, name: str) -> Line2D:
    assert picture is not None
    (sweep,) = [one for one in picture.axes[0].get_lines() if one.get_gid() == name]
    return sweep


def best(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    return rows[(rows["attention"] == name) & rows["best"]]


@pytest.mark.parametrize("name", NAMES)
def test_accuracy_is_that_of_the_best_rate_at_the_length_of_training(name: str) -> None:
    rows = recalled(lengths=(64, 128))
    own = best(rows, name)[lambda one: one["eval_seq_len"] == 64]
    line = drawn(accuracy.accuracy(learned(rows)), name)
    assert np.asarray(line.get_xdata()).tolist() == [4, 8, 16]
    assert np.asarray(line.get_ydata()).tolist() == own["accuracy"].tolist()


def test_accuracy_by_length_takes_the_greatest_swept_value() -> None:
    rows = recalled(lengths=(64, 128, 256))
    line = drawn(accuracy.accuracy_by_length(learned(rows)), "bsbr")
    own = best(rows, "bsbr")[lambda one: one["num_pairs"] == 16]
    assert np.asarray(line.get_xdata()).tolist() == [64, 128, 256]
    assert np.asarray(line.get_ydata()).tolist() == own["accuracy"].tolist()
    assert accuracy.accuracy_by_length(learned(recalled())) is None


def test_a_dominated_attention_is_not_on_the_front() -> None:
    rows = recalled(places=(4, 16))
    at = {"standard": (3000.0, 0.9), "bsbr": (1000.0, 0.8), "linear": (2000.0, 0.5)}
    for column, index in (("state_bytes", 0), ("accuracy", 1)):
        rows[column] = rows["attention"].map({name: point[index] for name, point in at.items()})
    front = drawn(accuracy.recall_front(learned(rows)), "front")
    corners = set(zip(np.asarray(front.get_xdata()).tolist(), np.asarray(front.get_ydata()).tolist(), strict=True))
    assert {(1000.0, 0.8), (3000.0, 0.9)} <= corners
    assert not any(y == 0.5 for _, y in corners)
    assert np.asarray(drawn(accuracy.recall_front(learned(rows)), "linear").get_xdata()).tolist() == [2000.0]


def test_recall_latency_takes_decoding_at_the_length_of_training() -> None:
    rows, times = recalled(), sweeps.table(NAMES, (64, 128))
    (decoded,) = (one for _, one in frames.sweeps(times, {}))
    decode_latency = times[times["seq_len"] == 64].set_index("attention")["latency_s"]
    for name in NAMES:
        point = drawn(accuracy.recall_latency(learned(rows), decoded), name)
        assert np.asarray(point.get_xdata()).tolist() == [decode_latency[name]]
        greatest = best(rows, name)[lambda one: one["num_pairs"] == 16]
        assert np.asarray(point.get_ydata()).tolist() == greatest["accuracy"].tolist()
    (longer,) = (one for _, one in frames.sweeps(sweeps.table(NAMES, (128,)), {}))
    assert accuracy.recall_latency(learned(rows), longer) is None


def test_sizes_of_an_attention_are_points_of_one_line_and_each_can_be_on_the_front() -> None:
    rows = sized(recalled())
    picture = accuracy.recall_front(learned(rows, "hidden_dim"))
    for name in NAMES:
        line, own = drawn(picture, name), best(rows, name)
        assert np.asarray(line.get_xdata()).tolist() == own["state_bytes"].tolist() == sorted(own["state_bytes"])
        assert np.asarray(line.get_ydata()).tolist() == own["accuracy"].tolist()
    front = drawn(picture, "front")
    corners = set(zip(np.asarray(front.get_xdata()).tolist(), np.asarray(front.get_ydata()).tolist(), strict=True))
    best_rows = rows[rows["best"]]
    for _, row in best_rows.iterrows():
        beaten = ((best_rows["state_bytes"] <= row["state_bytes"]) & (best_rows["accuracy"] > row["accuracy"])).any()
        assert beaten == ((row["state_bytes"], row["accuracy"]) not in corners)


def test_recall_latency_takes_the_latency_of_each_size() -> None:
    rows = sized(recalled(places=(32, 64)))
    times = pd.concat([sweeps.table(NAMES, (64,)).assign(hidden_dim=width, swept="model.hidden_dim") for width in (32, 64)])
    times["latency_s"] *= times["hidden_dim"]
    (decoded,) = (one for _, one in frames.sweeps(times, {}))
    picture = accuracy.recall_latency(learned(rows, "hidden_dim"), decoded)
    for name in NAMES:
        assert np.asarray(drawn(picture, name).get_xdata()).tolist() == times[times["attention"] == name]["latency_s"].tolist()


def test_needle_heatmap_has_every_depth_and_length_of_every_attention() -> None:
    rows = recalled("depth", places=(4,), lengths=(64, 128))
    picture = needle_depth(learned(rows))
    assert picture is not None
    maps = [(axes.get_title(), mesh) for axes in picture.axes for mesh in axes.collections if isinstance(mesh, QuadMesh)]
    images = {name: np.asarray(mesh.get_array()) for name, mesh in maps}
    assert {*images} >= {*NAMES}
    for name in NAMES:
        own = best(rows, name)[lambda one: one["depth"].notna()]
        for down, depth in enumerate((0.0, 0.5, 1.0)):
            for across, length in enumerate((64, 128)):
                cell = own[(own["depth"] == depth) & (own["eval_seq_len"] == length)]
                assert images[name][down, across] == cell["accuracy"].item()
    assert needle_depth(learned(recalled())) is None


def test_bits_per_byte_replace_accuracy() -> None:
    sweep = learned(recalled("position", places=(4,), lengths=(64, 128)))
    line = drawn(accuracy.bits_by_position(sweep), "linear")
    own = best(sweep.rows, "linear")[lambda one: (one["eval_seq_len"] == 128) & one["position"].notna()]
    assert np.asarray(line.get_xdata()).tolist() == [1, 2, 4]
    assert np.asarray(line.get_ydata()).tolist() == own["bits_per_byte"].tolist()
    assert [accuracy.accuracy(sweep), accuracy.accuracy_by_length(sweep), accuracy.recall_front(sweep)] == [None] * 3
    assert accuracy.bits_by_position(learned(recalled())) is None


def test_losses_are_those_of_the_first_seed_at_the_best_rate() -> None:
    line = drawn(accuracy.loss(learned(recalled())), "standard")
    losses = [5.0 / step for step in range(1, 21)]
    smooth = [sum(losses[max(0, at - 4) : at + 1]) / len(losses[max(0, at - 4) : at + 1]) for at in range(20)]
    assert np.asarray(line.get_ydata()).tolist() == pytest.approx(smooth)


def test_failures_are_named_and_other_settings_have_separate_figures(tmp_path: Path) -> None:
    rows = recalled()
    failed = rows.assign(outcome=rows["outcome"].mask(rows["attention"] == "linear", "diverged"))
    sweep = learned(failed)
    assert sweep.failed == "linear (diverged)"
    assert set(sweep.rows["attention"]) == {"standard", "bsbr"}
    both = pd.concat([rows, rows.assign(seq_len=128, eval_seq_len=128)])
    paths = registry.draw_accuracy(both, losses(), tmp_path)
    assert {path.name for path in paths} >= {"accuracy-64.png", "accuracy-128.svg", "loss-64.png"}


def test_redrawing_gives_the_same_bytes_and_replaces_earlier_figures(tmp_path: Path) -> None:
    (tmp_path / "needle_depth-old.png").write_bytes(b"")
    first = {path.name: path.read_bytes() for path in registry.draw_accuracy(recalled(), losses(), tmp_path)}
    again = {path.name: path.read_bytes() for path in registry.draw_accuracy(recalled(), losses(), tmp_path)}
    assert first == again
    assert {path.name for path in tmp_path.iterdir()} == {*first}


def test_a_folder_of_accuracy_tables_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "recall"
    folder.mkdir()
    recalled().to_csv(folder / "results.csv", index=False)
    losses().to_csv(folder / "curves.csv", index=False)
    assert figures.main([str(folder), "--plots", str(tmp_path / "plots")]) == 0
    assert {path.stem for path in (tmp_path / "plots" / "recall").iterdir()} == {"accuracy", "recall_front", "loss"}
    (folder / "results.csv").write_text(recalled().drop(columns="chance").to_csv(index=False))
    assert figures.main([str(folder), "--plots", str(tmp_path / "plots")]) == 2
    assert "column chance missing" in capsys.readouterr().err
