"""The decoder: weights, layers, attention over pages, and their backends."""
