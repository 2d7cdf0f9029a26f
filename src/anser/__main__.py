"""`anser` and `python -m anser`."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run one command and end the process with its exit code."""
    from anser.cli.app import main as run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
