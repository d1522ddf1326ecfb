"""The HTML report: result folders as one file that needs no network.

A sweep writes the report of its folder. A report of several folders also lists the changes from the first to the others.
"""

from evals.report.page import write

__all__ = ["write"]
