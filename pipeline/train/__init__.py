"""Training: one loop for every method, on any number of ranks, that can be stopped and resumed to the bit."""
