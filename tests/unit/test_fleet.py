"""Nodes: their URLs, their fields, what they offer, and their health, one rule at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from anser.core.errors import InvalidField
from anser.core.fleet import (
    SLOTS_DEFAULT,
    EngineKind,
    EngineReport,
    Node,
    ServedModel,
    check_node,
    offers,
    parse_endpoint,
)
from anser.core.health import (
    Answered,
    Drained,
    Health,
    HealthEvent,
    HealthRules,
    NodeState,
    Resumed,
    Silent,
    Spared,
    StreamDeclined,
    StreamFailed,
    StreamFinished,
    Ticked,
)
from anser.core.limits import MODEL_NAME_CHARS_MAX, NODE_MODELS_MAX, NODE_SLOTS_MAX

PIN = "ab" * 32


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("http://gpu", "/v1/models"),
        ("http://gpu/", "/v1/models"),
        ("http://gpu:8000/v1", "/v1/models"),
        ("http://gpu:8000/v1/", "/v1/models"),
        ("https://api.example.org/openai/v1", "/openai/v1/models"),
        ("https://api.example.org/openai", "/openai/v1/models"),
        ("https://example.org/api/paas/v4/", "/api/paas/v4/models"),
        ("http://h/v1/x", "/v1/x/v1/models"),
    ],
)
def test_a_url_may_stand_with_or_without_v1(url: str, path: str) -> None:
    """Routes stand under the URL's path; a version at its end is the routes' own."""
    assert parse_endpoint(url).path("/v1/models") == path


def test_a_url_is_taken_apart() -> None:
    """Scheme and host in lower case, the scheme's usual port, the pin as bytes."""
    endpoint = parse_endpoint(f"HTTPS://GPU.Example.org/Big/v1#SHA256={PIN.upper()}")
    assert (endpoint.scheme, endpoint.host, endpoint.port) == ("https", "gpu.example.org", 443)
    assert (endpoint.prefix, endpoint.pin) == ("/Big", b"\xab" * 32)
    assert endpoint.place == ("gpu.example.org", 443, "/Big")
    assert parse_endpoint("http://[::1]:9").host == "::1"
    colons = ":".join(["ab"] * 32)
    assert parse_endpoint(f"https://gpu#sha256={colons}").pin == b"\xab" * 32


@pytest.mark.parametrize(
    "url",
    [
        "",
        "gpu:8000",
        "ftp://gpu",
        "http://",
        "http://user@gpu",
        "http://user:secret@gpu",
        "http://gpu\\@evil",
        "http://gpu/?key=1",
        "http://gpu/#x",
        "http://gpu /",
        "http://gpu\n",
        "http://gpu/\r\nhost: evil",
        "http://gpu/../etc",
        "http://gpu//v1",
        "http://gpu/%2e%2e/",
        "http://gpü",
        "http://gpu:0",
        "http://gpu:65536",
        "http://[gpu]",
        "http://gpu-",
        f"http://gpu#sha256={PIN}",
        f"https://gpu#sha256={PIN}a",
        "https://gpu#sha256=abcd",
        "http://gpu/" + "a" * 2_048,
    ],
)
def test_what_is_no_url_of_a_node(url: str) -> None:
    """Credentials, queries, control characters, dots and the like are refused by name of field."""
    with pytest.raises(InvalidField) as caught:
        parse_endpoint(url)
    assert caught.value.param == "url"


@pytest.mark.parametrize(
    ("url", "id_"),
    [
        ("http://127.0.0.1:8080/v1", "127.0.0.1:8080"),
        ("https://GPU.example.org", "gpu.example.org:443"),
        ("http://[::1]:9", "ip6---1:9"),
        ("https://example.org/api/Paas/v4", "example.org:443-api-paas"),
    ],
)
def test_an_id_is_made_from_the_url(url: str, id_: str) -> None:
    """A node without an id is called by host, port and path."""
    assert check_node(Node(id="", url=url)).id == id_


def test_a_node_keeps_what_it_was_given() -> None:
    """Given fields stay; a jurisdiction is written in capitals."""
    node = Node(
        id="big", url="http://gpu", slots=NODE_SLOTS_MAX, model="m", jurisdiction="de", member="lab"
    )
    assert check_node(node) == replace(node, jurisdiction="DE")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"id": "Big"}, "id"),
        ({"id": "a/b"}, "id"),
        ({"id": "a" * 128}, "id"),
        ({"slots": 0}, "slots"),
        ({"slots": NODE_SLOTS_MAX + 1}, "slots"),
        ({"model": ""}, "model"),
        ({"model": "a\x1b[31m"}, "model"),
        ({"model": "a" * (MODEL_NAME_CHARS_MAX + 1)}, "model"),
        ({"jurisdiction": "DEU"}, "jurisdiction"),
        ({"jurisdiction": "d1"}, "jurisdiction"),
        ({"url": "x"}, "url"),
        ({"member": "lab/vision"}, "member"),
        ({"member": "anonymous"}, "member"),
        ({"member": "No Name"}, "member"),
    ],
)
def test_what_is_no_node(fields: dict[str, object], param: str) -> None:
    """Each wrong field is refused by its name."""
    node = replace(Node(id="n", url="http://gpu"), **fields)  # type: ignore[arg-type]
    with pytest.raises(InvalidField) as caught:
        check_node(node)
    assert caught.value.param == param


def report(*names: str) -> EngineReport:
    models = tuple(ServedModel(name=name, context_tokens=9) for name in names)
    return EngineReport(kind=EngineKind.VLLM, version=None, models=models, slots=None)


def test_a_node_offers_all_that_its_engine_serves() -> None:
    """Without a model of its own, a node offers each model under the engine's name."""
    (a, b) = offers(Node(id="n", url="", jurisdiction="DE"), report("a", "b"))
    assert (a.model, a.engine_model, b.model) == ("a", "a", "b")
    assert (a.node, a.engine, a.context_tokens, a.jurisdiction) == ("n", EngineKind.VLLM, 9, "DE")


def test_a_node_with_a_model_offers_that_one_only() -> None:
    """The named model is the one of that name, or the engine's only one; else there is none."""
    node = Node(id="n", url="", model="a")
    assert [offer.engine_model for offer in offers(node, report("b", "a"))] == ["a"]
    assert [(o.model, o.engine_model) for o in offers(node, report("/x.gguf"))] == [
        ("a", "/x.gguf")
    ]
    assert offers(node, report("b", "c")) == ()
    assert offers(node, report()) == ()


def test_a_node_offers_no_more_models_than_it_may() -> None:
    """Too many models are cut, and names that nobody could print are left out."""
    names = [f"m{i}" for i in range(NODE_MODELS_MAX + 1)]
    node = Node(id="n", url="")
    assert len(offers(node, report("", "\x07", "a" * 257, *names[:-1]))) == NODE_MODELS_MAX
    assert offers(node, report(*names))[-1].model == f"m{NODE_MODELS_MAX - 1}"


def test_every_kind_of_engine_has_a_number_of_slots() -> None:
    """What an engine does not tell, its kind does."""
    assert set(SLOTS_DEFAULT) == set(EngineKind)


RULES = HealthRules(backoff_s=2.0, backoff_max_s=10.0, trials=2)


def after(*events: HealthEvent, now: float = 0.0, health: Health | None = None) -> Health:
    health = health or Health(RULES)
    for event in events:
        health.handle(event, now)
        health.validate()
    return health


def test_a_node_starts_without_slots() -> None:
    """Until it has been asked, a node is starting and has no slots."""
    health = after()
    assert (health.state, health.slots(4)) == (NodeState.STARTING, 0)
    after(Silent(loading=True), Silent(loading=True), Silent(loading=True), health=health)
    assert health.state is NodeState.STARTING


def test_a_node_that_answers_is_up() -> None:
    """One answer is enough to be up with all slots."""
    health = after(Silent(), Answered())
    assert (health.state, health.slots(4)) == (NodeState.UP, 4)


def test_a_node_that_never_answered_is_down_at_once() -> None:
    """The first silence of a node that nobody has heard of counts."""
    health = after(Silent())
    assert (health.state, health.slots(4)) == (NodeState.DOWN, 0)


def test_a_node_that_was_up_is_down_after_two_silences() -> None:
    """One lost question is no loss of the node; two in a row are, until it answers."""
    health = after(Answered(), Silent())
    assert health.state is NodeState.UP
    after(Answered(), Silent(), StreamFinished(), Silent(loading=True), health=health)
    assert health.state is NodeState.UP  # who streams is alive
    assert after(Silent(), health=health).state is NodeState.DOWN
    assert after(Answered(), health=health).state is NodeState.UP


def test_a_drained_node_has_no_slots() -> None:
    """Draining wins over everything else."""
    health = after(Answered(), Drained(), StreamFinished(), Answered())
    assert (health.state, health.slots(4)) == (NodeState.DRAINING, 0)


def test_a_resumed_node_is_as_well_as_it_was() -> None:
    """Resuming ends the draining and nothing else: what was seen meanwhile counts."""
    assert after(Resumed()).state is NodeState.STARTING
    health = after(Answered(), Drained(), Resumed())
    assert (health.state, health.slots(4)) == (NodeState.UP, 4)
    after(Drained(), *[StreamFailed()] * 3, Resumed(), health=health)
    assert (health.state, health.slots(4)) == (NodeState.SUSPECT, 0)


def test_failures_in_a_row_open_the_breaker() -> None:
    """The third failure in a row takes the slots away; a good stream starts the count again."""
    health = after(Answered(), StreamFailed(), StreamFailed(), StreamFinished())
    after(StreamFailed(), StreamFailed(), health=health)
    assert health.state is NodeState.UP
    after(StreamFailed(), health=health)
    assert (health.state, health.slots(4), health.retry_at) == (NodeState.SUSPECT, 0, 2.0)


def test_too_many_failures_among_the_last_open_the_breaker() -> None:
    """A node that fails every other stream is let go, though never three times in a row."""
    health = after(Answered(), *[StreamFinished(), StreamFailed()] * 4, StreamFinished())
    assert health.state is NodeState.UP
    assert after(StreamFailed(), health=health).state is NodeState.SUSPECT


def test_the_ratio_looks_at_the_last_streams_only() -> None:
    """Old failures are forgotten after a window of streams."""
    health = after(Answered(), *[StreamFinished(), StreamFailed()] * 4)
    after(*[StreamFinished()] * 20, health=health)
    after(*[StreamFailed(), StreamFinished()] * 9, health=health)
    assert health.state is NodeState.UP


def test_an_answered_question_does_not_close_the_breaker() -> None:
    """Only whole streams and time close what whole streams have opened."""
    health = after(Answered(), *[StreamFailed()] * 3, Answered(), Ticked(), StreamFinished())
    assert (health.state, health.slots(4)) == (NodeState.SUSPECT, 0)


def test_after_the_back_off_one_request_at_a_time() -> None:
    """The back-off over, one slot is lent; enough good streams give all back."""
    health = after(Answered(), *[StreamFailed()] * 3)
    assert after(Ticked(), now=1.99, health=health).slots(4) == 0
    after(Ticked(), now=2.0, health=health)
    assert (health.state, health.slots(4), health.slots(1)) == (NodeState.SUSPECT, 1, 1)
    assert after(StreamFinished(), now=2.0, health=health).slots(4) == 1
    assert after(StreamFinished(), now=2.0, health=health).slots(4) == 4
    assert health.state is NodeState.UP


def test_a_failed_trial_doubles_the_back_off_up_to_its_cap() -> None:
    """Each failed trial waits twice as long as the last, stretched by jitter, up to a limit."""
    health = after(Answered(), *[StreamFailed()] * 3)
    waits = []
    for _ in range(4):
        assert health.retry_at is not None
        now = health.retry_at
        after(Ticked(), StreamFailed(jitter=1.0), now=now, health=health)
        waits.append(health.retry_at - now)
    assert waits == [5.0, 10.0, 12.5, 12.5]


def test_streams_from_before_do_not_count_against_the_back_off() -> None:
    """What was already running when the breaker opened neither closes nor prolongs it."""
    health = after(Answered(), *[StreamFailed()] * 60, *[StreamFinished()] * 60)
    assert (health.state, health.retry_at) == (NodeState.SUSPECT, 2.0)


def test_a_long_good_time_makes_the_back_off_short_again() -> None:
    """Only a window of good streams forgets that the breaker has been open."""
    health = after(Answered(), *[StreamFailed()] * 3)
    after(*[StreamFinished()] * 2, now=2.0, health=health)
    after(*[StreamFailed()] * 3, now=2.0, health=health)
    assert health.retry_at == 6.0
    after(*[StreamFinished()] * 22, now=6.0, health=health)
    after(*[StreamFailed()] * 3, now=6.0, health=health)
    assert health.retry_at == 8.0


def test_a_node_that_declines_is_set_aside() -> None:
    """Each time twice as long, up to a limit, and then tried with one request at a time."""
    health, now, waits = after(Answered()), 0.0, []
    for _ in range(4):
        after(StreamDeclined(jitter=1.0), now=now, health=health)
        assert (health.state, health.slots(4)) == (NodeState.SUSPECT, 0)
        assert health.wake_at is not None
        waits.append(health.wake_at - now)
        now = health.wake_at
        after(Ticked(), now=now, health=health)
        assert (health.slots(4), health.wake_at) == (1, None)
    assert waits == [2.5, 5.0, 10.0, 12.5]
    after(StreamFinished(), now=now, health=health)
    assert (health.state, health.slots(4)) == (NodeState.UP, 4)
    after(StreamDeclined(), now=now, health=health)
    assert health.wake_at == now + 2.0


def test_one_node_that_declined_is_tried_at_a_time() -> None:
    """While another one is found to decline still, a trial waits; who is well is left alone."""
    health = after(Answered(), StreamDeclined(), Spared())
    assert health.wake_at == 2.0
    after(Ticked(), Spared(), now=2.0, health=health)
    assert (health.slots(4), health.wake_at) == (0, 4.0)
    assert after(Ticked(), now=4.0, health=health).slots(4) == 1
    assert after(Answered(), Spared()).slots(4) == 4


def test_a_node_is_set_aside_for_as_long_as_it_asks() -> None:
    """Its own word counts if it is longer than the pause would be, within reason."""
    for asked_s, pause_s in ((0.0, 2.0), (60.0, 60.0), (10_000.0, 3_600.0)):
        health = after(Answered(), StreamDeclined(pause_s=asked_s))
        assert health.wake_at == pause_s


def test_declining_is_not_told_to_the_breaker() -> None:
    """However often a node declines, no failure is counted; streams from before change nothing."""
    health = after(Answered(), StreamFailed(), StreamFailed(), *[StreamDeclined()] * 20)
    after(StreamFinished(), now=1.0, health=health)
    assert (health.aside_until, health.retry_at, health.slots(4)) == (2.0, None, 0)
    after(StreamFinished(), now=2.0, health=health)
    assert (health.state, health.slots(4)) == (NodeState.UP, 4)


def test_repr_shows_the_state() -> None:
    """The state is visible in one line."""
    health = after(Answered(), *[StreamFailed()] * 3)
    expected = "<Health suspect breaker=open silent=0 failed=3 opened=1 retry_at=2.0>"
    assert repr(health) == expected
