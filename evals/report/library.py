"""The charting library as one script: Vega, Vega-Lite and vega-embed, out of the installed package vl-convert."""

import os
from importlib import metadata
from pathlib import Path

import vl_convert

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bsbr"


def vega() -> str:
    """JavaScript of about 0.9 MB that sets window.vegaEmbed and asks for nothing else.

    Bundling takes seconds, so that the outcome is kept in the user's cache, a file a version; where that cannot be written,
    it is made anew.
    """
    path = CACHE / f"vega-{metadata.version('vl-convert-python')}.js"
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        script = str(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # its stub demands what it does not need
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(script, encoding="utf-8")
        unfinished.replace(path)
    except OSError:  # a home that is read-only, or none: slower the next time too, and no worse
        unfinished.unlink(missing_ok=True)
    return script
