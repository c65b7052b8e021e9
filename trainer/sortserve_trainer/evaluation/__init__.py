"""``sortserve eval``: how good each exit of a model is, on held-out files (docs/evaluation.md)."""
