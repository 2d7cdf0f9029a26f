"""`anser models`: what can be asked."""

from __future__ import annotations

from anser.cli.asking import ask
from anser.cli.common import ANYWHERE, Anywhere
from anser.cli.messages import tr
from anser.cli.output import print_json, print_line, print_table

__all__ = ["models"]


def models(*, at: Anywhere = ANYWHERE) -> None:
    """List the models of this platform, and whether a node can answer now.

    Example: `anser models`
    """
    found = ask(at, "GET", "/v1/models")
    if at.json:
        print_json(found)
        return
    if not found["data"]:
        print_line(tr("chat.no_model"))
        return
    rows = [
        (
            model["id"],
            model.get("context_length"),
            model.get("nodes"),
            ", ".join(model.get("engines", ())) or None,
            tr("models.ready" if model.get("ready") else "models.not_ready"),
        )
        for model in found["data"]
    ]
    print_table(("model", "context", "nodes", "engine", "state"), rows)
