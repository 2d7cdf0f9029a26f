"""Settings that are read anew while a platform runs: what of them holds from now on.

Theory of operation. A Config is frozen to all who hold it, or one of its sections, for as long as
the platform runs: they read from it whenever they need a value. So a value that changes is written
in its place, here and nowhere else, between two turns of the event loop, and holds for whoever
asks next. Which settings can change so is said where they are declared (`live`); all others keep
the value that the platform was started with, and are named, because they wait for a restart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import cast

from anser.config.loading import Loaded, check_forms
from anser.config.values import SECTIONS, Config, Value, settings

__all__ = ["Reread"]

_TLS = frozenset(("server.tls_certificate", "server.tls_key"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reread:
    """What was read anew, beside what is in force."""

    loaded: Loaded  # what would be in force
    changed: tuple[str, ...]  # key paths of what would change
    waiting: tuple[str, ...]  # of what is different, too, but needs a restart

    @classmethod
    def of(cls, now: Loaded, new: Loaded) -> Reread:
        """Compare. Raises ConfigError where what may change contradicts what may not."""
        live = _live(now.config, new.config)
        different = [
            setting.path
            for setting in settings()
            if _value(now.config, setting.path) != _value(new.config, setting.path)
        ]
        changed = tuple(path for path in different if path in live)
        sources = {path: (new if path in live else now).sources[path] for path in now.sources}
        config = _mixed(now.config, {path: _value(new.config, path) for path in changed})
        check_forms(config, sources)
        return cls(
            loaded=Loaded(config=config, sources=sources, file=new.file),
            changed=changed,
            waiting=tuple(path for path in different if path not in live),
        )

    def put_in_force(self, now: Loaded) -> None:
        """Write what has changed into `now`, in the place of what it held."""
        for path in self.changed:
            section, _, name = path.partition(".")
            _write(getattr(now.config, section), name, _value(self.loaded.config, path))
        _write(now, "sources", self.loaded.sources)
        _write(now, "file", self.loaded.file)
        assert now.config == self.loaded.config


def _live(now: Config, new: Config) -> frozenset[str]:
    """What may change without a restart; a listener never turns from HTTP to HTTPS or back."""
    live = frozenset(setting.path for setting in settings() if setting.live)
    turned = bool(now.server.tls_certificate) != bool(new.server.tls_certificate)
    return live - _TLS if turned else live


def _value(config: Config, path: str) -> Value:
    return cast("Value", reduce(getattr, path.split("."), config))


def _mixed(config: Config, values: Mapping[str, Value]) -> Config:
    """The same settings, but for these values."""
    parts = {
        section: replace(
            getattr(config, section),
            **{
                item.name: values[path]
                for item in fields(kind)
                if (path := f"{section}.{item.name}") in values
            },
        )
        for section, kind in SECTIONS.items()
    }
    return replace(config, **parts)


def _write(part: object, name: str, value: object) -> None:
    object.__setattr__(part, name, value)
