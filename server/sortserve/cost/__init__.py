"""How long a step takes: measured, fitted, learned. No torch."""
