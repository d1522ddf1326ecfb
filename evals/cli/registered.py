"""Attentions of other distributions, which register a folder of YAML files as an entry point.

In the pyproject.toml of the distribution:

    [project.entry-points."bsbr.attentions"]
    mine = "my_package.attentions"      # my_package/attentions/cosine.yaml, … as in conf/attention
"""

from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from evals.errors import UsageError
from evals.paths import CONF

GROUP = "bsbr.attentions"


def registered_attentions() -> dict[str, Path]:
    """The YAML file of every registered attention, by the attention's name; imports no module of the distributions.

    Raises:
        UsageError: for an entry point without such files, and for a name that another attention has.
    """
    owners = {path.stem: "this project" for path in (CONF / "attention").glob("*.yaml")}
    attentions = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        owner = entry.dist.name if entry.dist else entry.name
        for path in _files(entry, owner):
            other = owners.setdefault(path.stem, owner)
            if path.stem in attentions or other != owner:
                raise UsageError(
                    f"{path} of the distribution {owner} is an attention {path.stem}, and so is one of {other}: "
                    "uninstall one of the two, or rename its file and the key in it"
                )
            attentions[path.stem] = path
    return attentions


def register_attentions() -> None:
    """Makes the registered attentions choices of Hydra's group `attention`. Raises UsageError as `registered_attentions` does."""
    attentions = registered_attentions()
    if attentions:
        from hydra.core.config_store import ConfigStore  # slow to import
        from omegaconf import OmegaConf

        for name, path in attentions.items():
            ConfigStore.instance().store(name, OmegaConf.load(path), group="attention", provider=str(path))


def _files(entry: EntryPoint, owner: str) -> list[Path]:
    """The YAML files of an entry point. Raises UsageError if there are none."""
    top, *inner = entry.value.split(".")
    spec = PathFinder.find_spec(top)
    folders = [Path(folder, *inner) for folder in (spec and spec.submodule_search_locations) or ()]
    files = sorted(path for folder in folders for path in folder.glob("*.yaml"))
    if not files:
        raise UsageError(
            f"the distribution {owner} registers its attentions as {entry.value}, which is no package folder with YAML files as in "
            "conf/attention: correct its entry point, or uninstall it"
        )
    return files
