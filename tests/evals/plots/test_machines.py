"""Figures with a panel for each machine, of tables whose numbers are known."""

import pandas as pd
import pytest

from evals.plots.lines import line_plot
from evals.plots.machines import machine_panels, machine_sweeps
from evals.plots.style import render
from evals.results.frames import check_table
from evals.results.metrics import LATENCY, SPEEDUP
from tests.evals.sweeps import LENGTHS, data, failing, line, table, words


def merged(*names: str, decode: bool = False) -> pd.DataFrame:
    """The same table of each machine, but for times of its own; the last one ran out of memory once."""
    parts = [table().assign(machine=name, processor=f"P{number}") for number, name in enumerate(names, 1)]
    parts = [part.assign(latency_s=part["latency_s"] * number) for number, part in enumerate(parts, 1)]
    parts[-1] = failing(parts[-1], "bsbr", 8192, "oom")
    both = pd.concat(parts, ignore_index=True)
    return check_table(pd.concat([both, both.assign(workload="decode")]) if decode else both)


@pytest.mark.parametrize("count", [2, 4])
def test_each_machine_has_a_panel_with_its_own_numbers(count: int) -> None:
    names = [f"machine-{number}" for number in range(count)]
    ((suffix, members),) = machine_sweeps(merged(*names))
    picture = render(machine_panels, members, LATENCY)
    assert suffix == ""
    assert picture is not None
    panels = [axes for axes in picture.axes if axes.lines]
    assert [axes.get_title(loc="left") for axes in panels] == names
    assert len({axes.get_ylim() for axes in panels}) == 1
    for number, axes in enumerate(panels, 1):
        x, y = data(line(axes, "standard"))
        assert x == list(LENGTHS)
        assert y == pytest.approx([number * 1e-6 * n**1.1 for n in LENGTHS])
        assert [one.get_gid() for one in axes.lines].count("bsbr oom") == (number == count)
    assert "no comparison of attentions" in words(picture)
    assert "P1" not in words(picture)  # the processor is that of one panel alone
    assert "on machine-0" not in words(picture)
    assert "on machine-1" in words(render(line_plot, members[1], LATENCY))  # type: ignore[arg-type]


def test_other_settings_have_figures_of_their_own() -> None:
    found = dict(machine_sweeps(merged("a", "b", decode=True)))
    assert {suffix: len(members) for suffix, members in found.items()} == {"-decode": 2, "-prefill": 2}
    assert render(machine_panels, found["-decode"], SPEEDUP) is not None


def test_one_machine_has_no_panels() -> None:
    assert list(machine_sweeps(merged("a"))) == []
    assert list(machine_sweeps(check_table(table()))) == []
