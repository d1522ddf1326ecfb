"""TODO: what lives here."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def digest(value: Any) -> str:
    """16 hexadecimal digits that change when `value` (of JSON's types) does."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
