"""The one frozen Config: defaults < file < environment < command line.

While a platform runs it may be read anew; only `Reread` then writes into it (config/reread.py).

Each setting has a key path (`server.port`), an environment name (`ANSER_SERVER_PORT`) and a
one-line description; `settings()` lists them and the reference is checked against it.
"""

from __future__ import annotations

from anser.config.loading import Loaded, load, split_address
from anser.config.reread import Reread
from anser.config.shown import shown, without_password
from anser.config.timeouts import Timeouts
from anser.config.values import (
    Config,
    EngineSettings,
    GatewaySettings,
    MemberSettings,
    ServerSettings,
    Setting,
    Value,
    settings,
)

__all__ = [
    "Config",
    "EngineSettings",
    "GatewaySettings",
    "Loaded",
    "MemberSettings",
    "Reread",
    "ServerSettings",
    "Setting",
    "Timeouts",
    "Value",
    "load",
    "settings",
    "shown",
    "split_address",
    "without_password",
]
