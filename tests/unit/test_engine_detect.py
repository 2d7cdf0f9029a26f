"""What engines say of themselves, in the shapes that they really have, and what is made of it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from anser.adapters.engine_detect import inspect
from anser.core.errors import EngineBroken
from anser.core.fleet import Ability, EngineKind, EngineReport
from anser.core.limits import MODEL_NAME_CHARS_MAX, NODE_MODELS_MAX

pytestmark = pytest.mark.anyio


async def found(
    listed: object,
    told: Mapping[str, object] | None = None,
    known: EngineKind | None = None,
    named: str | None = None,
) -> tuple[EngineReport, list[str]]:
    """The report of an engine that tells this, and the paths that it was asked on."""
    asked: list[str] = []

    async def ask(path: str) -> object:
        asked.append(path)
        return (told or {}).get(path)

    return await inspect(listed, ask, known, named=named), asked


def models(*ids: str, **fields: object) -> dict[str, object]:
    return {"object": "list", "data": [{"id": id_, "object": "model", **fields} for id_ in ids]}


async def test_the_named_model_is_kept_of_a_list_that_is_cut() -> None:
    """However long the list, the one model that is wanted is not cut off; the length is told."""
    listed = models(*(f"m{number}" for number in range(2_000)))
    report, _ = await found(listed)
    assert (len(report.models), report.listed) == (NODE_MODELS_MAX, 2_000)
    report, _ = await found(listed, named="m1999")
    assert [model.name for model in report.models] == ["m1999"]


async def test_without_a_list_the_operators_word_is_taken() -> None:
    """A server that keeps no list of models serves what its operator names; an empty list tells."""
    report, _ = await found(None, named="mine")
    assert [model.name for model in report.models] == ["mine"]
    assert (await found(models(), named="mine"))[0].models == ()
    with pytest.raises(EngineBroken):
        await found(None)


async def test_vllm() -> None:
    """vLLM: owned_by and max_model_len in the list, its version; slots are not told."""
    listed = models("qwen", owned_by="vllm", max_model_len=32_768, root="qwen", permission=[])
    report, asked = await found(listed, {"/version": {"version": "0.9.1"}})
    assert (report.kind, report.version, report.slots) == (EngineKind.VLLM, "0.9.1", None)
    assert [(m.name, m.context_tokens, m.ability) for m in report.models] == [
        ("qwen", 32_768, Ability.BOTH)
    ]
    assert asked == ["/version", "/metrics"]
    assert report.cache_tokens is None


def metrics(**labels: object) -> str:
    told = ",".join(f'{name}="{value}"' for name, value in labels.items())
    return (
        "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0.0\n"
        f"# TYPE vllm:cache_config_info gauge\nvllm:cache_config_info{{{told}}} 1.0\n"
    )


@pytest.mark.parametrize(
    ("told", "tokens"),
    [
        (metrics(block_size=16, cache_dtype="auto", num_gpu_blocks=9_271), 16 * 9_271),
        (metrics(block_size=16, num_gpu_blocks=10) + metrics(block_size=16, num_gpu_blocks=5), 240),
        (metrics(block_size=16, num_gpu_blocks=10, enable_prefix_caching=False), 0),
        (metrics(block_size=16, num_gpu_blocks=None), None),  # before 0.8.5 it did not know
        (metrics(block_size="²", num_gpu_blocks=10), None),
        (metrics(block_size="9" * 5_000, num_gpu_blocks=1), None),
        (metrics(block_size="9" * 500, num_gpu_blocks="9" * 500), 2**40),
        ("vllm:cache_config_info{", None),
        ({"detail": "Not Found"}, None),
    ],
)
async def test_vllm_tells_its_cache_in_its_metrics(told: object, tokens: int | None) -> None:
    """Blocks times their size, of all its processes; nothing where it keeps none or says none."""
    listed = models("qwen", owned_by="vllm")
    report, _ = await found(listed, {"/metrics": told})
    assert report.cache_tokens == tokens


async def test_sglang() -> None:
    """SGLang: slots from the server's info, the effective ones first; embeddings where told."""
    listed = models("qwen", owned_by="sglang", max_model_len=8_192)
    info = {"version": "0.5.3", "max_running_requests": 48, "internal_states": [{}]}
    model = {"model_path": "qwen", "is_generation": True}
    report, _ = await found(listed, {"/get_server_info": info, "/get_model_info": model})
    assert (report.kind, report.version, report.slots) == (EngineKind.SGLANG, "0.5.3", 48)
    assert report.models[0].ability is Ability.CHAT
    effective = {"internal_states": [{"effective_max_running_requests_per_dp": 16}]}
    model = {"is_generation": False}
    report, _ = await found(listed, {"/server_info": effective, "/get_model_info": model})
    assert (report.slots, report.models[0].ability) == (16, Ability.EMBEDDINGS)
    report, _ = await found(listed, {"/server_info": effective})
    assert report.models[0].ability is Ability.BOTH
    info = {"max_total_num_tokens": 161_721, "disable_radix_cache": False}
    report, _ = await found(listed, {"/server_info": info})
    assert report.cache_tokens == 161_721
    report, _ = await found(listed, {"/server_info": {**info, "disable_radix_cache": True}})
    assert report.cache_tokens == 0


async def test_llamacpp() -> None:
    """llama.cpp: slots and the context of a slot from /props."""
    listed = models("/m/x.gguf", owned_by="llamacpp", meta={"n_ctx": 512, "n_ctx_train": 8_192})
    props = {"total_slots": 4, "default_generation_settings": {"n_ctx": 2_048}}
    report, _ = await found(listed, {"/props": {**props, "build_info": "b6000-abc"}})
    assert (report.kind, report.version, report.slots) == (EngineKind.LLAMACPP, "b6000-abc", 4)
    assert report.models[0].context_tokens == 2_048
    report, _ = await found(listed, {"/props": {"total_slots": 1}})
    assert report.models[0].context_tokens == 512
    report, _ = await found(listed)  # where /props needs another key
    assert (report.kind, report.slots) == (EngineKind.LLAMACPP, None)


async def test_ollama() -> None:
    """Ollama: found by its version; context of loaded models only; embedding models flagged."""
    listed = models("llama3:8b", "nomic:v1", "mxbai:l", owned_by="library")
    tags = [
        {"name": "llama3:8b", "details": {"family": "llama"}},
        {"name": "nomic:v1", "details": {"family": "nomic-bert"}},
        {"name": "mxbai:l", "details": {"family": "x"}, "capabilities": ["embedding"]},
    ]
    told = {
        "/api/version": {"version": "0.12.0"},
        "/api/tags": {"models": tags},
        "/api/ps": {"models": [{"name": "llama3:8b", "context_length": 4_096}]},
    }
    for owner in ("library", "somebody"):
        listed = models("llama3:8b", "nomic:v1", "mxbai:l", owned_by=owner)
        report, _ = await found(listed, told)
        assert (report.kind, report.version, report.slots) == (EngineKind.OLLAMA, "0.12.0", None)
        assert [m.context_tokens for m in report.models] == [4_096, None, None]
        assert [m.ability for m in report.models] == [
            Ability.BOTH,
            Ability.EMBEDDINGS,
            Ability.EMBEDDINGS,
        ]


async def test_tgi() -> None:
    """TGI: found by its info, also where it has no list of models."""
    info = {
        "model_id": "org/model",
        "max_concurrent_requests": 128,
        "max_total_tokens": 4_096,
        "version": "3.0.0",
    }
    for listed in (models("org/model", owned_by="org/model"), None, {}):
        report, _ = await found(listed, {"/info": info})
        assert (report.kind, report.version, report.slots) == (EngineKind.TGI, "3.0.0", None)
        assert [(m.name, m.context_tokens) for m in report.models] == [("org/model", 4_096)]


@pytest.mark.parametrize(
    ("owner", "kind"), [("lmdeploy", EngineKind.LMDEPLOY), ("MindIE Server", EngineKind.MINDIE)]
)
async def test_engines_that_are_known_by_their_name_alone(owner: str, kind: EngineKind) -> None:
    """LMDeploy and MindIE say who they are in the list, and nothing else that is needed."""
    report, asked = await found(models("m", owned_by=owner))
    assert (report.kind, asked) == (kind, [])


async def test_anything_else_is_openai() -> None:
    """Other services: their context under the names that they use, embeddings where they say so."""
    listed = {
        "data": [
            {"id": "a", "context_length": 128_000, "owned_by": "system"},
            {"id": "b", "context_window": 8_192, "type": "embedding"},
            {"id": "c", "capabilities": ["completion", "embedding"]},
            {"id": "d", "max_context_length": 1_000, "capabilities": {"chat": True}},
            {"id": "text-embedding-3-small"},
            {"id": "e", "capabilities": ["chat"]},
        ]
    }
    report, asked = await found(listed)
    assert report.kind is EngineKind.OPENAI
    assert [m.context_tokens for m in report.models] == [128_000, 8_192, None, 1_000, None, None]
    assert [m.ability for m in report.models] == [
        *(Ability.BOTH, Ability.EMBEDDINGS, Ability.BOTH, Ability.BOTH, Ability.BOTH),
        Ability.CHAT,
    ]
    assert asked == ["/api/version", "/info", "/props"]


async def test_what_is_known_is_not_searched_again() -> None:
    """A node is asked every few seconds: only what its own kind answers."""
    assert (await found(models("m"), known=EngineKind.OPENAI))[1] == []
    told = {"/props": {"total_slots": 1}}
    assert (await found(models("m"), told, known=EngineKind.LLAMACPP))[1] == ["/props"]


async def test_another_engine_at_the_same_place_is_noticed() -> None:
    """Who says that it is another is believed; who no longer answers as before is searched."""
    report, _ = await found(models("m", owned_by="vllm"), known=EngineKind.LLAMACPP)
    assert report.kind is EngineKind.VLLM
    told = {"/api/version": {"version": "1"}}
    report, _ = await found(models("m"), told, known=EngineKind.LLAMACPP)
    assert report.kind is EngineKind.OLLAMA


@pytest.mark.parametrize(
    "listed",
    [
        {"data": []},
        {"data": [None, 1, "a", [], {}, {"id": 7}, {"id": ""}, {"id": "a\x1b[2J"}, {"id": None}]},
        {"data": [{"id": "a" * (MODEL_NAME_CHARS_MAX + 1)}]},
    ],
)
async def test_lists_that_are_none(listed: object) -> None:
    """Whatever shape a stranger's JSON has, what is no model's name is left out."""
    report, _ = await found(listed)
    assert (report.kind, report.models) == (EngineKind.OPENAI, ())


@pytest.mark.parametrize("known", [None, EngineKind.OPENAI, EngineKind.VLLM])
@pytest.mark.parametrize(
    "listed", [None, [], "text", 7, {}, {"data": None}, {"data": {"id": "a"}}, {"status": "ok"}]
)
async def test_a_web_server_is_no_engine(listed: object, known: EngineKind | None) -> None:
    """Who lists no models and answers no engine's questions is refused, whatever it was before."""
    with pytest.raises(EngineBroken, match="no OpenAI-compatible engine"):
        await found(listed, known=known)


async def test_an_engine_without_models_is_one() -> None:
    """Ollama with nothing pulled lists null and still is Ollama."""
    report, _ = await found({"data": None}, {"/api/version": {"version": "0.12.0"}})
    assert (report.kind, report.models) == (EngineKind.OLLAMA, ())


@pytest.mark.parametrize("wrong", [None, 0, -1, True, "4", 4.5, [], {}, {"n_ctx": "x"}, 10**30])
async def test_figures_that_are_none(wrong: object) -> None:
    """A number that is none is not told; one beyond all reason is cut."""
    told = {
        "/props": {"total_slots": wrong, "default_generation_settings": {"n_ctx": wrong}},
        "/server_info": {"max_running_requests": wrong, "internal_states": wrong},
        "/api/version": {"version": wrong},
    }
    for owner in ("llamacpp", "sglang", "library", "x"):
        report, _ = await found(models("m", owned_by=owner, max_model_len=wrong), told)
        assert report.slots is None or report.slots == 4_096
        assert report.models[0].context_tokens in (None, 1 << 30)


async def test_a_version_is_a_short_word() -> None:
    """What an engine calls its version is shown to people: it is printable and short."""
    for version in ("1\x1b[31m", "x" * 65, "", 1):
        report, _ = await found(models("m", owned_by="vllm"), {"/version": {"version": version}})
        assert report.version is None


async def test_a_million_models_are_cut() -> None:
    """A node that advertises a million models serves a few hundred of them."""
    listed = {"data": [{"id": f"m{i}"} for i in range(1_000_000)]}
    report, _ = await found(listed, known=EngineKind.OPENAI)
    assert len(report.models) == NODE_MODELS_MAX
