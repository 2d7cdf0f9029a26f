"""What the operating system lets this process do: no core dumps, and as many files as it may.

A core dump would hold prompts, answers and keys, so none is ever written. Of open files, sockets
included, many systems grant only 256 or 1,024 to a process that does not ask for more.
"""

from __future__ import annotations

import resource
from contextlib import suppress

from anser.core.limits import FILES_MAX

__all__ = ["harden", "open_files_max"]


def harden() -> None:
    """Forbid core dumps to this process and its children, and take all open files that it may."""
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wish = FILES_MAX if most == resource.RLIM_INFINITY else min(most, FILES_MAX)
    if now != resource.RLIM_INFINITY and now < wish:
        with suppress(ValueError, OSError):  # macOS has a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wish, most))


def open_files_max() -> int:
    """How many files and sockets this process may have open at once."""
    now, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return FILES_MAX if now == resource.RLIM_INFINITY else now
