"""What is learned: one task a file, each a generator of examples that is a pure function of its options and of randomness."""
