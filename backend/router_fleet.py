"""What a router knows of each instance: whether it is well, what it serves, how busy it is.

Every instance is watched (`herald`): it tells its load ten times a second. One that tells nothing for
`silent_s`, whose engine stands still, or whose watch breaks gets no new requests, and those it has are
interrupted as soon as another instance could take them. One that serves another model is left alone.
A router that was itself asleep blames nobody: silence counts in the loop's own turns.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from slos_serve.client import wire
from slos_serve.scheduler.dispatch import Ask, Fleet, Load, drawn, home, predict, rank

from .router_config import RouterConfig
from .router_link import Answered, Broken, Exchange, Link, request_message

log = logging.getLogger(__name__)

TICK_SECONDS: Final = 0.05
RETRY_SECONDS: Final = 0.25
CONNECT_SECONDS: Final = 2.0
MAX_SESSIONS: Final = 20_000
WATCH: Final = wire.encode({"control": "watch"})


@dataclass(slots=True, eq=False)
class Member:
    """One instance as this router sees it. `trouble` says why it gets no requests; "" when it does."""

    address: str
    link: Link
    trouble: str = "not heard of yet"
    instance: str = ""  # another one after a restart
    facts: Mapping[str, Any] = field(default_factory=dict)
    told_at: float = 0.0
    silence: float = 0.0
    exchanges: set[Exchange] = field(default_factory=set)
    watching: asyncio.Task[None] | None = None

    @property
    def is_usable(self) -> bool:
        return not self.trouble


class Homes:
    """Where each session was last, and how many of its tokens are cached there; of the latest `MAX_SESSIONS`.

    Every instance tells all routers whose rounds end, so that a session needs no router of its own.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[str, int]] = OrderedDict()

    def remember(self, session: str, address: str, tokens: int) -> None:
        self._known[session] = (address, tokens)
        self._known.move_to_end(session)
        if len(self._known) > MAX_SESSIONS:
            self._known.popitem(last=False)

    def of(self, session: str) -> tuple[str, int] | None:
        return self._known.get(session)


class Instances:
    """All instances of a router; lives in its event loop."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self.members: dict[str, Member] = {}
        self.fleet = Fleet()
        self.homes = Homes()
        self._fingerprint = ""
        self.usable: list[Member] = []  # those that requests may go to, in the order of the fleet's columns
        self._turn = secrets.randbelow(1 << 20)  # several routers do not begin with the same instance
        nobody, ask = Fleet(("nobody",)), Ask(1.0)  # compiled now, not at the first request
        home(nobody, "")
        rank(nobody, ask, 0.0, 0, drawn(nobody, ask, 1, 0))

    def change(self, addresses: tuple[str, ...]) -> None:
        """The instances are these from now on. One that left finishes what it has."""
        for address in [known for known in self.members if known not in addresses]:
            member = self.members.pop(address)
            log.info("instance %s left", address)
            if member.watching is not None:
                member.watching.cancel()
            asyncio.get_running_loop().create_task(_retire(member))
        for address in addresses:
            if address not in self.members:
                log.info("instance %s joined", address)
                member = self.members[address] = Member(address, Link(address))
                member.watching = asyncio.get_running_loop().create_task(self._watch(member))
        self._update()

    async def close(self) -> None:
        """Stop watching and hang up."""
        for member in self.members.values():
            if member.watching is not None:
                member.watching.cancel()
            await member.link.close()

    async def attend(self) -> None:
        """Count silence and move requests away from where nobody speaks, until cancelled."""
        before = time.monotonic()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            passed, before = min(now - before, 2 * TICK_SECONDS), now
            for member in list(self.members.values()):
                member.silence += passed
                if member.is_usable and member.silence > self._config.silent_s:
                    self._blame(member, f"silent for {self._config.silent_s:g} s")
                if member.is_usable:
                    member.link.prepare()
                elif member.exchanges:
                    self._move(member)

    def best(self, ask: Ask, without: Collection[str]) -> Member | None:
        """The best usable instance for this request, but for those at the addresses `without`."""
        self._turn += 1
        few = self._config.max_ranked
        among = drawn(self.fleet, ask, few, self._turn) if few < len(self.usable) and not without else None
        for column in rank(self.fleet, ask, time.monotonic(), self._turn, among):
            member = self.usable[int(column)]
            if member.address not in without:
                return member
        return None

    @property
    def per_token(self) -> float:
        """Seconds per prompt token, the median of the usable instances."""
        return self.fleet.per_token

    def predicted(self, member: Member, ask: Ask) -> float:
        """Seconds to the first token there; infinite where that is not to be expected at all."""
        column = self.fleet.index.get(member.address)
        if column is None:
            return math.inf
        return float(predict(self.fleet, ask, time.monotonic(), np.array([column]))[0])

    def describe(self) -> str:
        """Every instance and what is wrong with it."""
        if not self.members:
            return "no instance is known"
        return "; ".join(f"{member.address}: {member.trouble or 'ready'}" for member in self.members.values())

    async def _watch(self, member: Member) -> None:
        while True:
            try:
                await self._listen(member)
                continue  # a watch ends by itself; the next begins at once
            except Broken as error:
                trouble = f"unreachable ({error})"
            except Answered as error:
                trouble = f"it answered {error}"
            except (ValueError, KeyError, TypeError) as error:
                trouble = f"not an instance of ours ({type(error).__name__}: {error})"
            except Exception as error:
                log.exception("watching %s", member.address)
                trouble = f"{type(error).__name__}: {error}"
            self._blame(member, trouble)
            await asyncio.sleep(RETRY_SECONDS if member.silence < 10 else 4 * RETRY_SECONDS)

    async def _listen(self, member: Member) -> None:
        """One watch, from its start to its regular end. Raises what went wrong."""
        exchange = member.link.send(request_message(self._config.model, "", WATCH))
        responses = exchange.__aiter__()
        patience = max(CONNECT_SECONDS, 2 * self._config.silent_s)
        heard = False
        try:
            while True:
                response = await asyncio.wait_for(responses.__anext__(), patience)
                heard = True
                state = response.text("control_output")
                if state:
                    self._hear(member, json.loads(state))
        except StopAsyncIteration:
            if not heard:
                raise Broken("it ended a watch without a word") from None
        except asyncio.TimeoutError:
            raise Broken(f"silent for {patience:g} s") from None
        finally:
            exchange.close()

    def _hear(self, member: Member, state: Mapping[str, Any]) -> None:
        """Raises ValueError or KeyError for what no instance of ours says."""
        load = Load.from_json(state["load"])
        rounds = _rounds(state.get("sessions", {}))
        age = state["engine_age"]
        if isinstance(age, bool) or not isinstance(age, (int, float)) or not 0 <= age < math.inf:
            raise ValueError(f"engine_age: must be a number of seconds, got {age!r}")
        member.silence, member.told_at = 0.0, time.monotonic()
        if state["instance"] != member.instance:
            member.instance, member.facts = str(state["instance"]), dict(state)
        trouble = self._objection(state, age)
        if trouble:
            self._blame(member, trouble)
            return
        if not member.is_usable:
            log.info("instance %s is ready", member.address)
            member.trouble = ""
            self._update()
        self.fleet.tell(member.address, load, member.told_at)
        for session, tokens in rounds.items():
            self.homes.remember(session, member.address, tokens)

    def _objection(self, state: Mapping[str, Any], age: float) -> str:
        """Why an instance that speaks gets no requests; "" when it does."""
        if state["draining"]:
            return "draining"
        if age > self._config.stalled_s:
            return f"its engine has stood still for {self._config.stalled_s:g} s"
        if not self._fingerprint or not self.usable:
            self._fingerprint = state["fingerprint"]
        if state["fingerprint"] != self._fingerprint:
            return f"it serves other weights ({state['fingerprint']}, the others {self._fingerprint})"
        return ""

    def _blame(self, member: Member, trouble: str) -> None:
        was_usable = member.is_usable
        if member.trouble != trouble:
            log.warning("instance %s: %s", member.address, trouble)
        member.trouble = trouble
        if was_usable:
            member.link.release()
            self._update()

    def _move(self, member: Member) -> None:
        """Interrupt its silent requests when another could take them, or when waiting any longer is pointless.

        An instance that takes no new requests but goes on answering (one that drains) keeps those it has.
        """
        patience = self._config.silent_s + (0.0 if self.usable else self._config.wait_s)
        if member.silence <= patience and member.trouble.startswith("silent"):
            return
        now = time.monotonic()
        for exchange in list(member.exchanges):
            if now - exchange.heard_at > patience:
                exchange.interrupt(member.trouble)

    def _update(self) -> None:
        self.usable = [member for member in self.members.values() if member.is_usable]
        self.fleet.resize([member.address for member in self.usable])


async def _retire(member: Member) -> None:
    """Hang up after its last request."""
    member.link.release()
    while member.exchanges:
        await asyncio.sleep(RETRY_SECONDS)
    await member.link.close()


def _rounds(told: Any) -> Mapping[str, int]:
    """Sessions and their cached tokens, as an instance tells them. Raises ValueError for what none of ours says."""
    if not isinstance(told, dict) or not all(type(tokens) is int and tokens >= 0 for tokens in told.values()):
        raise ValueError(f"sessions: must be numbers of tokens by session, got {told!r:.200}")
    return told
