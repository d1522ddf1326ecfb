"""The study: what it is measured by, its figures with their captions, and what its page says of them.

`python -m evals.figures paper` draws it from results/paper; `python -m evals.paper` measures it first.
"""
