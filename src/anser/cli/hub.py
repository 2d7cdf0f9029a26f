"""`anser models`: what can be asked."""

from __future__ import annotations

from anser.cli.asking import ask
from anser.cli.common import ANYWHERE, Anywhere
from anser.cli.messages import tr
from anser.cli.output import print_json, print_line, print_table

__all__ = ["models"]


def models(*, at: Anywhere = ANYWHERE) -> None:
    """List the models that this platform's nodes offer.

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
        (model["id"], model.get("owned_by"), model.get("context_length")) for model in found["data"]
    ]
    print_table(("model", "from", "context"), rows)
