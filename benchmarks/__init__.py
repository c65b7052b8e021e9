"""Benchmarks: run from the repository root as ``python -m benchmarks.NAME`` (see README.md)."""

import sortserve  # noqa: F401  before torch, which reads at its import what this sets
