"""Speed only: the same computations, but faster. Results may differ by rounding; a GPU draws other random numbers."""
