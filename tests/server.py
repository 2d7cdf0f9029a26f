"""`anser serve` as a process of its own, for tests that look at a platform from the outside.

    with serving(tmp_path, "--no-engine") as server:
        httpx.get(f"{server.url}/health")
        server.admin("GET", "/nodes")

Whoever needs the real model asks for it with `serving_model`.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from anser.core.hub import DEFAULT_MODEL
from tests.model import model_path

__all__ = ["HAND_OVER", "Server", "give_model", "serving", "serving_model", "wait_until"]

HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""
START_S = 60.0
STOP_S = 40.0


@dataclass(slots=True, kw_only=True)
class Server:
    """A platform that serves, and its operator's hand on it."""

    process: subprocess.Popen[str]
    log: Path
    url: str = ""
    key: str = ""
    model: str = ""
    socket: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    _lines: queue.Queue[str] = field(default_factory=queue.Queue)

    @property
    def base_url(self) -> str:
        """What OpenAI's clients are given."""
        return f"{self.url}/v1"

    @property
    def port(self) -> int:
        """The public port."""
        return int(self.url.rpartition(":")[2])

    def admin(self, method: str, path: str, body: object = None) -> Any:
        """Ask the admin API over the platform's own socket."""
        return self._ask(method, f"/admin/v1{path}", body)

    def pool(self) -> Any:
        """The live state: what waits, what runs where."""
        return self._ask("GET", "/v1/pool", None)

    def receipt(self, request: str) -> dict[str, Any]:
        """The receipt of one request."""
        found: dict[str, Any] = self.admin("GET", f"/receipts/{request}")["receipt"]
        return found

    def hear(self, name: str) -> dict[str, Any]:
        """Read what the platform says until it has said `name`; fails if it ends or is silent."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {name!r} within {START_S} s: {self.complaints}") from None
            assert line, f"anser serve ended with {self.process.wait(5)}: {self.complaints}"
            event: dict[str, Any] = json.loads(line)
            self.events.append(event)
            assert event["event"] != "model_failed" or name == "model_failed", event
            if event["event"] == name:
                return event

    @property
    def complaints(self) -> str:
        """The end of what it has written to standard error."""
        return self.log.read_text()[-2_000:]

    def _ask(self, method: str, path: str, body: object) -> Any:
        transport = httpx.HTTPTransport(uds=self.socket, verify=False)
        with httpx.Client(transport=transport, base_url="http://anser", timeout=20) as client:
            response = client.request(method, path, json=body)
        assert response.is_success, response.text
        return response.json()


@contextmanager
def serving(
    data_dir: Path,
    *options: str,
    ready: str = "listening",
    environment: dict[str, str] | None = None,
    descriptors: int | None = None,
    handed: socket.socket | None = None,
) -> Iterator[Server]:
    """Start `anser serve` on a free port; yields at its event `ready`, ends it by SIGTERM.

    With `descriptors`, it may have at most so many files and sockets open; `handed` is a listening
    socket that it gets from this process as it would from systemd.
    """
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = data_dir.with_name(f"{data_dir.name}.log")
    command = [sys.executable, "-m", "anser", "serve", "--json", "--port", "0"]
    if descriptors is not None:
        command = ["sh", "-c", f'ulimit -n {descriptors}; exec "$0" "$@"', *command]
    passed = () if handed is None else (handed.fileno(),)
    if handed is not None:
        command = [sys.executable, "-c", HAND_OVER, str(handed.fileno()), *command]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [*command, "--data-dir", str(data_dir), *options],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            pass_fds=passed,
            env={**os.environ, **(environment or {})},
        ) as process,
    ):
        server = Server(process=process, log=log)
        try:
            _begin(server, ready)
            yield server
        finally:
            _stop(process)


@contextmanager
def serving_model(
    data_dir: Path,
    *options: str,
    ready: str = "model_ready",
    environment: dict[str, str] | None = None,
) -> Iterator[Server]:
    """`serving` with the real default model on the disk, loaded unless `ready` says otherwise."""
    give_model(data_dir)
    with serving(data_dir, *options, ready=ready, environment=environment) as server:
        yield server


def give_model(data_dir: Path) -> None:
    """Put the default model's file where a platform with this data folder finds it."""
    whole = data_dir / "blobs" / "sha256"
    whole.mkdir(mode=0o700, parents=True)
    data_dir.chmod(0o700)
    (whole / str(DEFAULT_MODEL.file.sha256)).symlink_to(model_path())


def wait_until(condition: Callable[[], object], *, within_s: float = 10.0) -> None:
    """Wait for `condition` to hold; fail if it does not in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.02)


def _begin(server: Server, ready: str) -> None:
    """Read the platform's lines as they come, and wait for `ready`."""
    stdout = server.process.stdout
    assert stdout is not None

    def read() -> None:
        for line in stdout:
            server._lines.put(line)
        server._lines.put("")

    threading.Thread(target=read, daemon=True).start()
    event = server.hear("listening")
    server.url, server.key = event["url"], event["key"] or ""
    server.model, server.socket = event["model"] or "", event["admin_socket"]
    if ready != "listening":
        server.hear(ready)


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
