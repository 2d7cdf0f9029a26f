"""llama.cpp inside this process, as xllamacpp offers it: blocking calls, bytes in, chunks to a
callback.

The library is loaded late, after its threads have been told not to spin while they wait: spinning
threads of an idle model take the machine from everybody else, and on a busy machine they take it
from each other. It insists on an HTTP listener of its own. That is given a socket in a private
folder, which is removed at once, so nothing can ever connect to it.
"""

from __future__ import annotations

import importlib
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anser.core.errors import EngineBroken
from anser.core.limits import PROMPT_CACHE_MIB
from anser.ports import Route

__all__ = ["Callback", "Native", "Plan", "library_version", "usable_cores"]

Callback = Callable[[bytes], bool]
"""Gets each chunk, on the calling thread; True aborts the answer."""

_SILENT = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a model is to be loaded. `context_tokens` is per slot.

    One thread fewer decodes than computes prompts: decoding waits for memory and at each token
    for its slowest thread, which on a shared machine is the one that is not running.
    """

    slots: int
    context_tokens: int
    batch_tokens: int
    threads: int  # 0: by the machine's cores
    embeds: bool = False

    @property
    def decode_threads(self) -> int:
        """Threads that compute a single token."""
        return self.threads or max(1, usable_cores() - 1)

    @property
    def batch_threads(self) -> int:
        """Threads that compute many tokens at once."""
        return self.threads or usable_cores()


class Native:
    """A loaded model. Its calls block; each may be made from any thread."""

    def __init__(self, server: Any) -> None:
        self._server: Any = server

    def __repr__(self) -> str:
        return f"<Native {'open' if self._server is not None else 'closed'}>"

    @classmethod
    def load(cls, path: Path, model_id: str, plan: Plan) -> Native:
        """Load the model at `path`, to be called `model_id`. Blocks. Raises EngineBroken."""
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ.setdefault("GOMP_SPINCOUNT", "0")
        try:
            library = importlib.import_module("xllamacpp")
        except ImportError as error:
            raise EngineBroken(f"llama.cpp is not usable on this machine: {error}.") from error
        folder = tempfile.mkdtemp(prefix="anser-")
        try:
            parameters = _parameters(library, path, model_id, plan)
            parameters.hostnames = [f"{folder}/.sock"]
            native = cls(library.Server(parameters))
            native._wait_for_loop(embeds=plan.embeds)
            return native
        except RuntimeError as error:
            raise EngineBroken(
                f"llama.cpp could not load {path.name}: it may not know the model's architecture, "
                "or there is too little memory."
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _wait_for_loop(self, *, embeds: bool) -> None:
        """Return when the library's own loop runs, which is when it has answered something.

        Closed before that, it would miss that it shall end, and its destructor would wait for it
        for ever, with the interpreter's lock in its hands.
        """
        if embeds:
            self.embed(b'{"input":"a"}')
        else:
            self.generate(Route.COMPLETIONS, b'{"prompt":"a","max_tokens":1}', lambda _: False)

    def generate(self, route: Route, body: bytes, callback: Callback) -> None:
        """Answer `body`; returns when the answer has ended or was aborted.

        Raises ValueError or RuntimeError if the library finds the body at fault.
        """
        if route is Route.CHAT:
            self._server.handle_chat_completions(body, callback)
        else:
            self._server.handle_completions(body, callback)

    def embed(self, body: bytes) -> bytes:
        """The embeddings of one input, or an error, as JSON."""
        answer: bytes = self._server.handle_embeddings(body)
        return answer

    def close(self) -> None:
        """Unload the model; nothing may be running. Idempotent."""
        self._server = None


def _parameters(library: Any, path: Path, model_id: str, plan: Plan) -> Any:
    parameters = library.CommonParams()
    parameters.model.path = str(path)
    parameters.model_alias = {model_id}  # or each chunk would name the path
    parameters.n_parallel = plan.slots
    parameters.n_ctx = plan.slots * plan.context_tokens  # the slots share it evenly
    parameters.n_batch = parameters.n_ubatch = plan.batch_tokens
    parameters.cpuparams.n_threads = plan.decode_threads
    parameters.cpuparams_batch.n_threads = plan.batch_threads
    # A slot keeps its last prompt only, and the next request may be another member's.
    parameters.cache_ram_mib = 0 if plan.embeds else PROMPT_CACHE_MIB
    parameters.fit_params = False  # it would try other sizes than those asked for
    parameters.warmup = False
    parameters.offline = True
    parameters.verbosity = _SILENT
    parameters.api_keys = [secrets.token_hex(32)]
    parameters.ui = parameters.endpoint_slots = False
    parameters.n_threads_http = 1
    if plan.embeds:
        parameters.embedding = True
        parameters.pooling_type = library.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    return parameters


def library_version() -> str:
    """The version of xllamacpp, and so of llama.cpp."""
    return version("xllamacpp")


def usable_cores() -> int:
    """The cores that this process may use, by affinity and by the container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return int(cores)
