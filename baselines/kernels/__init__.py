"""Kernels that baselines run on: adapters of other projects' kernels, and building blocks that several baselines share."""
