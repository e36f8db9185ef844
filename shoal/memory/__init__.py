"""Less memory for the same result: activations that are computed again instead of kept."""
