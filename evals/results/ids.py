"""Ids of comparisons, studies and runs: digests of everything that they depend on."""

import hashlib
import json
from typing import Any


def digest(value: Any) -> str:
    """16 hexadecimal digits that change whenever `value`, which has JSON's types, changes."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
