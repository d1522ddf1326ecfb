"""Training of candidates on tasks: the run, its checkpoints, the study of all runs, and the tasks."""
