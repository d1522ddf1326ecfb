"""Figures of results tables: one file a kind of figure, drawn with seaborn and matplotlib; `registry` knows which a table has."""
