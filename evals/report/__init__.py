"""The HTML report: result folders as one file that needs no network.

A sweep writes the report of its own folder. The report of several folders also shows what changed from the first to the others.
"""

from evals.report.page import write

__all__ = ["write"]
