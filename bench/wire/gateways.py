"""What is measured: Anser, and its peers where they are installed.

Theory of operation. Each gateway is started as its user would, in front of the same engine at the
same addresses, alone on its core, with keep-alive on both sides and without access logs. It is
ready when it has answered a request. Anser starts in an empty data folder without an engine of its
own, is given its nodes by `anser node add`, and is asked with the key that it made: keys, limits,
fair queue, prefix index and receipts are on. Two limits of a member are raised, because all load
is one member's here.

Every process is stopped at the end, and its folder is the caller's to throw away.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.wire.programs import Gateway, Tools, WireError, start, wait_until

__all__ = ["PEERS", "Place", "anser", "peer", "program"]

_START_S = 90.0  # LiteLLM takes half of it on a slow machine
_SLOTS = 4_096
_LIMITS = {"ANSER_MEMBERS_IN_FLIGHT_MAX": "100000", "ANSER_MEMBERS_QUEUED_MAX": "100000"}
_QUESTION = {"model": "wire", "messages": [{"role": "user", "content": "@chunks=1"}]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a gateway is to run: its folder and port, and the ports of the engine."""

    program: str
    folder: Path
    port: int
    engines: list[int]

    @property
    def urls(self) -> list[str]:
        """Addresses of the engine."""
        return [f"http://127.0.0.1:{port}" for port in self.engines]

    def write(self, name: str, text: str) -> str:
        """Write one of its files; the path."""
        path = self.folder / name
        path.write_text(text)
        return str(path)


def _nginx(place: Place) -> list[str]:
    temporary = "\n".join(
        f"    {kind}_temp_path {place.folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    servers = " ".join(f"server 127.0.0.1:{port};" for port in place.engines)
    user = "user root;" if os.geteuid() == 0 else ""  # its files are below a folder of this user
    text = f"""
daemon off; worker_processes 1; worker_rlimit_nofile 65536; {user}
pid {place.folder}/pid; error_log {place.folder}/errors error;
events {{ worker_connections 32768; }}
http {{
    access_log off; keepalive_requests 100000000; client_body_buffer_size 64k;
{temporary}
    upstream engine {{ {servers} keepalive 1024; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{place.port} backlog=4096;
        location / {{
            proxy_pass http://engine; proxy_http_version 1.1; proxy_buffering off;
            proxy_set_header Connection ""; proxy_read_timeout 600s;
        }}
    }}
}}
"""
    return [place.program, "-p", str(place.folder), "-c", place.write("nginx.conf", text)]


def _haproxy(place: Place) -> list[str]:
    servers = "\n".join(f"    server e{port} 127.0.0.1:{port}" for port in place.engines)
    text = f"""
global
    nbthread 1
defaults
    mode http
    option http-keep-alive
    http-reuse always
    timeout connect 5s
    timeout client 600s
    timeout server 600s
listen wire
    bind 127.0.0.1:{place.port} backlog 4096
    balance roundrobin
{servers}
"""
    return [place.program, "-db", "-q", "-f", place.write("haproxy.cfg", text)]


def _router(place: Place, *words: str) -> list[str]:
    options = ["--host", "127.0.0.1", "--port", str(place.port), "--policy", "round_robin"]
    options += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    options += ["--max-concurrent-requests", "32768", "--log-level", "error"]
    return [place.program, *words, *options, "--worker-urls", *place.urls]


def _litellm(place: Place) -> list[str]:
    models = [
        {
            "model_name": "wire",
            "litellm_params": {"model": "openai/wire", "api_base": f"{url}/v1", "api_key": "none"},
        }
        for url in place.urls
    ]
    config = place.write("litellm.json", json.dumps({"model_list": models}))  # JSON is YAML, too
    options = ["--host", "127.0.0.1", "--port", str(place.port), "--num_workers", "1"]
    return [place.program, "--config", config, *options]


PEERS: Mapping[str, Callable[[Place], list[str]]] = {
    "nginx": _nginx,
    "haproxy": _haproxy,
    "vllm-router": _router,
    "sglang-router": lambda place: _router(place, "launch"),
    "litellm": _litellm,
}
"""How each peer is started, in the place that it is given."""

_LITELLM = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}


def program(name: str, given: Path | None) -> str | None:
    """The peer's program: the one that was given, or that of the environment that was, or on PATH.

    Raises WireError if what was given is neither.
    """
    if given is None:
        return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    found = given / "bin" / name if given.is_dir() else given
    if not os.access(found, os.X_OK) or found.is_dir():
        raise WireError(f"{given} is neither {name} nor an environment that has it.")
    return str(found.absolute())


@contextmanager
def peer(
    tools: Tools, name: str, path: str, folder: Path, engines: list[int]
) -> Generator[Gateway]:
    """A peer that runs and answers."""
    place = Place(program=path, folder=folder, port=free_port(), engines=engines)
    log, environment, key = folder / "log", dict(os.environ), ""
    if name == "litellm":  # does not start without a key
        key = f"sk-{secrets.token_hex(32)}"
        environment |= {**_LITELLM, "LITELLM_MASTER_KEY": key}
    command, core = PEERS[name](place), tools.gateway_core
    begun = time.monotonic()
    with start(command, core, environment=environment, log=log, heard=False) as process:
        wait_until(lambda: _alive(process) and asked(place.port, "/health") is not None, _START_S)
        ready_s = time.monotonic() - begun
        _answers(process, place.port, key)
        yield Gateway(pid=process.pid, port=place.port, key=key, ready_s=ready_s)


@contextmanager
def anser(tools: Tools, folder: Path, engines: list[int]) -> Generator[Gateway]:
    """A platform with these nodes, whose key is known."""
    command, port = [sys.executable, "-m", "anser"], free_port()
    serve = [*command, "serve", "--json", "--no-engine", "--port", str(port)]
    home = ["--data-dir", str(folder / "data")]
    inherited = {n: v for n, v in os.environ.items() if not n.startswith("ANSER_")}
    environment, log = {**inherited, **_LIMITS}, folder / "log"
    begun = time.monotonic()
    with start([*serve, *home], tools.gateway_core, environment=environment, log=log) as process:
        wait_until(lambda: _alive(process) and asked(port, "/health") == 200, _START_S)
        ready_s = time.monotonic() - begun
        assert process.stdout is not None
        key = json.loads(process.stdout.readline())["key"]
        for engine in engines:
            url = f"http://127.0.0.1:{engine}"
            add = [*command, "node", "add", url, "--slots", str(_SLOTS), *home]
            told = subprocess.run(add, env=environment, check=False, capture_output=True, text=True)
            if told.returncode:
                raise WireError(f"anser node add fails: {told.stderr.strip()}")
        _answers(process, port, key)
        yield Gateway(pid=process.pid, port=port, key=key, ready_s=ready_s)


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def asked(port: int, path: str, *, body: object = None, key: str = "") -> int | None:
    """The status of an answer; None if there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    headers = {"content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    method, text = ("GET", None) if body is None else ("POST", json.dumps(body))
    try:
        connection.request(method, path, text, headers)
        response = connection.getresponse()
        response.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return response.status


def _answers(process: subprocess.Popen[str], port: int, key: str) -> None:
    def one() -> bool:
        path = "/v1/chat/completions"
        return _alive(process) and asked(port, path, body=_QUESTION, key=key) == 200

    wait_until(one, _START_S)


def _alive(process: subprocess.Popen[str]) -> bool:
    if process.poll() is not None:
        raise WireError(f"it ended at once, with {process.returncode}")
    return True
