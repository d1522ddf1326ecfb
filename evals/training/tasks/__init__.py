"""Tasks that are learned from generated examples or text, one file a task; `base` is their contract."""
