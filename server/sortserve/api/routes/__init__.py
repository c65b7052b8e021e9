"""The routes, thin: read, start, reply."""
