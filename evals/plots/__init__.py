"""Figures of results tables: one file per kind of figure, and a `registry` of the figures of each kind of table."""
