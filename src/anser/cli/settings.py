"""`anser config`: every setting, its value, and where that came from."""

from __future__ import annotations

from functools import reduce
from typing import Any, cast

from anser.cli.asking import ask
from anser.cli.common import ANYWHERE, Anywhere
from anser.cli.messages import tr
from anser.cli.output import print_json, print_line, print_table, safe

__all__ = ["config"]


def config(*, at: Anywhere = ANYWHERE) -> None:
    """Show every setting with its value and where it came from; with --url, another platform's.

    Settings come from defaults, then the settings file, the environment, and the command line.

    Example: `anser config --data-dir /srv/anser`
    """
    found = ask(at, "GET", "/admin/v1/config") if at.url else _here(at)
    if at.json:
        print_json(found)
        return
    rows = [
        (row["path"], _shown(row["value"]), row.get("source", tr("config.remote")))
        for row in found["settings"]
    ]
    print_table(("setting", "value", "source"), rows)
    if not at.url:
        file = found["file"]
        print_line(tr("config.file", file=safe(file)) if file else tr("config.no_file"))


def _here(at: Anywhere) -> dict[str, Any]:
    from anser.config import settings

    loaded = at.load()
    rows: list[dict[str, object]] = [
        {
            "path": setting.path,
            "value": reduce(getattr, setting.path.split("."), loaded.config),
            "default": setting.default,
            "source": loaded.sources[setting.path],
            "environment": setting.environment,
            "meaning": setting.doc,
        }
        for setting in settings()
    ]
    rows[0]["value"] = str(loaded.config.data_dir)
    return {"file": None if loaded.file is None else str(loaded.file), "settings": rows}


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(part) for part in cast("list[object]", value)) or "-"
    return str(value) or "-"
