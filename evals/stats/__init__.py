"""Statistics of measurements: pure functions of numbers, without a clock, a file or global state."""
