"""standard, sliding_window, sparse and hopfield against the slow truths, by hand, in pieces, and in memory."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile

from baselines.hopfield import HopfieldAttention, hopfield_attention, hopfield_attention_reference
from baselines.sliding_window import SlidingWindowAttention, sliding_window_attention, sliding_window_attention_reference
from baselines.sparse import SparseAttention, attention_part, attention_part_backward, sparse_attention, sparse_attention_reference
from baselines.standard import StandardAttention, softmax_attention, softmax_attention_reference
from bsbr.interface import MultiHeadAttention
