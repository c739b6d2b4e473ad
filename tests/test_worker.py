"""The engine thread and the senders: every request is answered exactly once, whatever happens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from callers import PATIENCE, Backend, Caller

from slos_serve.backend.config import DEFAULT_CLASSES
from slos_serve.backend.generation import Generation, Output
from slos_serve.backend.herald import Herald, Meter
from slos_serve.backend.refusal import Refusal
from slos_serve.backend.responder import Reply
from slos_serve.backend.roster import Roster
from slos_serve.backend.sessions import Sessions
from slos_serve.backend.tokenizer import Tokenizer
from slos_serve.backend.translate import Limits, Translator
from slos_serve.backend.worker import Worker
from slos_serve.client import wire
from slos_serve.scheduler import Advance, Capabilities, PerfModel, Piece, Plan, Scheduler, Slo, Stage, StepReport
from slos_serve.scheduler.dispatch import Load

CONTEXT = 256
END = 0
THINK_END = 77
PERF = PerfModel((Piece(0.0005, 0.00001),))


class CountingEngine:
    """Generates the token after the last one, in `pace` seconds per step; stops like a real engine."""

    capabilities = Capabilities(
        num_blocks=200, block_tokens=16, max_batch_tokens=64, max_batch_requests=16, max_context=CONTEXT
    )

    def __init__(self, vocab_size: int, pace: float = 0.0) -> None:
        self.vocab_size = vocab_size
        self.pace = pace
        self.live: dict[str, tuple[Generation, list[int], int]] = {}
        self.outputs: list[Output] = []
        self.fails_at_step = -1
        self.steps = 0

    def add(self, generation: Generation) -> int:
        self.live[generation.request_id] = (generation, list(generation.token_ids), 0)
        return 0

    def release(self, request_id: str) -> None:
        self.live.pop(request_id, None)

    def step(self, plan: Plan, now: float) -> StepReport:
        self.steps += 1
        if self.steps == self.fails_at_step:
            raise FloatingPointError("the device fell off the bus")
        time.sleep(self.pace)
        self.outputs = []
        advances = [self._advance(chunk.request_id, chunk.start + chunk.length) for chunk in plan.chunks]
        return StepReport(now, time.monotonic(), tuple(advances))

    def _advance(self, request_id: str, computed: int) -> Advance:
        generation, tokens, _ = self.live[request_id]
        if computed < len(tokens):
            return Advance(request_id, computed)
        token = max(1, (tokens[-1] + 1) % self.vocab_size)
        tokens.append(token)
        count = len(tokens) - len(generation.token_ids)
        stopped = generation.stop is not None and generation.stop(token)
        reason = "stop" if stopped else "length" if count == sum(generation.stage_limits) else None
        self.outputs.append(Output(request_id, (token,), reason))
        if reason:
            self.release(request_id)
        return Advance(request_id, computed, 1, 0, count == generation.stage_limits[0], reason is not None)


class Bench(Backend):
    """The worker with the counting engine."""

    def __init__(self, codec: Tokenizer, pace: float = 0.0, max_requests: int = 64, max_tokens: int = 10_000) -> None:
        super().__init__()
        self.codec = codec
        self.engine = CountingEngine(codec.vocab_size, pace)
        self.sessions = Sessions(codec, 10_000)
        self.roster = Roster(max_requests, max_tokens, lambda tokens: tokens / 100)
        limits = Limits(CONTEXT, codec.vocab_size, 32, THINK_END)
        self.meter = Meter(self.engine.capabilities, PERF.seconds)
        self.translator = Translator(codec, limits, DEFAULT_CLASSES, "chatbot", lambda tokens: 0.1, self.sessions)
        self.scheduler = Scheduler(self.engine.capabilities, PERF)
        self.worker = Worker(
            self.scheduler, self.engine, self.responder, self.metrics, self.roster, self.sessions, self.failed,
            self.meter,
        )  # fmt: skip


@pytest.fixture
def bench(codec: Tokenizer) -> Iterator[Callable[..., Bench]]:
    """Makes a running bench; all are closed at the end."""
    made: list[Bench] = []

    def make(**options: Any) -> Bench:
        made.append(Bench(codec, **options))
        made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.close()


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def letters(codec: Tokenizer, start: int, count: int) -> str:
    return codec.decode([max(1, (start + i) % codec.vocab_size) for i in range(count)])


def test_a_whole_answer_is_one_response(bench: Callable[..., Bench], codec: Tokenizer) -> None:
    """Without streaming everything comes at once, with the finish reason and the receipt."""
    caller = bench().send(input_ids=[40], max_tokens=20, return_token_ids=True).wait()
    assert len(caller.responses) == 1
    assert caller.responses[0]["output_ids"] == list(range(41, 61))
    assert caller.responses[0]["token_index"] == [20]
    assert caller.text == letters(codec, 41, 20)
    assert caller.finish_reason == "length"


def test_a_stream_counts_its_tokens_and_ends_once(bench: Callable[..., Bench], codec: Tokenizer) -> None:
    """The token index runs without a gap, the pieces are the text, and only the last has a receipt."""
    one = bench(pace=0.002)
    callers = [
        one.send(f"r{i}", input_ids=[i + 1], max_tokens=30, stream=True, return_token_ids=True) for i in range(40)
    ]
    for i, caller in enumerate(callers):
        caller.wait()
        index = np.cumsum([len(response["output_ids"]) for response in caller.responses]).tolist()
        assert index == [response["token_index"][0] for response in caller.responses]
        assert index[-1] == 30
        assert caller.text == letters(codec, i + 2, 30)
        assert ["receipt" in response for response in caller.responses].count(True) == 1
        assert len(caller.responses) > 1


def test_the_receipt_tells_what_was_promised_and_kept(bench: Callable[..., Bench]) -> None:
    """An easy SLO is admitted and attained stage by stage; best effort promises nothing."""
    one = bench()
    kept = one.send("a", input_ids=[1] * 100, max_tokens=9, thinking_tokens=4, slo_ttft_ms=20e3, slo_tpot_ms=20e3)
    free = one.send("b", input_ids=[1], max_tokens=3, slo_class="best_effort")
    receipt = kept.wait().receipt
    assert (receipt["admitted"], receipt["attained"], receipt["tokens"]) == (True, True, 9)
    assert [stage["tokens"] for stage in receipt["stages"]] == [4, 5]
    assert receipt["stages"][0]["first_token_due_ms"] == 20e3
    assert receipt["stages"][1]["first_token_due_ms"] == 100e3
    assert 0 <= receipt["queue_ms"] <= receipt["ttft_ms"] <= 20e3
    free_receipt = free.wait().receipt
    assert (free_receipt["admitted"], free_receipt["attained"]) == (False, None)
    assert "best effort" in free_receipt["reason"]


def test_an_impossible_promise_is_served_best_effort(bench: Callable[..., Bench]) -> None:
    """The answer comes all the same, and the receipt says that the promise was not made."""
    caller = bench(pace=0.01).send(input_ids=[1] * 200, max_tokens=5, slo_ttft_ms=0.001, slo_tpot_ms=1000.0).wait()
    assert caller.receipt["tokens"] == 5
    assert (caller.receipt["admitted"], caller.receipt["attained"]) == (False, False)


def test_a_stop_string_ends_text_and_generation(bench: Callable[..., Bench], codec: Tokenizer) -> None:
    """The engine stops at the token that completes it and the text ends before it."""
    whole = letters(codec, 41, 26)
    stop = whole[10:13]
    caller = bench().send(input_ids=[40], max_tokens=200, stop=[stop], stream=True, return_token_ids=True).wait()
    assert caller.text == whole[:10]
    assert caller.finish_reason == "stop"
    assert sum(len(response["output_ids"]) for response in caller.responses) == 13


def test_the_prompt_comes_first_when_asked_for(bench: Callable[..., Bench]) -> None:
    """Echo once, in the first response only."""
    one = bench(pace=0.001)
    for stream in (False, True):
        caller = one.send(text_input="hello", max_tokens=9, stream=stream, exclude_input_from_output=False).wait()
        assert caller.text.startswith("hello")
        assert caller.text.count("hello") == 1


def test_hanging_up_frees_the_engine(bench: Callable[..., Bench]) -> None:
    """Callers that are gone, waiting or running, leave nothing behind, and others are not disturbed."""
    one = bench(pace=0.01)
    callers = [one.send(f"r{i}", input_ids=[1] * 60, max_tokens=190, stream=True) for i in range(24)]
    other = one.send("other", input_ids=[1], max_tokens=20)
    until(lambda: any(caller.responses for caller in callers))
    for caller in callers:
        caller.has_hung_up = True
    for caller in callers:
        assert caller.wait().finish_reason == "cancelled"
    assert other.wait().finish_reason == "length"
    until(lambda: not one.engine.live)
    assert len(one.roster) == 0
    assert one.scheduler.free_blocks == one.engine.capabilities.num_blocks


def test_a_response_that_cannot_be_sent_ends_its_request_only(bench: Callable[..., Bench]) -> None:
    """When sending fails the request is answered with an error and cancelled."""
    one = bench(pace=0.002)
    other = one.send("other", input_ids=[1], max_tokens=50)
    caller = Caller()
    caller.breaks = True
    submission = one.translator.submission("r", wire.encode({"input_ids": [1], "stream": True}), {}, 0.0)
    one.worker.submit(Reply(submission, caller))
    assert "no shared memory left" in str(caller.wait().refusal)
    assert other.wait().finish_reason == "length"
    until(lambda: not one.engine.live)


def test_a_request_id_is_unique_in_flight_and_free_afterwards(bench: Callable[..., Bench]) -> None:
    """A second request with the id is refused; once the last response is here the id may be used again."""
    one = bench(pace=0.002)
    first = one.send("same", input_ids=[1], max_tokens=20)
    with pytest.raises(Refusal, match="ALREADY_EXISTS: id: request 'same'"):
        one.send("same", input_ids=[2])
    first.wait()
    for _ in range(20):
        one.send("same", input_ids=[2], max_tokens=2).wait()


def test_too_much_at_once_is_refused_with_a_time_to_retry(bench: Callable[..., Bench]) -> None:
    """Both bounds answer OVERLOADED; a huge max_tokens reserves nothing."""
    one = bench(pace=0.02, max_requests=3)
    callers = [one.send(f"r{i}", input_ids=[1], max_tokens=2**31 - 1) for i in range(3)]
    with pytest.raises(Refusal, match=r"OVERLOADED retry_after_ms=\d+: requests in flight: at most 3"):
        one.send("r3", input_ids=[1])
    two = bench(pace=0.02, max_tokens=100)
    callers.append(two.send("a", input_ids=[1] * 90, max_tokens=2**31 - 1))
    with pytest.raises(Refusal, match=r"OVERLOADED retry_after_ms=900: waiting prompt tokens: at most 100, got 180"):
        two.send("b", input_ids=[1] * 90)
    until(lambda: bool(two.engine.outputs))
    callers.append(two.send("b", input_ids=[1] * 90, max_tokens=1))
    callers[-1].wait()
    for caller in callers:
        caller.has_hung_up = True


def test_an_engine_failure_answers_everybody(bench: Callable[..., Bench]) -> None:
    """What is in flight, waiting or in the inbox gets INTERNAL with the cause, what comes later UNAVAILABLE."""
    one = bench(pace=0.005)
    one.engine.fails_at_step = 10
    callers = []
    refused = []
    for i in range(60):
        try:
            callers.append(one.send(f"r{i}", input_ids=[1] * 50, max_tokens=100, stream=True))
        except Refusal as refusal:
            refused.append(str(refusal))
    for caller in callers:
        assert "INTERNAL: engine: FloatingPointError: the device fell off the bus" in str(caller.wait().refusal)
    until(lambda: one.failure is not None)
    with pytest.raises(Refusal, match="UNAVAILABLE"):
        one.send("late", input_ids=[1])
    assert len(callers) + len(refused) == 60
    assert set(refused) <= {"UNAVAILABLE: the engine has stopped"}


@pytest.mark.parametrize("drain", [0.0, PATIENCE])
def test_closing_answers_or_drains(bench: Callable[..., Bench], drain: float) -> None:
    """With time in hand requests finish; without, they are answered UNAVAILABLE; none is forgotten."""
    one = bench(pace=0.005)
    callers = [one.send(f"r{i}", input_ids=[1], max_tokens=40, stream=True) for i in range(20)]
    one.close(drain)
    for caller in callers:
        assert caller.is_closed
        if drain:
            assert caller.finish_reason == "length"
        else:
            assert "UNAVAILABLE: the model is being unloaded" in str(caller.refusal)
    with pytest.raises(Refusal, match="UNAVAILABLE: the model is being unloaded"):
        one.send("late", input_ids=[1])


def test_a_session_continues_its_tokens(bench: Callable[..., Bench], codec: Tokenizer) -> None:
    """The second round's prompt begins with the very tokens of the first round."""
    one = bench()
    first = one.send("a", text_input="ab", max_tokens=10, session_id="s", return_token_ids=True).wait()
    before = [*codec.encode("ab"), *first.responses[0]["output_ids"]]
    fields = {"text_input": "ab" + first.text + " more", "session_id": "s"}
    again = one.translator.submission("b", wire.encode(fields), {}, 0.0)
    assert list(again.generation.token_ids) == [*before, *codec.encode(" more")]


def test_numbers_count_requests_but_not_probes(bench: Callable[..., Bench]) -> None:
    """Each ended request is counted once under its class and outcome; a probe works and is not."""
    one = bench()
    for i in range(5):
        one.send(f"r{i}", input_ids=[1, 2], max_tokens=3, slo_ttft_ms=20e3, slo_tpot_ms=20e3).wait()
    one.send("probe-1", input_ids=[1], max_tokens=1, slo_class="best_effort").wait()
    one.close()
    finished = (("slo_class", "chatbot"), ("outcome", "finished"))
    assert one.counted("slos_serve_requests_total") == {finished: 5}
    kept = (("slo_class", "chatbot"), ("admitted", "true"), ("attained", "true"))
    assert one.counted("slos_serve_slo_total") == {kept: 5}
    assert one.counted("slos_serve_generated_tokens_total") == {(("slo_class", "chatbot"),): 15}
    assert one.counted("slos_serve_iterations_total")[()] == one.engine.steps
    observed = [key for numbers in one.numbers for (key, _), _ in numbers.observations]
    assert observed.count("slos_serve_ttft_seconds") == 5


def test_random_traffic_is_answered_exactly_once(bench: Callable[..., Bench]) -> None:
    """Hundreds of requests that end, stop, hang up or are refused: each has one end and nothing is left."""
    one = bench(pace=0.0005, max_requests=40, max_tokens=2000)
    chance = np.random.default_rng(7)
    callers: list[Caller] = []
    refused: list[str] = []
    for i in range(400):
        fields: dict[str, Any] = {"input_ids": [1] * int(chance.integers(1, 200)), "stream": bool(chance.integers(2))}
        fields["max_tokens"] = int(chance.integers(1, 40))
        fields["slo_class"] = str(chance.choice(["chatbot", "coding", "best_effort"]))
        try:
            callers.append(one.send(f"r{i}", **fields))
        except Refusal as refusal:
            refused.append(refusal.code)
            time.sleep(0.01)
            continue
        callers[-1].has_hung_up = bool(chance.random() < 0.2)
    ends: Sequence[str] = [caller.wait().finish_reason for caller in callers]
    assert set(ends) <= {"length", "cancelled"}
    until(lambda: not one.engine.live)
    assert len(one.roster) == 0
    assert one.failure is None
    assert set(refused) <= {"OVERLOADED"}
    assert len(refused) + len(ends) == 400


# What a router sees of an instance.


@pytest.fixture
def instance(bench: Callable[..., Bench]) -> Bench:
    return bench(pace=0.002)


def ids(caller: Caller) -> list[int]:
    return [token for response in caller.responses for token in response.get("output_ids", [])]


def control(caller: Caller) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(caller.responses[-1]["control_output"][0])
    return answer


ASKED: dict[str, Any] = {
    "input_ids": [5, 6, 7], "max_tokens": 30, "stream": True, "return_token_ids": True,
    "slo_ttft_ms": 5000.0, "slo_tpot_ms": 500.0,
}  # fmt: skip
HOPELESS: dict[str, Any] = {**ASKED, "slo_ttft_ms": 0.1}


def test_what_cannot_be_promised_is_declined_with_a_prediction(instance: Bench) -> None:
    """At once, without a token; its id is free again, and without `may_decline` it is served best effort."""
    caller = instance.send(**HOPELESS, may_decline=True).wait()
    assert (caller.finish_reason, ids(caller)) == ("declined", [])
    assert 0 < caller.receipt["predicted_ttft_ms"] < 1000
    assert "best effort" in caller.receipt["reason"]
    assert instance.send(**HOPELESS).wait().finish_reason == "length"
    assert instance.send("other", **ASKED, may_decline=True).wait().receipt["admitted"] is True


def test_others_run_on_while_one_is_declined(instance: Bench) -> None:
    """A decline between two iterations takes nothing from the batch it might have been in."""
    running = [instance.send(f"run-{i}", **ASKED) for i in range(4)]
    declined = [instance.send(f"no-{i}", **HOPELESS, may_decline=True) for i in range(8)]
    assert {caller.wait().finish_reason for caller in declined} == {"declined"}
    assert all(ids(caller.wait()) == list(range(8, 38)) for caller in running)


def test_best_effort_is_never_declined(instance: Bench) -> None:
    """It was promised nothing, so nothing is broken."""
    caller = instance.send(input_ids=[5], max_tokens=3, slo_class="best_effort", may_decline=True).wait()
    assert caller.finish_reason == "length"


def test_an_accepted_offer_runs_at_once_and_is_claimed_with_its_ticket(instance: Bench) -> None:
    """The offerer gets a ticket; whoever brings it gets every token from the first on, once."""
    offerer = instance.send(is_offer=True, may_decline=True, **ASKED).wait()
    ticket = control(offerer)["ticket"]
    until(lambda: instance.engine.steps > 10)
    claimer = Caller()
    instance.responder.claim(instance.worker.tickets.take(ticket), claimer)
    assert ids(claimer.wait()) == list(range(8, 38))
    assert claimer.receipt["admitted"] is True
    with pytest.raises(Refusal, match="UNAVAILABLE: ticket"):
        instance.worker.tickets.take(ticket)


def test_an_offer_that_cannot_be_promised_is_declined_without_a_ticket(instance: Bench) -> None:
    """The offerer learns it in the same way."""
    assert instance.send(is_offer=True, may_decline=True, **HOPELESS).wait().finish_reason == "declined"


def test_an_offer_that_nobody_claims_ends(instance: Bench) -> None:
    """Its request is cancelled when the ticket expires, and the ticket is worth nothing then."""
    instance.worker.tickets.seconds = 0.05
    endless = {**ASKED, "max_tokens": 200}
    ticket = control(instance.send(is_offer=True, **endless).wait())["ticket"]
    expired = time.monotonic() + 3 * instance.worker.tickets.seconds
    until(lambda: time.monotonic() > expired and not instance.engine.live)
    try:
        instance.responder.claim(instance.worker.tickets.take(ticket), late := Caller())
        refusal = late.wait().refusal
    except Refusal as error:
        refusal = error
    assert refusal is not None
    assert refusal.code == "UNAVAILABLE"


def test_a_request_is_stopped_by_its_id(instance: Bench) -> None:
    """For callers that cannot hang up; an unknown id is no error."""
    caller = instance.send("mine", **{**ASKED, "max_tokens": 200})
    until(lambda: bool(caller.responses))
    instance.worker.cancel_id("nobody's")
    instance.worker.cancel_id("mine")
    assert caller.wait().finish_reason == "cancelled"


def test_another_instance_goes_on_after_the_last_token(instance: Bench, codec: Tokenizer) -> None:
    """The same tokens and text as without the break, counted on; the receipt tells the whole story."""
    whole = instance.send("whole", **ASKED).wait()
    times = [10.0 * i for i in range(12)]
    rest = instance.send("rest", **ASKED, resume_ids=list(range(8, 20)), resume_times_ms=times, elapsed_ms=300.0).wait()
    assert ids(rest) == ids(whole)[12:]
    assert letters(codec, 8, 12) + rest.text == whole.text
    assert rest.responses[0]["token_index"][0] >= 13
    assert rest.responses[-1]["token_index"] == [30]
    receipt = rest.receipt
    assert (receipt["tokens"], receipt["resumed_tokens"], receipt["ttft_ms"]) == (30, 12, 0.0)
    assert receipt["worst_gap_ms"] >= 150
    assert receipt["attained"] is True


def test_a_break_that_cost_the_deadline_shows_in_the_receipt(instance: Bench) -> None:
    """Deadlines stay where they were: a token that comes after the break is late."""
    tight = {**ASKED, "slo_ttft_ms": 100.0, "slo_tpot_ms": 20.0}
    caller = instance.send(**tight, resume_ids=[8, 9], resume_times_ms=[50.0, 60.0], elapsed_ms=2000.0).wait()
    assert caller.receipt["attained"] is False
    assert len(ids(caller)) == 28


def test_the_deadline_of_the_next_token_is_that_of_the_whole_request(instance: Bench) -> None:
    """What is left is planned as a request whose first token is due when the next one was."""
    asked = {**ASKED, "thinking_tokens": 10, "slo_thinking_tpot_ms": 40.0, "slo_ttft_ms": 100.0, "slo_tpot_ms": 80.0}
    early = instance.submission(**asked, resume_ids=[8] * 4, resume_times_ms=[0.0] * 4)
    first, answer = early.request.stages
    assert (first.max_new_tokens, answer) == (6, Stage(20, Slo(0.1, 0.08)))
    assert first.slo is not None
    assert (first.slo.ttft, first.slo.tpot) == (pytest.approx(0.26), pytest.approx(0.04))
    assert early.generation.stage_limits == (6, 20)
    thought = instance.submission(**asked, resume_ids=[8, THINK_END, 9], resume_times_ms=[0.0] * 3)
    (rest,) = thought.request.stages
    assert rest.slo is not None
    assert (rest.max_new_tokens, rest.slo.ttft) == (19, pytest.approx(0.3))
    assert thought.resumed is not None
    assert thought.resumed.stage_tokens == (2, 1)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"resume_ids": [8], "resume_times_ms": []}, "resume_times_ms"),
        ({"resume_ids": [], "resume_times_ms": [1.0]}, "resume_times_ms"),
        ({"resume_ids": [10**6], "resume_times_ms": [1.0]}, "resume_ids"),
        ({"resume_ids": [8] * 30, "resume_times_ms": [1.0] * 30}, "resume_ids"),
        ({"resume_ids": [8], "resume_times_ms": [float("nan")]}, "resume_times_ms"),
        ({"elapsed_ms": -1.0}, "elapsed_ms"),
        ({"coalesce_ms": float("inf")}, "coalesce_ms"),
    ],
)
def test_what_cannot_be_resumed_is_refused(instance: Bench, fields: dict[str, Any], named: str) -> None:
    """By the field that is wrong."""
    with pytest.raises(Refusal, match=f"INVALID_ARGUMENT: {named}: "):
        instance.submission(**ASKED, **fields)


def test_tokens_that_are_early_are_held_and_sent_together(instance: Bench) -> None:
    """The first goes at once; the others come in fewer responses, all of them and in order."""
    caller = instance.send(**{**ASKED, "max_tokens": 60}, coalesce_ms=40.0).wait()
    assert ids(caller) == list(range(8, 68))
    assert len(caller.responses[0]["output_ids"]) <= 2
    assert len(caller.responses) < 20


def test_tokens_that_are_due_are_not_held(instance: Bench) -> None:
    """However long the caller would have them wait."""
    tight = {**ASKED, "slo_ttft_ms": 1.0, "slo_tpot_ms": 0.5}
    caller = instance.send(**tight, coalesce_ms=10_000.0).wait()
    assert len(caller.responses) > 8


def test_a_watcher_hears_loads_until_its_watch_is_over(instance: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads go on while the engine works, and closing ends the watch."""
    monkeypatch.setattr("slos_serve.backend.herald.WATCH_SECONDS", 0.3)
    herald = Herald(instance.meter, {"instance": "abc"})
    herald.start()
    instance.send(**{**ASKED, "max_tokens": 200})
    herald.watch(first := Caller())
    states = [json.loads(response["control_output"][0]) for response in first.wait().responses]
    assert len(states) >= 3
    assert all(state["instance"] == "abc" and not state["draining"] for state in states)
    assert any(Load.from_json(state["load"]).requests > 0 for state in states)
    assert all(0 <= state["engine_age"] < PATIENCE for state in states)
    herald.watch(second := Caller())
    herald.close()
    assert json.loads(second.wait().responses[-1]["control_output"][0])["draining"] is True


def test_a_watcher_hears_where_a_session_is(instance: Bench) -> None:
    """For a moment after its round has ended, with as many tokens as are cached."""
    instance.send(**{**ASKED, "session_id": "talk"}).wait()
    herald = Herald(instance.meter, {})
    herald.start()
    herald.watch(watcher := Caller())
    herald.close()
    told = json.loads(watcher.wait().responses[0]["control_output"][0])["sessions"]
    assert list(told) == ["talk"]
    assert told["talk"] > ASKED["max_tokens"]


def test_a_load_is_plain_numbers(instance: Bench) -> None:
    """numpy's own types do not survive JSON."""
    assert all(value is None or isinstance(value, float) for value in instance.meter.load.to_json().values())
    assert not isinstance(instance.meter.load.step, np.floating)
