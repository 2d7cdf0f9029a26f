"""`anser serve`: a platform on this machine."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from cyclopts import Parameter

from anser import __version__
from anser.cli.common import AT_HOME, AtHome, run
from anser.cli.messages import tr
from anser.cli.output import safe
from anser.cli.progress import Steps, shown_progress
from anser.core.errors import AnserError

if TYPE_CHECKING:
    from anser.config import Config, Loaded
    from anser.platform import Listening
    from anser.ports import Progress

__all__ = ["curl_line", "python_lines", "serve"]

_POLL_S = 0.25


def serve(
    *,
    host: str | None = None,
    port: int | None = None,
    model: str | None = None,
    engine: bool | None = None,
    mint_key: Annotated[bool, Parameter(name="--key", show_default=False)] = True,
    at: AtHome = AT_HOME,
) -> None:
    """Start a platform here. It prints its address, a key, and how to ask it.

    The first start fetches a small default model, about 100 MB. Ctrl-C or SIGTERM
    lets running answers finish; a second one cuts them short. SIGHUP reads the
    settings and the certificate anew.

    Examples: `anser serve`, `anser serve --port 0 --data-dir /tmp/try`,
    `anser serve --model hf:org/repo/file.gguf`, `anser serve --no-engine`

    Parameters
    ----------
    host
        Address to listen on; loopback unless you say otherwise.
    port
        Port to listen on; 0 takes a free one.
    model
        Model to run here: a known name, a GGUF file's path, or hf:org/repo/file.
    engine
        Run a model in this process, or not: then only the nodes that are added answer.
    mint_key
        Make a key for this start, valid for 30 days, or make none.
    """
    given: dict[str, object] = {
        "server.host": host,
        "server.port": port,
        "engine.model": model,
        "engine.enabled": engine,
    }
    overrides: dict[str, object] = {
        path: value for path, value in given.items() if value is not None
    }
    loaded = at.load(overrides)
    loaded.check_model()
    from anser.wire.doors import serving_loop

    with ExitStack() as stack:
        teller: Teller = Events() if at.json else People(loaded)
        progress = teller.progress(stack)

        def read() -> Loaded:
            return at.load(overrides)

        work = _serve(loaded, teller, progress, mint_key=mint_key, reread=read)
        run(work, serving_loop)
    teller.stopped()


class Teller(Protocol):
    """Says what happens, to people or to programs."""

    def progress(self, stack: ExitStack) -> Progress:
        """Where a download is told."""
        ...

    def listening(self, listening: Listening) -> None:
        """All sockets are open."""
        ...

    def model(self, name: str, trouble: str | None) -> None:
        """The built-in model serves, or cannot."""
        ...

    def stopping(self) -> None:
        """A first signal has come."""
        ...

    def stopped(self) -> None:
        """All is closed."""
        ...


class Events:
    """One JSON object a line on standard output."""

    def progress(self, stack: ExitStack) -> Progress:
        """Tell the start, each tenth and the end."""
        del stack

        def tell(done: int, total: int | None) -> None:
            _emit("downloading", bytes=done, total=total)

        return Steps(tell)

    def listening(self, listening: Listening) -> None:
        """Everything that a client needs."""
        _emit(
            "listening",
            url=listening.url,
            api=f"{listening.url}/v1",
            key=listening.key,
            model=listening.model,
            anonymous=listening.anonymous,
            admin_socket=str(listening.admin_socket),
            admin_url=listening.admin_url,
            pid=os.getpid(),
            version=__version__,
        )

    def model(self, name: str, trouble: str | None) -> None:
        """`model_ready`, or `model_failed` with the reason."""
        if trouble is None:
            _emit("model_ready", model=name)
        else:
            _emit("model_failed", model=name, reason=trouble)

    def stopping(self) -> None:
        """`stopping`."""
        _emit("stopping")

    def stopped(self) -> None:
        """`stopped`."""
        _emit("stopped")


class People:
    """A few lines that one can act on."""

    def __init__(self, loaded: Loaded) -> None:
        self._data_dir = str(loaded.config.data_dir)
        usual = loaded.sources["data_dir"] == "default"
        self._at = "" if usual else f" --data-dir {shlex.quote(safe(self._data_dir))}"

    def progress(self, stack: ExitStack) -> Progress:
        """A bar on a terminal, lines elsewhere."""
        return stack.enter_context(shown_progress())

    def listening(self, listening: Listening) -> None:
        """Where it is, the key, and two snippets that can be pasted as they are."""
        _say(tr("serve.listening", version=__version__, url=listening.url))
        _say(tr("serve.page", url=listening.url))
        if listening.key is not None:
            _say(tr("serve.key", key=listening.key))
        elif listening.anonymous:
            _say(tr("serve.anonymous"))
        else:
            _say(tr("serve.no_key", at=self._at))
        _say(tr("serve.data", folder=safe(self._data_dir)))
        if listening.admin_url is not None:
            _say(tr("serve.admin", address=safe(listening.admin_url)))
        if listening.model is None:
            _say(tr("serve.no_model", at=self._at))
        else:
            _say(tr("serve.model", model=safe(listening.model)))
            _say("", tr("serve.ask_curl"), "", curl_line(listening, listening.model))
            _say("", tr("serve.ask_python"), "", *python_lines(listening, listening.model))
        _say("", tr("serve.stop"))

    def model(self, name: str, trouble: str | None) -> None:
        """That the model serves, or why it cannot."""
        if trouble is None:
            _say(tr("serve.ready", model=safe(name)))
        else:
            reason = safe(trouble)
            _say(tr("serve.failed", model=safe(name), reason=reason, at=self._at))

    def stopping(self) -> None:
        """What is waited for."""
        _say(tr("serve.stopping"))

    def stopped(self) -> None:
        """The end."""
        _say(tr("serve.stopped"))


def curl_line(listening: Listening, model: str) -> str:
    """One line for a shell that asks this platform."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}]}
    free = listening.key is None and listening.anonymous
    key = "" if free else f' -H "Authorization: Bearer {_key(listening)}"'
    return (
        f"curl {listening.url}/v1/chat/completions{key}"
        f' -H "Content-Type: application/json" -d {shlex.quote(json.dumps(body))}'
    )


def python_lines(listening: Listening, model: str) -> list[str]:
    """A program that asks this platform with the official client."""
    return [
        "from openai import OpenAI",
        f'client = OpenAI(base_url="{listening.url}/v1", api_key="{_key(listening)}")',
        "answer = client.chat.completions.create(",
        f"    model={json.dumps(model)},",
        '    messages=[{"role": "user", "content": "Hello!"}],',
        ")",
        "print(answer.choices[0].message.content)",
    ]


async def _serve(
    loaded: Loaded,
    teller: Teller,
    progress: Progress,
    *,
    mint_key: bool,
    reread: Callable[[], Loaded],
) -> None:
    from anser.cli.logs import log_to_stderr
    from anser.platform import serve as serve_platform

    log_to_stderr()
    async with asyncio.TaskGroup() as tasks:
        watches: list[asyncio.Task[None]] = []

        def announce(listening: Listening) -> None:
            teller.listening(listening)
            if listening.model is not None and loaded.config.engine.enabled:
                watch = _watch(loaded.config, listening.model, teller)
                watches.append(tasks.create_task(watch))

        await serve_platform(
            loaded,
            announce=announce,
            progress=progress,
            mint_key=mint_key,
            stopping=teller.stopping,
            reread=reread,
        )
        for watch in watches:
            watch.cancel()


async def _watch(config: Config, model: str, teller: Teller) -> None:
    """Ask the platform, as any command would, until its own model serves or has failed.

    A model that could not be fetched is tried again, so a failure may not be the last word.
    """
    from anser.cli.control import over_socket
    from anser.platform import BUILTIN

    said: str | None = None
    async with over_socket(config) as control:
        while True:
            await asyncio.sleep(_POLL_S)
            try:
                nodes = (await control.ask("GET", "/admin/v1/nodes"))["nodes"]
            except AnserError:
                continue
            node = next((node for node in nodes if node["id"] == BUILTIN), None)
            if node is None:
                continue
            if node["state"] == "up":
                teller.model(model, None)
                return
            if node["state"] == "down" and node["error"] != said:
                said = str(node["error"])
                teller.model(model, said)


def _emit(event: str, **fields: Any) -> None:
    _say(json.dumps({"event": event, **fields}))


def _say(*lines: str) -> None:
    """Print at once; a platform goes on serving when nobody reads what it says any more."""
    try:
        print(*lines, sep="\n", flush=True)
    except OSError:  # a pipe without reader, a terminal that is gone
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _key(listening: Listening) -> str:
    if listening.key is not None:
        return listening.key
    return "anonymous" if listening.anonymous else "YOUR_KEY"
