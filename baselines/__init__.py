"""Attentions that BSBR is compared with, one variant per file: a function, its slow reference, and its module."""
