"""The study: its recipe, its figures with captions, and the findings of its page.

`python -m evals.figures paper` draws it from results/paper; `python -m evals.paper` measures it first.
"""
