"""What commands share: durations, moments, and how a failure comes out of a group of tasks."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from anser.cli.common import Home, duration_s, moment, quoted, run
from anser.core.errors import ConfigError, NotFound


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("15m", 900), ("12h", 43_200), ("30d", 2_592_000), (" 2W ", 1_209_600)],
)
def test_durations_are_a_number_and_a_unit(text: str, seconds: float) -> None:
    """s, m, h, d and w are understood."""
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "d", "-1d", "1.5h", "0s", "5x", "1d2h", "9" * 12 + "d"])
def test_what_is_no_duration_is_refused_with_examples(text: str) -> None:
    """Anything else is refused, with how to write one."""
    with pytest.raises(ValueError, match="90s, 15m, 12h, 30d or 2w"):
        duration_s(text)


def test_a_moment_is_local_time_to_the_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are shown in this machine's zone; none is shown as none."""
    import time

    monkeypatch.setenv("TZ", "UTC-2")
    time.tzset()
    try:
        assert moment(86_400.0) == "1970-01-02 02:00"
    finally:
        monkeypatch.undo()
        time.tzset()
    assert moment(None) is None


def test_a_part_of_a_path_cannot_leave_its_place() -> None:
    """Slashes, dots with slashes, and question marks in an id stay inside its part."""
    assert quoted("../a?b#c/d") == "..%2Fa%3Fb%23c%2Fd"


def test_the_expected_failure_comes_out_of_nested_groups() -> None:
    """Of a group of failures the first expected one is raised, so that its message is shown."""

    async def fail() -> None:
        async with asyncio.TaskGroup() as outer:

            async def inner() -> None:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(raising())

            outer.create_task(inner())

    async def raising() -> None:
        raise NotFound("that is missing")

    with pytest.raises(NotFound, match="that is missing"):
        run(fail())


def test_a_bug_is_not_hidden_in_a_group() -> None:
    """A failure that nobody expects stays what it is."""

    async def fail() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(raising())

    async def raising() -> None:
        raise ZeroDivisionError

    with pytest.raises(BaseExceptionGroup) as caught:
        run(fail())
    assert caught.group_contains(ZeroDivisionError)


def test_options_reach_the_settings(tmp_path: Path) -> None:
    """--data-dir and --config are where the settings are read from."""
    (tmp_path / "anser.toml").write_text("[server]\nport = 5\n")
    loaded = Home(data_dir=tmp_path).load({"server.host": "0.0.0.0"})
    assert (loaded.config.data_dir, loaded.config.server.port) == (tmp_path, 5)
    assert loaded.config.server.host == "0.0.0.0"
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        Home(config=tmp_path / "missing.toml").load()
