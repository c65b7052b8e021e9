"""Sorted Fine-Tuning: the trainer of sorted checkpoints (not written yet)."""
