"""Slots: which node has one to spare, and for which requests."""

from __future__ import annotations

import pytest

from anser.core.slots import NodeSlots, Slots


def shares(slots: Slots) -> dict[str, str]:
    """Each node's taken and all slots."""
    return {node.id: f"{node.taken}/{node.slots}" for node in slots.nodes()}


def take_best(slots: Slots, model: str) -> str:
    """Take a slot of the node that has most to spare, and say which it was."""
    node = next(slots.freest(slots.lane(model)), None)
    assert node is not None
    slots.take(node)
    slots.validate()
    return node.id


def test_the_node_with_the_largest_free_share_is_best() -> None:
    """A node is chosen by the share of its slots that is free, not by their number."""
    slots = Slots()
    slots.change("big", slots=6, models=["m"])
    slots.change("small", slots=2, models=["m"])
    taken = [take_best(slots, "m") for _ in range(8)]
    assert taken[:4] == ["big", "small", "big", "big"]
    assert shares(slots) == {"big": "6/6", "small": "2/2"}


def test_no_node_is_best_when_none_is_free() -> None:
    """Without a free slot for the model there is no node."""
    slots = Slots()
    slots.change("n1", slots=1, models=["m"])
    assert next(slots.freest(slots.lane("other")), None) is None
    take_best(slots, "m")
    assert next(slots.freest(slots.lane("m")), None) is None


def test_a_slot_counts_for_all_models_of_its_node() -> None:
    """A node's slots are shared by all models that it serves."""
    slots = Slots()
    node = slots.change("n1", slots=1, models=["a", "b"])
    take_best(slots, "a")
    assert next(slots.freest(slots.lane("b")), None) is None
    slots.give_back(node)
    assert next(slots.freest(slots.lane("b")), None) is node


def test_a_slot_is_never_taken_twice() -> None:
    """Taking a slot of a full node is a broken invariant, as is giving back what was not taken."""
    slots = Slots()
    node = slots.change("n1", slots=1, models=["m"])
    with pytest.raises(AssertionError):
        slots.give_back(node)
    slots.take(node)
    with pytest.raises(AssertionError):
        slots.take(node)


def test_a_node_that_shrinks_below_what_it_runs_is_not_free() -> None:
    """There are never less than no free slots."""
    slots = Slots()
    node = slots.change("n1", slots=3, models=["m"])
    slots.take(node)
    slots.take(node)
    assert slots.change("n1", slots=1, models=["m"]) is node
    assert node.free == 0
    assert next(slots.freest(slots.lane("m")), None) is None
    slots.give_back(node)
    assert node.free == 0
    slots.give_back(node)
    assert next(slots.freest(slots.lane("m")), None) is node
    slots.validate()


def test_a_node_is_forgotten_with_its_last_lease() -> None:
    """A drained node is remembered while leases hold slots on it, and only then."""
    slots = Slots()
    node = slots.change("n1", slots=1, models=["m"])
    slots.take(node)
    slots.change("n1", slots=0, models=[])
    assert slots.taken("n1") == 1
    assert slots.models("n1") == ()
    slots.give_back(node)
    assert slots.nodes() == []
    assert slots.taken("n1") == 0
    assert slots.models("n1") == ()
    slots.validate()


def test_a_node_that_was_never_there_leaves_no_trace_when_it_goes() -> None:
    """No slots and no leases is no node."""
    slots = Slots()
    slots.change("n1", slots=0, models=["m"])
    assert slots.nodes() == []
    slots.validate()


def test_a_node_that_returns_still_has_its_leases() -> None:
    """A node that is back before its leases are reported is not booked twice."""
    slots = Slots()
    slots.take(slots.change("n1", slots=1, models=["m"]))
    slots.change("n1", slots=0, models=[])
    assert slots.change("n1", slots=1, models=["m"]).free == 0


def test_a_lane_shuns_the_nodes_it_excludes_while_others_serve_the_model() -> None:
    """A request that failed on a node goes elsewhere, if there is an elsewhere."""
    slots = Slots()
    first = slots.change("n1", slots=9, models=["m"])
    second = slots.change("n2", slots=2, models=["m"])
    slots.take(second)
    lane = slots.lane("m", frozenset({"n1"}))
    slots.wait(lane)
    assert next(slots.freest(lane), None) is second
    assert slots.waiting_for(first) == []
    assert slots.waiting_for(second) == [lane]
    slots.take(second)
    assert next(slots.freest(lane), None) is None
    slots.change("n2", slots=0, models=[])
    assert next(slots.freest(lane), None) is first
    assert slots.waiting_for(first) == [lane]


def test_nodes_that_have_to_do_are_found_when_others_go() -> None:
    """A free node that a lane excludes is named, so that it can be offered once more."""
    slots = Slots()
    node = slots.change("n1", slots=1, models=["m"])
    lane = slots.lane("m", frozenset({"n1", "n2"}))
    slots.wait(lane)
    assert slots.freed_by_exclusion(["m", "unknown"]) == [node]
    slots.take(node)
    assert slots.freed_by_exclusion(["m"]) == []


def test_a_lane_exists_while_something_waits_in_it() -> None:
    """Lanes are shared by what waits, and forgotten with the last of it."""
    slots = Slots()
    lane = slots.lane("m")
    assert slots.lanes() == []
    slots.wait(lane)
    assert slots.lane("m") is lane
    slots.wait(lane)
    slots.leave(lane)
    assert slots.lanes() == [lane]
    slots.validate()
    slots.leave(lane)
    assert slots.lanes() == []
    with pytest.raises(AssertionError):
        slots.leave(lane)


def test_a_model_that_comes_late_serves_what_waits_already() -> None:
    """What waits for a model that nobody serves is found by the node that brings it."""
    slots = Slots()
    lane = slots.lane("m")
    slots.wait(lane)
    node = slots.change("n1", slots=1, models=["m"])
    assert slots.waiting_for(node) == [lane]
    assert slots.models("n1") == ("m",)


def test_reprs_tell_the_state_in_a_line() -> None:
    """Each class shows its state."""
    slots = Slots()
    node = slots.change("n1", slots=2, models=["m"])
    slots.take(node)
    lane = slots.lane("m", frozenset({"n3", "n2"}))
    slots.wait(lane)
    assert repr(slots) == "<Slots 1/2 taken on 1 nodes>"
    assert repr(node) == "<NodeSlots n1 1/2>"
    assert repr(lane) == "<Lane m without n2,n3, 1 waiting>"
    assert repr(slots.lane("m")) == "<Lane m, 0 waiting>"
    assert repr(lane.supply) == "<Supply m: 1 nodes, 1 lanes>"
    assert repr(node.shelf) == "<Shelf of 1 nodes, 1 models>"


def test_validate_finds_a_node_in_the_wrong_level() -> None:
    """An invariant that is broken is found."""
    slots = Slots()
    node: NodeSlots = slots.change("n1", slots=2, models=["m"])
    node.taken = 1
    with pytest.raises(AssertionError):
        slots.validate()
