"""`anser top`: the pool, live."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from anser.cli.asking import ask
from anser.cli.common import ANYWHERE, Anywhere, run
from anser.cli.messages import tr
from anser.cli.output import console, print_json, safe
from anser.core.errors import Unavailable

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["top"]


def top(
    *,
    once: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    interval: Annotated[float, Parameter(validator=Number(gte=0.2, lte=3_600))] = 1.0,
    at: Anywhere = ANYWHERE,
) -> None:
    """Watch the pool: the queue, the leases, the nodes and the pace. Ctrl-C ends it.

    Example: `anser top --interval 2`

    Parameters
    ----------
    once
        Show the present moment and end; so it does where the output is no terminal.
    interval
        Seconds between two looks.
    """
    from anser.cli.control import running

    if not at.url and not run(running(at.load().config)):
        raise Unavailable(tr("top.none"))
    if at.json:
        print_json(ask(at, "GET", "/v1/pool"))
    elif once or not sys.stdout.isatty() or console().is_dumb_terminal:
        console().print(_view(ask(at, "GET", "/v1/pool")))
    else:
        run(_watch(at, interval))


async def _watch(at: Anywhere, interval_s: float) -> None:
    from rich.live import Live

    from anser.cli.control import connect

    async with connect(at) as control:
        with Live(console=console(), auto_refresh=False, screen=True) as live:
            while True:
                live.update(_view(await control.ask("GET", "/v1/pool")), refresh=True)
                await asyncio.sleep(interval_s)


def _view(pool: dict[str, Any]) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = tr(
        "top.head",
        queued=pool["queued"],
        running=pool["running"],
        pace=f"{pool['tokens_per_s']:,.1f}",
        state=tr("top.draining" if pool["draining"] else "top.open"),
    )
    table = Table("node", "state", "engine", "leases", "models", box=None, pad_edge=False)
    for node in pool["nodes"]:
        slots = "?" if node["slots"] is None else node["slots"]
        cells = (
            node["id"],
            node["state"],
            node["engine"] or "-",
            f"{node['busy']}/{slots}",
            ", ".join(node["models"]),
        )
        table.add_row(*(Text(safe(str(cell))) for cell in cells))
    return Group(Text(head), Text(""), table)
