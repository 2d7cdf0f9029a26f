"""`anser config`: every setting, its value, and where that came from."""

from __future__ import annotations

from typing import Any, cast

from anser.cli.common import ANYWHERE, Anywhere, Place, run
from anser.cli.messages import tr
from anser.cli.output import print_json, print_line, print_table, safe

__all__ = ["config"]


def config(*, at: Anywhere = ANYWHERE) -> None:
    """Show every setting with its value and where it came from.

    They are those of the platform that runs on this data folder, or of another
    with --url; where none runs, those that one would start with. Settings come
    from defaults, the settings file, the environment, and the command line.

    Example: `anser config --data-dir /srv/anser`
    """
    found = run(_found(at))
    if at.json:
        print_json(found)
        return
    rows = [(row["path"], _shown(row["value"]), row["source"]) for row in found["settings"]]
    print_table(("setting", "value", "source"), rows)
    file = found["file"]
    print_line(tr("config.file", file=safe(file)) if file else tr("config.no_file"))


async def _found(at: Place) -> dict[str, Any]:
    """What the platform says; where none runs, the same without opening the data folder."""
    from anser.cli.control import connect, running
    from anser.config import shown

    if not at.url:
        loaded = at.load()
        if not await running(loaded.config):
            return shown(loaded)
    async with connect(at) as control:
        return await control.ask("GET", "/admin/v1/config")


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(part) for part in cast("list[object]", value)) or "-"
    return str(value) or "-"
