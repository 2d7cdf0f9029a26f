"""Settings read anew: what is taken, what waits, and that it is all or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anser.config import Loaded, Reread, load, settings
from anser.core.errors import ConfigError

LIVE = {setting.path for setting in settings() if setting.live}


def loaded(**given_: object) -> Loaded:
    """Settings with these values, by key path with two underscores for the dot."""
    overrides = {path.replace("__", "."): value for path, value in given_.items()}
    return load(file=None, environ={}, overrides={"data_dir": "/d", **overrides})


def test_a_value_is_written_where_it_is_read() -> None:
    """Who holds a section sees what has changed in it; nobody else's settings are touched."""
    now, other = loaded(), loaded()
    gateway, server = now.config.gateway, now.config.server
    new = loaded(gateway__queue_timeout_s=1, server__port=1, server__drain_s=2)
    found = Reread.of(now, new)
    assert (found.changed, found.waiting) == (
        ("server.drain_s", "gateway.queue_timeout_s"),
        ("server.port",),
    )
    assert gateway.queue_timeout_s == 120
    found.put_in_force(now)
    assert (gateway.queue_timeout_s, server.drain_s, server.port) == (1, 2, 8000)
    assert now.sources["server.drain_s"] == "command line"
    assert now.sources["server.port"] == "default"
    assert other == loaded()
    assert loaded().config.gateway.queue_timeout_s == 120


def test_nothing_new_is_nothing() -> None:
    """The same settings change nothing and wait for nothing."""
    found = Reread.of(loaded(), loaded())
    assert (found.changed, found.waiting) == ((), ())


@given(st.sets(st.sampled_from(sorted(setting.path for setting in settings()))))
def test_each_setting_is_taken_or_waits(paths: set[str]) -> None:
    """Whatever differs is named once, as its declaration says, and what is in force is that."""
    now, values = loaded(), {}
    for setting in settings():
        if setting.path in paths:
            values[setting.path] = _other(setting.path, setting.default, setting.choices)
    try:
        new = load(file=None, environ={}, overrides={"data_dir": "/d", **values})
    except ConfigError:
        return  # half a certificate
    found = Reread.of(now, new)
    assert set(found.changed) | set(found.waiting) == paths
    assert set(found.changed) <= LIVE
    found.put_in_force(now)
    again = Reread.of(now, new)
    assert (again.changed, again.waiting) == ((), found.waiting)


def _other(path: str, default: object, choices: tuple[str, ...]) -> object:
    """A value that the setting takes and does not have."""
    known = {
        "server.host": "0.0.0.0",
        "server.admin_listen": "127.0.0.1:1",
        "server.trusted_proxies": ("10.0.0.1",),
        "server.cors_origins": ("*",),
        "engine.model": "x.gguf",
        "engine.mirrors": ("https://mirror.example",),
        "members.public_share": 0.5,
        "gateway.model_timeouts": ("big gap=9",),
        "data_dir": "/other",
    }
    if path in known:
        return known[path]
    if choices:
        return choices[-1] if default != choices[-1] else choices[0]
    if isinstance(default, bool):
        return not default
    if isinstance(default, str):
        return "/file.pem"
    assert isinstance(default, (int, float))
    return default + 1


def test_tls_is_turned_by_a_restart_alone() -> None:
    """Another pair is taken up; a first one, or none any more, waits."""
    on = {"server__tls_certificate": "/a.pem", "server__tls_key": "/a.key"}
    other = {"server__tls_certificate": "/b.pem", "server__tls_key": "/b.key"}
    both = ("server.tls_certificate", "server.tls_key")
    assert Reread.of(loaded(**on), loaded(**other)).changed == both
    for now, new in ((loaded(**on), loaded()), (loaded(), loaded(**on))):
        found = Reread.of(now, new)
        assert (found.changed, found.waiting) == ((), both)


def test_a_file_that_comes_and_goes_is_known(tmp_path: Path) -> None:
    """Where a value comes from follows the file that was read."""
    file = tmp_path / "anser.toml"
    file.write_text("[server]\ndrain_s = 1\n")
    now = loaded()
    new = load(file=file, environ={}, overrides={"data_dir": "/d"})
    Reread.of(now, new).put_in_force(now)
    assert (now.file, now.sources["server.drain_s"]) == (file, str(file))
    Reread.of(now, loaded()).put_in_force(now)
    assert (now.file, now.sources["server.drain_s"]) == (None, "default")


@pytest.mark.parametrize("path", sorted(LIVE))
def test_sections_alone_hold_what_is_live(path: str) -> None:
    """What can change is in a section: whoever holds one reads it there."""
    assert path.count(".") == 1
