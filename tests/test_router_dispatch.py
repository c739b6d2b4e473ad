"""What a router makes of answers that real instances give only at times: declines, silence, holes, hang-ups."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from callers import PATIENCE, Caller
from instances import Instance, served

from slos_serve.backend.router_call import Call, read_call
from slos_serve.backend.router_config import RouterConfig
from slos_serve.backend.router_dispatch import Dispatcher
from slos_serve.backend.router_fleet import Instances
from slos_serve.client import wire

PROMISE = {"slo_ttft_ms": 5000.0, "slo_tpot_ms": 100.0}
Values = Mapping[str, Any]
Outputs = AsyncIterator[dict[str, Any]]


def last(index: int, reason: str = "length", **receipt: Any) -> dict[str, Any]:
    outputs = {"text_output": "", "token_index": index, "finish_reason": reason}
    return {**outputs, "receipt": json.dumps({"prompt_tokens": 130, **receipt})}


async def three_tokens(values: Values) -> Outputs:
    """The tokens 0, 1, 2, from where another instance stopped."""
    for index in range(len(values.get("resume_ids", ())), 3):
        yield {"text_output": f"{index}", "token_index": index + 1, "output_ids": [index]}
    yield last(3, prompt_tokens=len(values.get("input_ids", ())) or 130)


async def decline(values: Values) -> Outputs:
    """What may be declined is; the rest is served."""
    if values.get("may_decline"):
        yield last(0, "declined", predicted_ttft_ms=9000.0)
        return
    async for outputs in three_tokens(values):
        yield outputs


async def silence(values: Values) -> Outputs:
    """Nothing, for as long as somebody listens."""
    await asyncio.sleep(PATIENCE)
    yield {}


async def ticket(values: Values) -> Outputs:
    """The offer is accepted."""
    yield {"control_output": json.dumps({"ticket": "f" * 24})}


class Router:
    """A dispatcher and its instances in this event loop."""

    def __init__(self, config: RouterConfig) -> None:
        self.instances = Instances(config)
        self.dispatcher = Dispatcher(config, self.instances)

    def ask(self, caller: Caller, *, place: bool = False, **fields: Any) -> Coroutine[Any, Any, None]:
        asked = {"text_input": "x" * 400, "stream": True, **fields}
        tensors = wire.encode({**asked, "control": "place"} if place else asked)
        call = read_call("name", tensors, {}, caller, time.monotonic(), math.inf, place)
        return self.dispatcher.serve(call)

    async def answer(self, **fields: Any) -> Caller:
        caller = Caller()
        await asyncio.wait_for(self.ask(caller, **fields), PATIENCE)
        return caller


async def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def routed(*instances: Instance, **settings: Any) -> AsyncIterator[Router]:
    """A router that uses all of these instances."""
    async with served(instances) as addresses:
        router = Router(RouterConfig(instances=addresses, silent_s=PATIENCE, **settings))
        router.instances.change(addresses)
        attending = asyncio.create_task(router.instances.attend())
        try:
            await until(lambda: len(router.instances.usable) == len(instances))
            yield router
        finally:
            attending.cancel()
            await router.instances.close()


def test_a_decline_goes_on_to_the_next_with_the_age_it_has() -> None:
    """The best instance is asked first; the next one gets the request as old as it is by then."""

    async def run() -> tuple[Caller, Instance, Instance]:
        best, other = Instance(decline), Instance(three_tokens, requests=9.0, queued_tokens=500.0)
        async with routed(best, other) as router:
            return await router.answer(**PROMISE, elapsed_ms=40.0), best, other

    caller, best, other = asyncio.run(run())
    assert [each.asked[0]["may_decline"] for each in (best, other)] == [True, True]
    assert 40.0 <= best.asked[0]["elapsed_ms"] <= other.asked[0]["elapsed_ms"]
    assert (caller.text, caller.finish_reason) == ("012", "length")
    assert (caller.receipt["hops"], caller.receipt["instance"]) == (1, other.address)


def test_after_every_decline_it_runs_best_effort_where_it_harms_least() -> None:
    """Nobody is asked twice whether they might; then the least busy one has to."""

    async def run() -> tuple[Caller, list[Instance]]:
        instances = [Instance(decline, requests=3.0 * number, queued_tokens=100.0 * number) for number in range(3)]
        async with routed(*instances) as router:
            return await router.answer(**PROMISE), instances

    caller, instances = asyncio.run(run())
    assert [len(each.asked) for each in instances] == [2, 1, 1]
    assert "may_decline" not in instances[0].asked[1]
    assert (caller.receipt["hops"], caller.receipt["instance"]) == (3, instances[0].address)


def test_a_hop_limit_ends_the_asking() -> None:
    """With one hop allowed the second instance may not decline any more."""

    async def run() -> Caller:
        async with routed(Instance(decline), Instance(decline), Instance(decline), max_hops=1) as router:
            return await router.answer(**PROMISE)

    assert asyncio.run(run()).receipt["hops"] == 1


@pytest.mark.parametrize("place", [False, True], ids=["forwarded", "placed"])
def test_a_session_goes_back_to_where_it_was_while_that_is_there(place: bool) -> None:
    """Its prefix is there; when that instance drains another takes it, and a session nobody knows is a new one."""

    async def run() -> list[str]:
        instances = [Instance(ticket if place else three_tokens) for _ in range(4)]
        async with routed(*instances) as router:

            async def where(session: str) -> str:
                caller = await router.answer(place=place, session_id=session, input_ids=[1] * 2000, **PROMISE)
                if not place:
                    return str(caller.receipt["instance"])
                return str(json.loads(caller.responses[-1]["control_output"][0])["instance"])

            seen = [await where("talk") for _ in range(4)]
            seen += [await where("never seen before")]
            home = next(each for each in instances if each.address == seen[0])
            home.draining = True
            await until(lambda: len(router.instances.usable) == 3)
            return [*seen, *[await where("talk") for _ in range(3)]]

    first, *again, stranger, moved, twice, thrice = asyncio.run(run())
    assert again == [first] * 3
    assert stranger
    assert first != moved == twice == thrice


def test_a_session_that_another_router_placed_goes_back_to_where_it_was() -> None:
    """The instance where its last round ended tells every router."""

    async def run() -> tuple[list[str], list[str]]:
        instances = [Instance(three_tokens) for _ in range(4)]
        for number, each in enumerate(instances):
            each.sessions = {f"of {number}": 1900}
        async with routed(*instances) as router:
            callers = [
                await router.answer(session_id=f"of {number}", input_ids=[1] * 2000, **PROMISE) for number in range(4)
            ]
            return [caller.receipt["instance"] for caller in callers], [each.address for each in instances]

    found, wanted = asyncio.run(run())
    assert found == wanted


def test_advice_is_for_several_requests_and_counts_for_none() -> None:
    """Spread over equal instances as those requests would be; the router goes on as if nobody had asked."""

    async def run() -> tuple[list[Mapping[str, Any]], bool]:
        instances = [Instance(three_tokens) for _ in range(2)]
        async with routed(*instances) as router:
            before = router.instances.fleet.table[:5].copy()
            tensors = wire.encode({"text_input": "x" * 400, "control": "suggest", **PROMISE})
            router.dispatcher.suggest(
                read_call("name", tensors, {}, caller := Caller(), time.monotonic(), math.inf, True)
            )
            advice = json.loads(caller.responses[-1]["control_output"][0])["advice"]
            return advice, bool((router.instances.fleet.table[:5] == before).all())

    advice, is_unchanged = asyncio.run(run())
    assert len({each["address"] for each in advice}) == 2
    assert all(each["may_decline"] for each in advice)
    assert is_unchanged


def test_a_question_for_advice_that_cannot_be_answered_ends() -> None:
    """With an error, not with a caller who waits."""

    async def run() -> Caller:
        async with routed(Instance(three_tokens)) as router:
            values = {"text_input": "x", "slo_ttft_ms": "soon", "slo_tpot_ms": "soon"}
            router.dispatcher.suggest(Call("name", values, caller := Caller(), time.monotonic(), math.inf, True))
            return caller

    caller = asyncio.run(run())
    assert str(caller.refusal).startswith("INTERNAL: router:")


def test_who_leaves_during_a_hop_is_answered_once_and_frees_the_instance() -> None:
    """The first declined, the second has it: that one sees the cancellation, nobody else is asked."""

    async def run() -> tuple[Caller, Instance, Instance]:
        first, second = Instance(decline), Instance(silence, requests=9.0, queued_tokens=500.0)
        async with routed(first, second) as router:
            caller = Caller()
            task = asyncio.create_task(router.ask(caller, **PROMISE))
            await until(lambda: bool(second.asked))
            task.cancel()
            await asyncio.wait_for(task, PATIENCE)
            await asyncio.wait_for(second.hung_up.wait(), PATIENCE)
            return caller, first, second

    caller, first, second = asyncio.run(run())
    assert (caller.finish_reason, caller.receipt["attained"]) == ("cancelled", False)
    assert (len(first.asked), len(second.asked)) == (1, 1)


@pytest.mark.parametrize("fault", ["a hole", "no end", "INTERNAL: broken"])
def test_an_answer_with_a_fault_goes_on_elsewhere_after_its_last_good_token(fault: str) -> None:
    """A missing token, a stream without a last response, an error of the instance: the caller sees none of it."""

    async def faulty(values: Values) -> Outputs:
        yield {"text_output": "0", "token_index": 1, "output_ids": [0]}
        if fault == "a hole":
            yield {"text_output": "2", "token_index": 3, "output_ids": [2]}
        elif fault != "no end":
            yield {"error": fault}

    async def run() -> tuple[Caller, Instance, Instance]:
        bad, good = Instance(faulty), Instance(three_tokens, requests=9.0, queued_tokens=500.0)
        async with routed(bad, good) as router:
            return await router.answer(**PROMISE), bad, good

    caller, bad, good = asyncio.run(run())
    assert caller.text == "012"
    assert good.asked[0]["resume_ids"] == [0]
    assert [loss.partition(": ")[0] for loss in caller.receipt["losses"]] == [bad.address]


def test_streams_wait_for_requests_only_where_those_may_go() -> None:
    """They are opened ahead and used; an instance that gets no more requests could not end while they are open."""

    async def run() -> Caller:
        instance = Instance(three_tokens)
        async with routed(instance) as router:
            await until(lambda: instance.open > 2)
            caller = await router.answer(**PROMISE)
            instance.draining = True
            await until(lambda: instance.open <= 1)  # but for the watch
            return caller

    assert asyncio.run(run()).text == "012"


def test_many_streams_are_held_longer_together() -> None:
    """What a response costs is shared: three streams at ten responses a second are held 0.3 s each."""

    async def run() -> list[float]:
        instance = Instance(silence)
        async with routed(instance, max_responses_s=10.0) as router:
            tasks = [asyncio.create_task(router.ask(Caller(), **PROMISE)) for _ in range(3)]
            await until(lambda: len(instance.asked) == 3)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks)
            return [values["coalesce_ms"] for values in instance.asked]

    assert max(asyncio.run(run())) == 300.0
