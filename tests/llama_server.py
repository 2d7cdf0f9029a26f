"""llama.cpp's own HTTP server with the real model, in a process of its own.

Run as a module it serves on a loopback port and prints its URL; `llama_server` starts that.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.model import model_path

__all__ = ["LlamaServer", "llama_server"]

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class LlamaServer:
    """A running server."""

    url: str
    process: asyncio.subprocess.Process

    def kill(self) -> None:
        """End it as a crash would."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)


@asynccontextmanager
async def llama_server(
    *, alias: str, slots: int = 2, context_tokens: int = 1_024
) -> AsyncGenerator[LlamaServer]:
    """Serve the model as `alias`, with so many tokens for each slot, while the context is open."""
    arguments = [str(model_path()), alias, str(slots), str(context_tokens)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.llama_server", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=_ROOT,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(90):
            line = b""
            while not line.startswith(b"serving http"):
                line = await process.stdout.readline()
                assert line, "llama.cpp ended before it served"
        yield LlamaServer(line.split()[1].decode(), process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _serve(path: str, alias: str, slots: int, context_tokens: int) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.model_alias = {alias}
    parameters.n_parallel = slots
    parameters.n_ctx = slots * context_tokens
    parameters.n_batch = parameters.n_ubatch = 128
    parameters.cpuparams.n_threads = 1
    parameters.cpuparams_batch.n_threads = 2
    parameters.embedding = True
    parameters.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    server = xllamacpp.Server(parameters)
    print("serving", server.listening_address, flush=True)
    sys.stdin.read()  # until whoever started it has gone


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
