"""Conversion of pretrained Hugging Face models: BSBR replaces their self-attention. Needs the extra `convert` (transformers)."""

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError:
    raise ModuleNotFoundError("bsbr.convert needs Hugging Face transformers: pip install 'bsbr[convert]'") from None

from bsbr.convert.models import convert_to_bsbr
from bsbr.convert.retrieval import Retrieval

__all__ = ["Retrieval", "convert_to_bsbr"]
