"""Styles are distinguishable, also for the colour-blind and without colour, and do not change."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from evals.paths import ROOT
from evals.plots.style import SPARE_COLOURS, SPARE_MARKERS, STYLES, style_of


def test_other_names_get_distinct_styles_that_do_not_change() -> None:
    assert style_of(["mine"])["mine"] == style_of(["mine", *STYLES])["mine"]
    names = [f"variant_{number}" for number in range(len(SPARE_COLOURS))]
    chosen = style_of([*names, *STYLES])
    assert chosen == style_of([*STYLES, *reversed(names)])
    assert len({style.colour for style in chosen.values()}) == len(chosen)
    crowd = style_of(f"variant_{number}" for number in range(60))
    assert len(set(crowd.values())) == 60


def test_styles_do_not_depend_on_the_interpreter() -> None:
    command = "from evals.plots.style import style_of; print(style_of(['mine'])['mine'].colour)"
    seen = {
        subprocess.run(
            [sys.executable, "-c", command],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


def test_built_in_styles_differ_without_colour_too() -> None:
    assert len({style.marker for style in STYLES.values()}) == len(STYLES)
    assert len({(style.dashes, style.width) for style in STYLES.values()}) == len(STYLES)
    assert not {style.marker for style in STYLES.values()} & set(SPARE_MARKERS)
    assert not {style.colour for style in STYLES.values()} & set(SPARE_COLOURS)


# Machado, Oliveira & Fernandes 2009, "A Physiologically-based Model for Simulation of Color Vision Deficiency", severity 1.
VISION = {
    "normal": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227969], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def lab(colour: str, vision: str) -> NDArray[np.float64]:
    """CIE L*a*b* (D65) of an sRGB colour as that vision sees it."""
    srgb = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(VISION[vision]) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratio = to_xyz @ seen / np.array([0.9505, 1.0, 1.089])
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_built_in_colours_are_distinguishable(vision: str) -> None:
    # A difference of 2.3 is just noticeable; six times that holds for thin lines.
    for one, other in itertools.combinations(STYLES.values(), 2):
        assert np.linalg.norm(lab(one.colour, vision) - lab(other.colour, vision)) > 14, (one, other)
