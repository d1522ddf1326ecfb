"""The harness: certifies, measures, summarises and draws attentions. It runs from a checkout."""
