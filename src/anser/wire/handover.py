"""A listening socket that outlives the process: handed over at the start, given back at the end.

Theory of operation. Who starts a platform may open its public socket first and hand it over, as
systemd does for a `.socket` unit (sd_listen_fds(3): file descriptor 3, `LISTEN_FDS=1`, and the
process that it is meant for in `LISTEN_PID`). While a platform stops and its successor starts, the
socket stays open there, so the kernel keeps whoever connects waiting: nobody is refused. The
address is then the socket's own, whatever `server.host` and `server.port` say, and everything that
depends on the address (who is local, what is printed) goes by it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

from anser.core.errors import ConfigError

__all__ = ["SOURCE", "inherited"]

SOURCE = "LISTEN_FDS"
"""What decides where the platform listens, if a socket was handed over."""

_FIRST = 3  # SD_LISTEN_FDS_START
_NAMES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


def inherited(environ: MutableMapping[str, str]) -> socket.socket | None:
    """The socket that was handed to this process, if one was. Raises ConfigError.

    What told of it is taken out of `environ`: it is not meant for children.
    """
    meant_for, count = environ.get("LISTEN_PID"), environ.get("LISTEN_FDS")
    if count is None or meant_for != str(os.getpid()):
        return None
    for name in _NAMES:
        environ.pop(name, None)
    if count != "1":
        raise _wrong(f"{count} sockets were handed over")
    try:
        os.set_inheritable(_FIRST, False)  # noqa: FBT003 - the argument has no name
        sock = socket.socket(fileno=_FIRST)
    except OSError as error:
        raise _wrong(f"what was handed over is no socket: {error.strerror}") from error
    if not _listens(sock):
        sock.close()
        raise _wrong("what was handed over does not listen for TCP")
    return sock


def _listens(sock: socket.socket) -> bool:
    internet = sock.family in (socket.AF_INET, socket.AF_INET6)
    if not internet or sock.type != socket.SOCK_STREAM:
        return False
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _wrong(why: str) -> ConfigError:
    way = "Hand over one listening TCP socket: one ListenStream=[ADDRESS:]PORT in the socket unit."
    return ConfigError(f"{SOURCE}: {why}. {way}", param=SOURCE)
