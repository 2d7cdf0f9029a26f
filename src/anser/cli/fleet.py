"""`anser node`: the machines that answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from cyclopts.validators import Number

from anser.cli.asking import ask
from anser.cli.common import ANYWHERE, OPTIONS, Anywhere, quoted
from anser.cli.messages import tr
from anser.cli.output import print_json, print_line, print_table, safe

__all__ = ["app"]

app = App(
    name="node",
    help="Machines that answer: any server that speaks the OpenAI API.",
    sort_key=10,
    group_parameters=OPTIONS,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What the operator says of a node; the rest is asked of it."""

    name: str | None = None
    """What to call the node; without it, its host and port."""
    model: str | None = None
    """Offer this one of its models only, or its one model under this name."""
    slots: Annotated[int | None, Parameter(validator=Number(gte=1))] = None
    """Answers at once."""
    key_file: Path | None = None
    """File on the platform's machine with the key that the server wants."""
    jurisdiction: str | None = None
    """Country whose law holds there, as two letters."""
    member: str | None = None
    """Organisation that owns it: what it serves to others raises the organisation's weight."""


_NOT_DESCRIBED = Described()


@app.command(name="add")
def add(
    url: str,
    /,
    *,
    node: Annotated[Described, Parameter(name="*")] = _NOT_DESCRIBED,
    at: Anywhere = ANYWHERE,
) -> None:
    """List a server that speaks the OpenAI API (vLLM, SGLang, llama.cpp, Ollama, ...) as a node.

    Its engine, models and slots are asked of it; options override what it says.

    Example: `anser node add http://10.0.0.7:8000 --slots 32 --jurisdiction DE`

    Parameters
    ----------
    url
        Address of the server.
    """
    key_file = None if node.key_file is None else str(node.key_file.expanduser().absolute())
    body = {
        "url": url,
        "id": node.name,
        "model": node.model,
        "slots": node.slots,
        "key_file": key_file,
        "jurisdiction": node.jurisdiction,
        "member": node.member,
    }
    added = ask(at, "POST", "/admin/v1/nodes", body=body)
    if at.json:
        print_json(added)
        return
    print_line(tr("node.added", node=safe(str(added["id"]))))
    _print_nodes([added])


@app.command(name="list")
def list_nodes(*, at: Anywhere = ANYWHERE) -> None:
    """List the nodes with their state, engine, models and slots.

    Example: `anser node list`
    """
    found = ask(at, "GET", "/admin/v1/nodes")
    if at.json:
        print_json(found)
    else:
        _print_nodes(found["nodes"])


@app.command(name="drain")
def drain(node: str, /, *, at: Anywhere = ANYWHERE) -> None:
    """Let a node finish what it runs and give it nothing new, until `anser node resume`.

    Example: `anser node drain 10.0.0.7-8000`

    Parameters
    ----------
    node
        The node's id, from `anser node list`.
    """
    drained = ask(at, "POST", f"/admin/v1/nodes/{quoted(node)}/drain", body={})
    if at.json:
        print_json(drained)
    else:
        print_line(tr("node.drained", node=safe(node)))


@app.command(name="resume")
def resume(node: str, /, *, at: Anywhere = ANYWHERE) -> None:
    """Give a drained node requests again.

    Example: `anser node resume 10.0.0.7-8000`

    Parameters
    ----------
    node
        The node's id, from `anser node list`.
    """
    resumed = ask(at, "POST", f"/admin/v1/nodes/{quoted(node)}/resume", body={})
    if at.json:
        print_json(resumed)
    else:
        print_line(tr("node.resumed", node=safe(node)))


@app.command(name="remove")
def remove(node: str, /, *, at: Anywhere = ANYWHERE) -> None:
    """Forget a node. What runs on it is cut off, so drain it first.

    Example: `anser node remove 10.0.0.7-8000`

    Parameters
    ----------
    node
        The node's id, from `anser node list`.
    """
    removed = ask(at, "DELETE", f"/admin/v1/nodes/{quoted(node)}")
    if at.json:
        print_json(removed)
    else:
        print_line(tr("node.removed", node=safe(node)))


def _print_nodes(nodes: list[dict[str, Any]]) -> None:
    columns = ("node", "state", "engine", "slots", "models", "owner", "address", "trouble")
    print_table(
        columns,
        [
            (
                node["id"],
                node["state"],
                " ".join(str(part) for part in (node["engine"], node["version"]) if part) or None,
                node["slots"],
                ", ".join(node["models"]),
                node["member"],
                node["url"],
                node["error"],
            )
            for node in nodes
        ],
    )
