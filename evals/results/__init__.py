"""Results: the ledger of raw measurements, the tables computed from it, and comparisons, claims and exports of tables."""
