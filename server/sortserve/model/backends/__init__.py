"""Implementations of the model's operations."""
