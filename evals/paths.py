"""Folders that more than one module reads, in a checkout or in an installed distribution."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent

ROOT = _PACKAGE.parent
"""The folder with bsbr, baselines and evals: a checkout, or the site-packages of an environment."""

IS_CHECKOUT = (ROOT / "pyproject.toml").is_file()

# A wheel has these folders as data of evals, which pyproject.toml maps.
_DATA = ROOT if IS_CHECKOUT else _PACKAGE
CONF = _DATA / "conf"
SCHEMAS = _DATA / "schemas"

BASE = ROOT if IS_CHECKOUT else Path.cwd()
"""The folder that relative paths of the study start from, such as results/paper."""
