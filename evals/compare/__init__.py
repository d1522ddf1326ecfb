"""`evals.compare(…)`, the function for notebooks and scripts, and the command `python -m evals.compare`, in `__main__`."""
