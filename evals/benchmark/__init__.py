"""One comparison: preflight, rounds of time slices, workloads, declared costs and the context search."""
