"""The settings of a comparison as frozen dataclasses, and their reading from a composed Hydra config."""

from evals.config.reading import read_comparison
from evals.config.settings import DTYPES, SCOPES, Candidate, Comparison, Device, Model, Sampling, Shape, Training

__all__ = ["DTYPES", "SCOPES", "Candidate", "Comparison", "Device", "Model", "Sampling", "Shape", "Training", "read_comparison"]
