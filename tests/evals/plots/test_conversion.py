"""Figures of conversions draw the rows of the tables."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evals.plots.conversion import agreement, perplexity
from evals.plots.registry import draw_folder
from tests.evals.sweeps import data


def tables(overlaps: tuple[int, ...] = (2,)) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two models, two seeds each."""
    rows, positions = [], []
    for overlap in overlaps:
        for model in ("gpt2", "llama"):
            for seed in (0, 1):
                for stage, value, closed in (
                    ("original", 4.0, 1.0),
                    ("converted", 6.0, 0.0),
                    ("distilled", 4.5 + seed / 10, 0.75 + seed / 50),
                ):
                    key = {"model": model, "seed": seed, "stage": stage, "chunk_size": 4, "chunk_overlap": overlap}
                    top = {"top_1": 0.5 + seed / 10, "top_5": 0.8, "top_10": 0.9}
                    rows.append({**key, "context": 8, "perplexity": value, "gap_closed": closed, **top})
                    positions += [{**key, "position": place, "perplexity": value + place} for place in (0, 4)]
    return pd.DataFrame(rows), pd.DataFrame(positions)


def test_a_line_is_the_mean_over_seeds() -> None:
    picture = perplexity(*tables())
    lines = {str(line.get_gid()): data(line) for axes in picture.axes for line in axes.lines if line.get_gid()}
    assert lines["gpt2-distilled"] == ([0, 4], [pytest.approx(4.55), pytest.approx(8.55)])
    assert lines["llama-original"] == ([0, 4], [4, 8])
    # Half of Student's interval of two values d apart is 12.706 · d / 2.
    assert "gpt2 76% ± 13%, llama 76% ± 13%" in picture.texts[1].get_text()


def test_agreement_shows_every_seed() -> None:
    axes = agreement(*tables()).axes[0]
    points = np.concatenate([np.asarray(found.get_offsets()) for found in axes.collections])
    top_1 = points[np.abs(points[:, 0] - 0.2) < 0.1, 1]  # right of the first tick: after distilling
    assert sorted(top_1) == [0.5, 0.6]


def test_a_folder_of_conversions_is_drawn(tmp_path: Path) -> None:
    for name, table in zip(("results", "positions"), tables((0, 2)), strict=True):
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    drawn = {path.name for path in draw_folder(tmp_path, tmp_path / "plots")}
    assert drawn == {
        f"{name}-overlap-{overlap}.{form}" for name in ("perplexity", "agreement") for overlap in (0, 2) for form in ("png", "svg")
    }
    tables()[0].drop(columns="stage").to_csv(tmp_path / "results.csv", index=False)
    with pytest.raises(ValueError, match="stage"):
        draw_folder(tmp_path, tmp_path / "plots")
