"""What `evals.compare` and `evals.load` consist of: arguments in Python, the sources of classes, the run, and its results."""
