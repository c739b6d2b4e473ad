"""Two real instances behind two real routers: streams, placement, the ensemble, and every way to fail.

However a request goes wrong underneath, its caller gets each token once, and one end.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from slos_serve.backend.cli import main
from slos_serve.backend.launcher import Server
from slos_serve.backend.replicas import write_router_repository
from slos_serve.backend.supervisor import Limits
from slos_serve.client.client import Running, SlosClient, input_tensors
from slos_serve.client.routed import RoutedClient
from slos_serve.client.stream import Refused, Result, StreamError
from slos_serve.loadtest.bench_faults import ENGINE_PROCESS, Cable, send_signal

PATIENCE = 120.0
PROMPTS = [f"def f{i}(x):" for i in range(8)]
EASY: dict[str, Any] = {"ignore_eos": True, "slo_ttft_ms": 60e3, "slo_tpot_ms": 10e3}
ROUTER = "slos_router"
MODELS = [ROUTER, "slos_ensemble"]


class Service:
    """The servers of these tests."""

    def __init__(self, instances: Sequence[Server], routers: Sequence[Server]) -> None:
        self.instances = instances
        self.routers = routers

    @property
    def addresses(self) -> list[str]:
        return [router.grpc for router in self.routers]


def started(servers: Sequence[Server]) -> list[Server]:
    """All at the same time."""
    threads = [threading.Thread(target=server.start) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for server in servers:
        assert server.num_starts, server.tail()
    return list(servers)


@pytest.fixture(scope="module")
def service(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two instances and two routers, each restarted by a supervisor when it fails."""
    limits = Limits(probe_interval=1.0, probe_timeout=PATIENCE, first_delay=0.1)
    instances = [Server(tiny_repository, models=["slos_llm"], supervise=True, limits=limits) for _ in range(2)]
    routers: list[Server] = []
    try:
        started(instances)
        settings = {"instances": [instance.grpc for instance in instances], "unseen_tokens": 440}
        for number in range(2):
            repository = write_router_repository(tmp_path_factory.mktemp(f"router-{number}"), settings)
            routers.append(Server(repository, models=MODELS, supervise=True, limits=limits))
        started(routers)
        yield Service(instances, routers)
    finally:
        for server in (*routers, *instances):
            server.stop()


@pytest.fixture
def whole(service: Service) -> Service:
    """The service once both routers use both instances."""
    asyncio.run(until_usable(service.addresses, {instance.grpc for instance in service.instances}))
    return service


async def usable(router: str) -> set[str]:
    async with RoutedClient([router]) as client:
        return await client.usable() or set()


async def until_usable(routers: Sequence[str], wanted: set[str]) -> None:
    end = time.monotonic() + PATIENCE
    while [await usable(router) for router in routers] != [wanted] * len(routers):
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.1)


def metric(server: Server, name: str) -> float:
    connection = http.client.HTTPConnection(server.metrics, timeout=PATIENCE)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return sum(float(value) for value in re.findall(rf"^{name}\{{.*?\}} (\S+)$", text, re.MULTILINE))


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def serial(*runs: Any) -> list[Any]:
    async def run() -> list[Any]:
        return [await asyncio.wait_for(each, PATIENCE) for each in runs]

    return asyncio.run(run())


@asynccontextmanager
async def clients(service: Service) -> AsyncIterator[dict[str, SlosClient | RoutedClient]]:
    """Every way to the service."""
    async with (
        SlosClient(service.instances[0].grpc) as direct,
        SlosClient(service.addresses[0], ROUTER) as router,
        SlosClient(service.addresses[0], "slos_ensemble") as ensemble,
        RoutedClient(service.addresses) as placed,
        RoutedClient(service.addresses, placement=False) as forwarded,
    ):
        yield {"direct": direct, "router": router, "ensemble": ensemble, "placed": placed, "forwarded": forwarded}


def test_servers_end_as_soon_as_they_are_told_to(tiny_repository: Path, tmp_path: Path) -> None:
    """Nothing is left of requests that were answered, nor of streams that wait for some: nothing must be killed."""
    with Server(tiny_repository, models=["slos_llm"]) as instance:
        repository = write_router_repository(tmp_path / "repository", {"instances": [instance.grpc]})
        with Server(repository, models=MODELS) as router:
            asyncio.run(until_usable([router.grpc], {instance.grpc}))

            async def ask() -> None:
                async with clients(Service([instance], [router])) as ways:
                    for _ in range(30):
                        for way in ways.values():
                            await way.generate("def f(", max_tokens=4, **EASY).drain()
                        await usable(router.grpc)

            serial(ask())
            instance.stop()
            router.stop()
    assert (instance.exit_code, router.exit_code) == (0, 0)


def test_every_way_brings_the_same(whole: Service) -> None:
    """The same tokens, text and receipt through the router, the ensemble and placement as from an instance."""

    async def everything(way: SlosClient | RoutedClient) -> list[Result]:
        return list(await asyncio.gather(*(way.generate(p, max_tokens=24, **EASY).drain() for p in PROMPTS)))

    async def run() -> tuple[dict[str, list[Result]], set[str]]:
        async with clients(whole) as ways:
            found = {name: await everything(way) for name, way in ways.items()}
            served = {result.receipt["instance"] for result in found["router"] + found["placed"]}
            # An instance that a busy machine kept silent for a moment gets nothing until it is heard again.
            for _ in range(10):
                if len(served) < len(whole.instances):
                    await asyncio.sleep(0.5)
                    served |= {result.receipt["instance"] for result in await everything(ways["router"])}
            return found, served

    ((found, served),) = serial(run())
    want = found["direct"]
    for name, results in found.items():
        assert [(r.token_ids, r.text, r.finish_reason) for r in results] == [
            (r.token_ids, r.text, r.finish_reason) for r in want
        ], name
        assert all(want[0].receipt.keys() <= result.receipt.keys() for result in results)
        assert all(result.receipt["attained"] for result in results)
    assert served == {instance.grpc for instance in whole.instances}


def test_errors_are_those_of_an_instance(whole: Service) -> None:
    """Typed, with the field and what was got; an id in use is refused."""

    async def refused(way: SlosClient | RoutedClient, **fields: Any) -> str:
        with pytest.raises(Refused) as caught:
            await way.generate("def f(", **fields).drain()
        return str(caught.value)

    async def run() -> tuple[dict[str, str], str]:
        async with clients(whole) as ways:
            found = {name: await refused(way, max_tokens=-5) for name, way in ways.items()}
            first = ways["router"].generate("def f(", request_id="twice", max_tokens=300, ignore_eos=True)
            async for _ in first:
                break
            twice = await refused(ways["router"], request_id="twice")
            await first.aclose()
            return found, twice

    found, twice = asyncio.run(run())
    assert set(found.values()) == {"INVALID_ARGUMENT: max_tokens: must be at least 1, got -5"}
    assert twice.startswith("ALREADY_EXISTS")


def test_who_hangs_up_at_the_router_frees_the_engine(whole: Service) -> None:
    """Cancellation passes through the router and through placement; our client stops what went through the ensemble.

    There are many, so that they would take seconds.
    """
    prompts = PROMPTS * 6

    def generated() -> float:
        return sum(metric(instance, "slos_serve_generated_tokens_total") for instance in whole.instances)

    async def run(name: str) -> None:
        async with clients(whole) as ways:

            async def leave(prompt: str) -> None:
                stream = ways[name].generate(prompt, max_tokens=430, ignore_eos=True)
                async for _ in stream:
                    break
                await stream.aclose()

            await asyncio.gather(*(leave(prompt) for prompt in prompts))

    for name in ("router", "placed", "forwarded", "ensemble"):
        before = generated()
        serial(run(name))
        until(lambda: all(metric(instance, "slos_serve_requests") == 0 for instance in whole.instances))
        assert generated() - before < len(prompts) * 430 / 2, name


def test_a_stop_request_ends_what_cannot_be_cancelled(whole: Service) -> None:
    """Through the ensemble, from any router, by the id; the last response is an instance's own.

    There are many, so that they would take seconds.
    """

    async def run() -> list[Result]:
        async with (
            SlosClient(whole.addresses[0], "slos_ensemble") as ensemble,
            SlosClient(whole.addresses[1], "slos_ensemble") as other,
        ):

            async def stopped(name: str) -> Result:
                stream = ensemble.generate("def f(x):", request_id=name, max_tokens=480, **EASY)
                async for _ in stream:
                    break
                async for _ in other.responses(input_tensors({"control": "stop"}), name, None, Running()):
                    pass
                return await stream.drain()

            return await asyncio.gather(*(stopped(f"stop-{index}") for index in range(24)))

    (results,) = serial(run())
    for result in results:
        assert result.finish_reason == "cancelled"
        assert result.receipt["tokens"] == len(result.token_ids) < 480


def test_a_caller_whom_nobody_would_see_leave_gets_a_bounded_answer(whole: Service) -> None:
    """Through the ensemble a longer answer ends at the router's bound, as one that reached its length; not directly."""

    async def run() -> tuple[Result, Result]:
        async with clients(whole) as ways:
            fields = {"max_tokens": 460, **EASY}
            through = await ways["ensemble"].generate("def f(x):", **fields).drain()
            return through, await ways["router"].generate("def f(x):", **fields).drain()

    ((through, directly),) = serial(run())
    assert (len(through.token_ids), through.finish_reason) == (440, "length")
    assert len(directly.token_ids) == 460
    assert directly.token_ids[:440] == through.token_ids


def test_who_hangs_up_between_two_offers_leaves_nothing_behind(whole: Service) -> None:
    """An impossible promise is declined everywhere; callers who leave on the way free engines, ids and routers."""
    impossible = {"ignore_eos": True, "max_tokens": 400, "slo_ttft_ms": 1e-3, "slo_tpot_ms": 1e-3}

    async def leave(way: SlosClient | RoutedClient, number: int) -> None:
        stream = way.generate(PROMPTS[number % 8], request_id=f"leaver-{number}", **impossible)
        task = asyncio.create_task(stream.drain())
        await asyncio.sleep(0.002 * number)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def run() -> list[Result]:
        async with clients(whole) as ways:
            for name in ("router", "placed", "forwarded"):
                await asyncio.gather(*(leave(ways[name], number) for number in range(24)))
                await asyncio.sleep(0.5)
            again = [ways["router"].generate(PROMPTS[0], request_id=f"leaver-{n}", **impossible) for n in range(3)]
            for stream in again:
                async for _ in stream:
                    break
                await stream.aclose()
            return [await ways["router"].generate(PROMPTS[0], **{**impossible, "max_tokens": 3}).drain()]

    (((result,),),) = [serial(run())]
    assert len(result.token_ids) == 3
    assert not result.receipt["admitted"]
    until(lambda: all(metric(instance, "slos_serve_requests") == 0 for instance in whole.instances))


def test_a_request_that_was_advised_waits_for_no_router(whole: Service) -> None:
    """With the advice asked for with the one before, a request streams though all routers stand still."""

    async def run() -> Result:
        async with RoutedClient(whole.addresses) as client:
            await client.generate("def f(x):", max_tokens=3, **EASY).drain()
            await asyncio.sleep(0.5)
            for router in whole.routers:
                send_signal(router.grpc, signal.SIGSTOP)
            try:
                return await client.generate("def g(x):", max_tokens=5, **EASY).drain()
            finally:
                for router in whole.routers:
                    send_signal(router.grpc, signal.SIGCONT)

    (result,) = serial(run())
    assert len(result.token_ids) == 5
    assert result.receipt["hops"] == 0
    assert result.receipt["instance"] in {instance.grpc for instance in whole.instances}


def test_what_an_advised_instance_declines_is_placed_by_a_router(whole: Service) -> None:
    """An impossible promise of a class for which there is advice: declined, placed, and served once."""
    impossible = {"ignore_eos": True, "max_tokens": 3, "slo_ttft_ms": 1e-3, "slo_tpot_ms": 1e-3}

    async def run() -> Result:
        async with RoutedClient(whole.addresses) as client:
            await client.generate("def f(x):", max_tokens=3, **EASY).drain()
            await asyncio.sleep(0.5)
            return await client.generate("def g(x):", **impossible).drain()

    (result,) = serial(run())
    assert len(result.token_ids) == 3
    assert not result.receipt["admitted"]
    assert result.receipt["hops"] >= 2


def ledger_of(service: Service, disturb: Callable[[], None], *, count: int = 16) -> tuple[list[Result], list[Result]]:
    """The answers of `count` streams, which `disturb` interrupts; and without.

    Half are placed and half forwarded; of each, half are sampled with a seed and half greedy.
    """

    async def answers(ways: Sequence[RoutedClient], begun: asyncio.Event | None) -> list[Result]:
        async def one(number: int) -> Result:
            way = ways[number % 2]
            sampled = {"temperature": 1.0, "seed": number} if number % 4 > 1 else {}
            name = f"{time.time()}-{number}"
            stream = way.generate(PROMPTS[number % 8], max_tokens=200, request_id=name, **EASY, **sampled)
            async for delta in stream:
                if begun is not None and delta.token_index > 20:
                    begun.set()
            return stream.result

        return list(await asyncio.gather(*(one(number) for number in range(count))))

    async def run() -> tuple[list[Result], list[Result]]:
        async with clients(service) as ways:
            both = [ways["placed"], ways["forwarded"]]
            assert all(isinstance(way, RoutedClient) for way in both)
            want = await answers(both, None)  # type: ignore[arg-type]
            begun = asyncio.Event()
            task = asyncio.create_task(answers(both, begun))  # type: ignore[arg-type]
            await begun.wait()
            await asyncio.to_thread(disturb)
            return await task, want

    return asyncio.run(asyncio.wait_for(run(), PATIENCE))


def same(found: list[Result], want: list[Result]) -> bool:
    """Every request ended once, with each token once."""
    return [(r.token_ids, r.text) for r in found] == [(r.token_ids, r.text) for r in want]


def test_a_frozen_instance_loses_nothing_and_says_nothing_later(whole: Service) -> None:
    """Its requests go on elsewhere; what it still had to say when it wakes up reaches nobody."""
    frozen = whole.instances[0]
    try:
        found, want = ledger_of(whole, lambda: send_signal(frozen.grpc, signal.SIGSTOP))
        assert same(found, want)
        assert any(result.receipt["resumed_tokens"] for result in found)
        assert any(frozen.grpc in loss for result in found for loss in result.receipt["losses"])
        asyncio.run(until_usable(whole.addresses, {whole.instances[1].grpc}))
    finally:
        send_signal(frozen.grpc, signal.SIGCONT)
    asyncio.run(until_usable(whole.addresses, {instance.grpc for instance in whole.instances}))


def test_a_killed_router_loses_nothing(whole: Service) -> None:
    """Placed streams do not notice; forwarded ones go on through the other router."""
    starts = whole.routers[0].num_starts
    found, want = ledger_of(whole, lambda: send_signal(whole.routers[0].grpc, signal.SIGKILL))
    assert same(found, want)
    until(lambda: whole.routers[0].num_starts > starts)


@pytest.mark.parametrize("name", [ENGINE_PROCESS, ""], ids=["engine process", "whole server"])
def test_a_killed_instance_loses_nothing_and_comes_back(whole: Service, name: str) -> None:
    """Its requests go on elsewhere, the supervisor restarts it, and the routers use it again."""
    victim = whole.instances[1]
    starts = victim.num_starts
    found, want = ledger_of(whole, lambda: send_signal(victim.grpc, signal.SIGKILL, name))
    assert same(found, want)
    assert any(result.receipt["resumed_tokens"] for result in found)
    until(lambda: victim.num_starts > starts)
    asyncio.run(until_usable(whole.addresses, {instance.grpc for instance in whole.instances}))


def test_a_cut_network_loses_nothing_whether_it_refuses_or_falls_silent(whole: Service, tmp_path: Path) -> None:
    """Instances that are well but out of reach are as good as dead; what they said meanwhile is never heard."""
    cables = [Cable(instance.grpc) for instance in whole.instances]
    addresses = {cable.address for cable in cables}
    repository = write_router_repository(tmp_path / "repository", {"instances": sorted(addresses)})
    with Server(repository, models=MODELS) as router:
        behind = Service(whole.instances, [router])
        for cable, cut in zip(cables, (Cable.refuse, Cable.silence), strict=True):
            asyncio.run(until_usable([router.grpc], addresses))
            found, want = ledger_of(behind, partial(cut, cable))
            assert same(found, want)
            assert any(result.receipt["resumed_tokens"] for result in found)
            cable.mend()
        asyncio.run(until_usable([router.grpc], addresses))


def test_bench_faults_finds_the_longest_gap(
    tiny_repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, with one fault: every stream that met it ended, and how long it paused."""
    options = ["--rounds", "1", "--streams", "4", "--length", "200", "--only", "refused"]
    found = tmp_path / "found.json"
    assert main(["bench-faults", *options, "--model-repository", str(tiny_repository), "--json", str(found)]) == 0
    assert re.search(r"connections refused +\d+ +0 ", capsys.readouterr().out)
    for _, gap, _, error in json.loads(found.read_text())["connections refused"]:
        assert gap < PATIENCE
        assert not error


@contextmanager
def listening() -> Iterator[str]:
    """A port that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as port:
        yield f"127.0.0.1:{port.getsockname()[1]}"


def test_nobody_left_is_told_in_time_and_newcomers_are_used(whole: Service, tmp_path: Path) -> None:
    """With a refusing, a silent and a wrong port there is a clear UNAVAILABLE; a file brings an instance later."""
    with listening() as silent, socket.create_server(("127.0.0.1", 0)) as taken:
        closed = f"127.0.0.1:{taken.getsockname()[1]}"
        taken.close()
        bad = [closed, silent, whole.instances[0].http, whole.addresses[0]]
        settings = {"instances": bad, "instances_file": "more.txt", "wait_s": 1.0, "refresh_s": 0.1}
        repository = write_router_repository(tmp_path / "repository", settings)
        more = repository / ROUTER / "1" / "more.txt"
        more.write_text("")
        with Server(repository, models=MODELS) as lonely:

            async def ask(**fields: Any) -> Result:
                async with SlosClient(lonely.grpc, ROUTER) as client:
                    return await client.generate("def f(", max_tokens=5, **fields).drain()

            async def leave_while_it_streams() -> None:
                """An instance that is taken off the list finishes what it has."""
                async with SlosClient(lonely.grpc, ROUTER) as client:
                    stream = client.generate("def f(", max_tokens=450, **EASY)
                    async for _ in stream:
                        break
                    more.write_text("")
                    await until_usable([lonely.grpc], set())
                    result = await stream.drain()
                    assert (len(result.token_ids), result.receipt["losses"]) == (450, [])

            begun = time.monotonic()
            with pytest.raises(Refused, match="UNAVAILABLE: no instance for 1 s") as caught:
                asyncio.run(ask())
            assert time.monotonic() - begun < 30
            assert all(address in str(caught.value) for address in bad)
            more.write_text(whole.instances[0].grpc + "\n")
            asyncio.run(until_usable([lonely.grpc], {whole.instances[0].grpc}))
            assert len(asyncio.run(ask()).token_ids) == 5
            assert len(asyncio.run(ask(session_id="of a router that forgot it")).token_ids) == 5
            asyncio.run(leave_while_it_streams())
            with pytest.raises(StreamError):
                asyncio.run(ask())
