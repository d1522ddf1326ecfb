"""The charting library as one script: Vega, Vega-Lite and vega-embed, from the installed package vl-convert."""

import contextlib
import os
from importlib import metadata
from pathlib import Path

import vl_convert


def vega() -> str:
    """JavaScript of about 0.9 MB that sets window.vegaEmbed and loads nothing else.

    Bundling takes seconds, so the script is cached in the user's cache folder, if there is one, one file per version.
    """
    caches = (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache"))  # noqa: PTH111  Path raises without a home
    cache = next((cache for cache in caches if Path(cache).is_absolute()), os.devnull)
    path = Path(cache) / "bsbr" / f"vega-{metadata.version('vl-convert-python')}.js"
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        script = str(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # the stub requires an argument that is optional
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(script, encoding="utf-8")
        unfinished.replace(path)
    except OSError:  # no cache folder can be written: the next report bundles again
        with contextlib.suppress(OSError):
            unfinished.unlink()
    return script
