"""``python -m sortserve``."""

from __future__ import annotations

import sys

from sortserve.cli import main

if __name__ == "__main__":
    sys.exit(main())
