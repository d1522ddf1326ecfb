"""Another module under the name F of the cells; their names must differ for it."""

from torch.nn.functional import normalize, scaled_dot_product_attention

__all__ = ["normalize", "scaled_dot_product_attention"]
