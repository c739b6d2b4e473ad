"""A router's settings and its list of instances: wrong ones are refused, late news are followed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from slos_serve.backend.replicas import write_router_repository
from slos_serve.backend.router_call import bounded
from slos_serve.backend.router_config import RouterConfig, parse_addresses, read_router_config
from slos_serve.backend.router_fleet import Instances, Member
from slos_serve.backend.router_link import Link
from slos_serve.backend.router_members import Members
from slos_serve.scheduler.dispatch import Ask, Load

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "instances, instances_file, dns"),
        ({"instances": ["a:1", "a:1"]}, "a:1 is listed twice"),
        ({"instances": ["a"]}, "HOST:PORT, got 'a'"),
        ({"instances": ["a:0"]}, "HOST:PORT"),
        ({"instances": ["a:70000"]}, "HOST:PORT"),
        ({"instances": "a:1"}, "list of addresses"),
        ({"instances": ["a:1"], "silent_s": -1}, "silent_s"),
        ({"instances": ["a:1"], "wait_s": "long"}, "wait_s"),
        ({"instances": ["a:1"], "max_hops": 0}, "max_hops"),
        ({"instances": ["a:1"], "unseen_tokens": 0}, "unseen_tokens"),
        ({"instances": ["a:1"], "unseen_s": float("nan")}, "unseen_s"),
        ({"instances": ["a:1"], "max_responses_s": 0}, "max_responses_s"),
        ({"instances": ["a:1"], "max_ranked": 0.5}, "max_ranked"),
        ({"instances": ["a:1"], "hops": 3}, "unknown key 'hops'"),
        ({"dns": "name-without-port"}, "HOST:PORT"),
    ],
)
def test_wrong_settings_are_refused_by_name(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    """The message starts with the file and says which key."""
    (tmp_path / "router.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"router\.json: ") as caught:
        read_router_config(tmp_path)
    assert named in str(caught.value)


def test_the_shipped_router_is_the_one_that_the_launcher_writes(tmp_path: Path) -> None:
    """And the ensemble has every tensor of the wire format."""
    shipped = ROOT / "router_repository"
    write_router_repository(tmp_path, json.loads((shipped / "slos_router/1/router.json").read_text()))
    for path in ("slos_router/config.pbtxt", "slos_router/1/model.py", "slos_ensemble/config.pbtxt"):
        assert (shipped / path).read_text() == (tmp_path / path).read_text()
    assert read_router_config(shipped / "slos_router/1").instances


def test_what_nobody_may_read_is_bounded_and_a_callers_own_bounds_stay() -> None:
    """Longer answers are cut and a timeout is set; shorter ones, and a timeout of their own, stay as they are."""
    inf = float("inf")
    assert bounded({"max_tokens": 900}, inf, 100, 60.0) == ({"max_tokens": 100}, 60.0)
    assert bounded({"max_tokens": 9}, 5000.0, 100, 60.0) == ({"max_tokens": 9}, 5000.0)
    assert bounded({}, inf, 100, 60.0) == ({}, 60.0)


def test_a_file_of_instances_is_followed(tmp_path: Path) -> None:
    """New lines join, lost lines leave; a broken or missing file changes nothing."""
    told: list[tuple[str, ...]] = []
    file = tmp_path / "instances.txt"
    members = Members(RouterConfig(instances=("a:1",), instances_file="instances.txt"), tmp_path, told.append)
    texts = ("b:2 # the second\n\nc:3\na:1 # in the settings, too\n", "b:2\nb:2\n", "nonsense\n", "c:3\n")

    async def run() -> None:
        await members.look()
        for text in texts:
            file.write_text(text)
            await members.look()
        file.unlink()
        await members.look()

    asyncio.run(run())
    assert told == [("a:1",), ("a:1", "b:2", "c:3"), ("a:1", "c:3")]


def test_a_name_stands_for_all_its_addresses() -> None:
    """As a headless service has it."""
    told: list[tuple[str, ...]] = []
    members = Members(RouterConfig(dns="localhost:8001"), Path(), told.append)
    asyncio.run(members.look())
    assert "127.0.0.1:8001" in told[0]


def test_addresses_come_one_a_line() -> None:
    """With comments."""
    assert parse_addresses("# all\n 10.0.0.1:8001 \n[::1]:8001# last\n") == ("10.0.0.1:8001", "[::1]:8001")


def state(**changes: Any) -> dict[str, Any]:
    told = {"load": Load().to_json(), "engine_age": 0.0, "instance": "i", "fingerprint": "f", "draining": False}
    return {**told, **changes}


def heard(*states: dict[str, Any]) -> list[str]:
    """What is wrong with each of several instances after it told its state."""

    async def run() -> list[str]:
        instances = Instances(RouterConfig(instances=("unused:1",)))
        for number in range(len(states)):
            address = f"127.0.0.1:{number + 1}"
            instances.members[address] = Member(address, Link(address))
        for member, told in zip(instances.members.values(), states, strict=True):
            instances._hear(member, told)
        found: set[str] = set()
        while (best := instances.best(Ask(10, 10, 1.0, 0.1), found)) is not None:
            found.add(best.address)
        assert found == {member.address for member in instances.members.values() if member.is_usable}
        return [member.trouble for member in instances.members.values()]

    return asyncio.run(run())


def test_only_instances_that_can_take_a_request_get_one() -> None:
    """One that drains, stands still or serves other weights is left out, and the reason is kept."""
    good, draining, still, foreign = heard(
        state(), state(draining=True), state(engine_age=60.0), state(fingerprint="other")
    )
    assert good == ""
    assert draining == "draining"
    assert "stood still" in still
    assert "other weights" in foreign


@pytest.mark.parametrize(
    "absurd",
    [
        {"load": {"step": -1}},
        {"load": {"step": float("nan")}},
        {"load": {"per_token": None}},
        {"load": {"requests": "x"}},
        {"engine_age": float("nan")},
        {"engine_age": -3},
        {"sessions": ["talk"]},
        {"sessions": {"talk": -1}},
        {"sessions": {"talk": float("nan")}},
    ],
)
def test_an_absurd_state_is_refused(absurd: dict[str, Any]) -> None:
    """The watch of that instance ends with what was wrong; no ranking ever sees it."""
    with pytest.raises(ValueError, match="must be"):
        heard(state(**absurd))
