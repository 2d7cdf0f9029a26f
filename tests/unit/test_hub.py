"""core.hub: what a person may write for a model."""

from __future__ import annotations

import pytest

from anser.core.errors import ModelNotFound, RequestError
from anser.core.hub import (
    DEFAULT_MODEL,
    KNOWN_MODELS,
    is_sha256,
    read_spec,
    split_repository,
)


def test_a_known_name_is_a_pinned_model() -> None:
    """A model with a name has a digest and a size: nothing about it is taken on trust."""
    assert read_spec("smollm2-135m-instruct") is DEFAULT_MODEL
    for model in KNOWN_MODELS:
        assert is_sha256(model.file.sha256 or "")
        assert model.file.size_bytes
        assert model.licence


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/models/Tiny Llama (Q4).gguf", "tiny-llama-q4"),
        ("./a.GGUF", "a"),
        ("model.gguf", "model"),
        ("C:\\models\\Qwen3-0.6B.Q8_0.gguf", "qwen3-0.6b.q8_0"),
        ("/models/.gguf", "gguf"),
        ("/models/---.gguf", "model"),
        ("/models/模型.gguf", "model"),
        ("/models/" + "x" * 300 + ".gguf", "x" * 96),
    ],
)
def test_a_path_is_a_model_named_after_its_file(path: str, name: str) -> None:
    """A file on this machine needs no digest; its name becomes one that fits into a URL."""
    model = read_spec(path)
    assert (model.file.path, model.id, model.file.sha256) == (path, name, None)


def test_a_file_of_hugging_face_is_found_there() -> None:
    """hf:org/repo/file names where the file is; its digest is asked for later."""
    model = read_spec("hf:Qwen/Qwen3-0.6B-GGUF/sub/Qwen3-0.6B-Q8_0.gguf")
    assert model.id == "qwen3-0.6b-q8_0"
    assert model.base == "Qwen/Qwen3-0.6B-GGUF"
    assert model.file.hugging_face == "Qwen/Qwen3-0.6B-GGUF/sub/Qwen3-0.6B-Q8_0.gguf"
    assert model.file.sha256 is None


@pytest.mark.parametrize(
    "spec",
    [
        "hf:a/b",
        "hf:a/b/model.safetensors",
        "hf:a/b/../c.gguf",
        "hf:../b/c.gguf",
        "hf:a//c.gguf",
        "hf:/a/b/c.gguf",
        "hf:a/b/c d.gguf",
        "hf:a/b/c?d.gguf",
        "hf:a/b/%2e%2e/c.gguf",
        "hf:a/b/.hidden.gguf",
        "hf:a/b/c..gguf",
        "hf:" + "/".join("abcdefghijklmnopqr") + "/x.gguf",
        "hf:http://127.0.0.1/b/c.gguf",
    ],
)
def test_what_could_lead_elsewhere_is_refused(spec: str) -> None:
    """Only org/repo/file of plain parts is ever put into a URL."""
    with pytest.raises(RequestError):
        read_spec(spec)


@pytest.mark.parametrize("spec", ["", "gpt-4", "smollm2", "HF:a"])
def test_an_unknown_name_names_the_known_ones(spec: str) -> None:
    """Somebody who mistypes is told what there is."""
    with pytest.raises(ModelNotFound, match="smollm2-135m-instruct"):
        read_spec(spec)


def test_a_repository_is_split_from_its_file() -> None:
    """The first two parts are the repository."""
    assert split_repository("a/b/c/d.gguf") == ("a/b", "c/d.gguf")


@pytest.mark.parametrize("text", ["", "A" * 64, "a" * 63, "a" * 65, "g" * 64, "a" * 64 + "\n"])
def test_a_digest_is_64_hex_digits(text: str) -> None:
    """Anything else could name a path."""
    assert not is_sha256(text)
    assert is_sha256("0123456789abcdef" * 4)
