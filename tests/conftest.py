"""Settings of the whole suite."""

from __future__ import annotations

from hypothesis import settings

# Examples are searched for, not timed: a busy machine must not fail a law.
settings.register_profile("default", deadline=None)
settings.load_profile("default")
