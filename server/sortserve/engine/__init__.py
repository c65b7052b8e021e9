"""Schedule, execute, commit: what turns requests into tokens."""
