"""The board of made-up machines: two that are alike, and one that is twice as fast."""

from pathlib import Path

import pytest

from evals.errors import UsageError
from evals.results.board import board
from evals.results.frames import read_table
from tests.evals.results.test_merge import folder, measured


def test_times_are_in_units_of_each_machines_roofline(tmp_path: Path) -> None:
    slow = measured("a", lengths=(128, 512, 2048))
    fast = measured("b", "Fast 9000 (64 cores)", speed=2, lengths=(256, 512))
    folders = [folder(tmp_path / name, records) for name, records in (("a", slow), ("b", fast))]
    normalised, speedup, fraction = board(folders)
    assert normalised.rows[0] == ["", "slow-3000-2-cores-a", "fast-9000-64-cores-b"]
    assert normalised.title == "time over the roofline of standard on that machine, lower is better, at seq_len 512"
    values = {name: [cell.partition("±")[0] for cell in cells] for name, *cells in normalised.rows[1:]}
    assert list(values) == ["twice", "standard"]  # the best first
    at_512 = read_table(folders[0]).query("seq_len == 512").set_index("attention")
    for name in values:
        # 10⁶ FLOPs at 10¹¹ a second are 10 µs on the slow machine, and half on the fast one, which takes half the time.
        assert float(values[name][0]) == pytest.approx(at_512.loc[name, "latency_s"] / 1e-5, rel=1e-2)
        assert values[name][0] == values[name][1]
    assert [row[1:] for row in speedup.rows if row[0] == "standard"] == [["1.00", "1.00"]]
    assert [row[1] == row[2] for row in fraction.rows[1:]] == [True, True]


def test_machines_without_a_length_in_common_are_refused(tmp_path: Path) -> None:
    folders = [folder(tmp_path / host, measured(host, lengths=[n])) for host, n in (("a", 128), ("b", 256))]
    with pytest.raises(UsageError, match="have no seq_len in common"):
        board(folders)
    with pytest.raises(UsageError, match="at least one folder"):
        board([])
