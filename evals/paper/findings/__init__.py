"""The findings of the study: sentences and tables in Markdown, every number of which is read from results/paper.

Each finding is a function of the folder of results. It raises ValueError if required data are missing, and reports optional data as
not measured yet.
"""

from collections.abc import Callable
from pathlib import Path

from evals.paper.findings import conversion, decoding, provenance, recall, speed

FINDINGS: dict[str, Callable[[Path], str]] = {
    finding.__name__: finding
    for finding in (
        *(speed.setup, speed.speed, speed.pairs, speed.exponents, speed.memory, speed.roofline, speed.disadvantages),
        *(decoding.decode, decoding.decode_all),
        *(recall.recall, recall.recall_wider, recall.recall_sizes, recall.retrieval, recall.retrieval_length),
        *(recall.extrapolation, recall.needle, recall.language),
        *(conversion.conversion, conversion.conversion_speed),
        *(provenance.uncertainty, provenance.provenance),
    )
}
"""All findings, by the name that docs/research/study.md calls them."""
