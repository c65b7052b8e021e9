"""Processes that are not children of the test."""

from __future__ import annotations

import os
import select

__all__ = ["has_ended"]


def has_ended(process_id: int) -> bool:
    """Waits a minute for the end of a process, which need not be a child of this one."""
    try:
        descriptor = os.pidfd_open(process_id)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 60)[0])
    finally:
        os.close(descriptor)
