"""The harness: it certifies, measures, summarises and draws; run from a checkout."""
