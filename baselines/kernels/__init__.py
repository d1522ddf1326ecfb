"""Kernels of the baselines: adapters to kernels of other projects, and building blocks that several baselines share."""
