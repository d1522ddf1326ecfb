"""What figures of learning show: the numbers of the table, of the best rates alone, and nothing where there is nothing."""

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from evals import figures, learning
from evals.depths import needle_depth
from evals.looks import looks
from tests.evals import sweeps

NAMES = ("standard", "bsbr", "linear")


def table(grouped_by: str | None = None, places: tuple[int, ...] = (4, 8, 16), lengths: tuple[int, ...] = (64,)) -> pd.DataFrame:
    """Results in which no number is like another; beside every best rate one that must not be shown."""
    groups = {None: (math.nan,), "depth": (math.nan, 0.0, 0.5, 1.0), "position": (math.nan, 1.0, 2.0, 4.0)}[grouped_by]
    cells = itertools.product(NAMES, places, lengths, groups, (True, False))
    rows = pd.DataFrame(cells, columns=["attention", "num_pairs", "eval_seq_len", "group", "best"])
    value = np.where(rows["best"], (np.arange(len(rows)) % 97 + 1) / 100, 0.999)
    bits = 8 * value if grouped_by == "position" else math.nan
    return rows.drop(columns="group").assign(
        **{name: rows["group"] if name == grouped_by else math.nan for name in ("depth", "position")},
        swept="task.num_pairs",
        outcome="ok",
        task="MQAR",
        seq_len=64,
        learning_rate=0.01,
        seeds=2,
        chance=0.1,
        state_bytes=1000.0 * rows["attention"].map({name: index for index, name in enumerate(NAMES, 1)}),
        accuracy=value,
        accuracy_low=value - 0.01,
        accuracy_high=value + 0.01,
        bits_per_byte=bits,
        bits_per_byte_low=bits,
        bits_per_byte_high=bits,
    )


def curves() -> pd.DataFrame:
    cells = itertools.product(NAMES, (4, 16), (True, False), (0, 1), range(1, 21))
    points = pd.DataFrame(cells, columns=["attention", "num_pairs", "best", "seed", "step"])
    return points.assign(loss_nats=np.where(points["best"], 5.0 / points["step"], 1e6))


def learned(rows: pd.DataFrame) -> learning.Learned:
    ((suffix, found),) = learning.sets(rows, curves(), "num_pairs", looks(NAMES))
    assert suffix == ""
    return found


def drawn(picture: Figure | None, name: str) -> Line2D:
    assert picture is not None
    (found,) = [one for one in picture.axes[0].get_lines() if one.get_gid() == name]
    return found


def best(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    return rows[(rows["attention"] == name) & rows["best"]]


@pytest.mark.parametrize("name", NAMES)
def test_accuracy_is_that_of_the_best_rate_at_the_length_of_training(name: str) -> None:
    rows = table(lengths=(64, 128))
    own = best(rows, name)[lambda one: one["eval_seq_len"] == 64]
    line = drawn(learning.accuracy(learned(rows)), name)
    assert np.asarray(line.get_xdata()).tolist() == [4, 8, 16]
    assert np.asarray(line.get_ydata()).tolist() == own["accuracy"].tolist()


def test_accuracy_by_length_is_where_the_sweep_goes_furthest() -> None:
    rows = table(lengths=(64, 128, 256))
    line = drawn(learning.accuracy_by_length(learned(rows)), "bsbr")
    own = best(rows, "bsbr")[lambda one: one["num_pairs"] == 16]
    assert np.asarray(line.get_xdata()).tolist() == [64, 128, 256]
    assert np.asarray(line.get_ydata()).tolist() == own["accuracy"].tolist()
    assert learning.accuracy_by_length(learned(table())) is None


def test_the_front_leaves_out_who_needs_more_and_remembers_less() -> None:
    rows = table(places=(4, 16))
    at = {"standard": (3000.0, 0.9), "bsbr": (1000.0, 0.8), "linear": (2000.0, 0.5)}
    for column, index in (("state_bytes", 0), ("accuracy", 1)):
        rows[column] = rows["attention"].map({name: point[index] for name, point in at.items()})
    front = drawn(learning.recall_front(learned(rows)), "front")
    corners = set(zip(np.asarray(front.get_xdata()).tolist(), np.asarray(front.get_ydata()).tolist(), strict=True))
    assert {(1000.0, 0.8), (3000.0, 0.8), (3000.0, 0.9)} <= corners
    assert not any(y == 0.5 for _, y in corners)
    assert np.asarray(drawn(learning.recall_front(learned(rows)), "linear").get_xdata()).tolist() == [2000.0]


def test_the_front_over_time_takes_what_decoding_took_behind_as_long_a_context() -> None:
    rows, times = table(), sweeps.table(NAMES, (64, 128))
    (decoded,) = (one for _, one in figures.sweeps(times, {}))
    taken = times[times["seq_len"] == 64].set_index("attention")["latency_s"]
    for name in NAMES:
        point = drawn(learning.recall_latency(learned(rows), decoded), name)
        assert np.asarray(point.get_xdata()).tolist() == [taken[name]]
        asked = best(rows, name)[lambda one: one["num_pairs"] == 16]
        assert np.asarray(point.get_ydata()).tolist() == asked["accuracy"].tolist()
    (longer,) = (one for _, one in figures.sweeps(sweeps.table(NAMES, (128,)), {}))
    assert learning.recall_latency(learned(rows), longer) is None


def test_a_needle_map_has_every_depth_and_length_of_every_attention() -> None:
    rows = table("depth", places=(4,), lengths=(64, 128))
    picture = needle_depth(learned(rows))
    assert picture is not None
    images = {image.get_gid(): np.asarray(image.get_array()) for axes in picture.axes for image in axes.get_images()}
    assert {*images} >= {*NAMES}
    for name in NAMES:
        own = best(rows, name)[lambda one: one["depth"].notna()]
        for down, depth in enumerate((0.0, 0.5, 1.0)):
            for across, length in enumerate((64, 128)):
                cell = own[(own["depth"] == depth) & (own["eval_seq_len"] == length)]
                assert images[name][down, across] == cell["accuracy"].item()
    assert needle_depth(learned(table())) is None


def test_bits_per_byte_take_the_place_of_accuracy() -> None:
    found = learned(table("position", places=(4,), lengths=(64, 128)))
    line = drawn(learning.bits_by_position(found), "linear")
    own = best(found.rows, "linear")[lambda one: (one["eval_seq_len"] == 128) & one["position"].notna()]
    assert np.asarray(line.get_xdata()).tolist() == [1, 2, 4]
    assert np.asarray(line.get_ydata()).tolist() == own["bits_per_byte"].tolist()
    assert [learning.accuracy(found), learning.accuracy_by_length(found), learning.recall_front(found)] == [None] * 3
    assert learning.bits_by_position(learned(table())) is None


def test_losses_are_of_the_first_seed_at_the_best_rate() -> None:
    line = drawn(learning.loss(learned(table())), "standard")
    losses = [5.0 / step for step in range(1, 21)]
    smooth = [sum(losses[max(0, at - 4) : at + 1]) / len(losses[max(0, at - 4) : at + 1]) for at in range(20)]
    assert np.asarray(line.get_ydata()).tolist() == pytest.approx(smooth)


def test_what_failed_is_named_and_other_settings_have_figures_of_their_own(tmp_path: Path) -> None:
    rows = table()
    failed = rows.assign(outcome=rows["outcome"].mask(rows["attention"] == "linear", "diverged"))
    found = learned(failed)
    assert found.failed == "linear (diverged)"
    assert set(found.rows["attention"]) == {"standard", "bsbr"}
    both = pd.concat([rows, rows.assign(seq_len=128, eval_seq_len=128)])
    paths = figures.draw_learned(both, curves(), tmp_path)
    assert {path.name for path in paths} >= {"accuracy-64.png", "accuracy-128.svg", "loss-64.png"}


def test_pictures_are_the_same_bytes_again_and_replace_those_before(tmp_path: Path) -> None:
    (tmp_path / "needle_depth-old.png").write_bytes(b"")
    first = {path.name: path.read_bytes() for path in figures.draw_learned(table(), curves(), tmp_path)}
    again = {path.name: path.read_bytes() for path in figures.draw_learned(table(), curves(), tmp_path)}
    assert first == again
    assert {path.name for path in tmp_path.iterdir()} == {*first}


def test_they_are_drawn_again_from_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "recall"
    folder.mkdir()
    table().to_csv(folder / "results.csv", index=False)
    curves().to_csv(folder / "curves.csv", index=False)
    assert figures.main([str(folder), "--plots", str(tmp_path / "plots")]) == 0
    assert {path.stem for path in (tmp_path / "plots" / "recall").iterdir()} == {"accuracy", "recall_front", "loss"}
    (folder / "results.csv").write_text(table().drop(columns="chance").to_csv(index=False))
    assert figures.main([str(folder), "--plots", str(tmp_path / "plots")]) == 2
    assert "column chance missing" in capsys.readouterr().err
