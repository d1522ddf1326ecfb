"""Folders of the checkout that more than one module reads."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
SCHEMAS = ROOT / "schemas"
