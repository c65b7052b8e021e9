"""sortserve: an inference server for language models in which depth is a budget."""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
