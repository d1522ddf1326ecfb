"""`python -m evals.report results/<sweep> …`: results as one HTML file that needs no network, to be looked at and handed on.

A sweep writes its own; several folders become one report that shows what changed from the first to the others.
"""

from evals.report.page import write

__all__ = ["write"]
