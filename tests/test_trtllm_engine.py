"""A replica on TensorRT-LLM: settings, loading, serving and stepping down, on the stand-in engine."""

from __future__ import annotations

import asyncio
import enum
import importlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from callers import PATIENCE, Backend
from trtllm_standin import next_token

from slos_serve.backend import trtllm_api, trtllm_engine, trtllm_pilot, trtllm_ranks, trtllm_speed
from slos_serve.backend.build import build_engine
from slos_serve.backend.cli import main
from slos_serve.backend.config import parse_config, read_config
from slos_serve.backend.generation import Generation, SamplingParams
from slos_serve.backend.refusal import Refusal
from slos_serve.backend.roster import Roster
from slos_serve.backend.sessions import Sessions
from slos_serve.backend.shipped import shipped_profile
from slos_serve.backend.translate import Limits, Translator
from slos_serve.backend.trtllm_engine import TrtllmBuilt
from slos_serve.backend.trtllm_front import LlmFront, LlmHandle
from slos_serve.backend.trtllm_load import draft_schedule
from slos_serve.backend.trtllm_pilot import Ticket
from slos_serve.backend.trtllm_worker import Tickets
from slos_serve.scheduler import PerfModel, Piece, Request, Slo, Stage

VOCABULARY = 304
EASY = {"slo_ttft_ms": 60_000.0, "slo_tpot_ms": 5_000.0}  # kept on the busiest machine
SETTINGS: dict[str, Any] = {
    "engine": "tensorrt_llm", "dtype": "bfloat16", "max_context": 128, "max_batch_tokens": 64, "max_batch_requests": 8,
    "block_tokens": 8, "max_requests": 64,
}  # fmt: skip


@pytest.fixture
def version(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A version folder with a model folder in it: a tokenizer and a configuration."""
    folder = tmp_path / "1" / "target"
    shutil.copytree(tokenizer_folder, folder)
    shape = {"vocab_size": VOCABULARY, "eos_token_id": 0, "hidden_size": 4096, "num_hidden_layers": 32}
    (folder / "config.json").write_text(json.dumps(shape))
    return tmp_path / "1"


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planner that waits for a busy machine's CPU is not slow, and half a second of warm-up is enough."""
    monkeypatch.setattr(trtllm_pilot, "SLOW_SECONDS", 10.0)
    monkeypatch.setattr(trtllm_speed, "WARM_UP_SECONDS", 0.5)


@pytest.fixture(params=["1.2"])
def release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The release that is installed: its modules are imported anew, and as they were afterwards."""

    def ours() -> list[str]:
        return [name for name in sys.modules if name == "trtllm_llm" or name.split(".")[0] == "tensorrt_llm"]

    for name in ours():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("STANDIN_RELEASE", request.param)
    yield request.param
    for name in ours():
        del sys.modules[name]


ALL = pytest.mark.parametrize("release", ["1.1", "1.2", "1.3"], indirect=True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this machine had one A100."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100-SXM4-80GB")


class Replica(Backend):
    """A built replica on the stand-in."""

    def __init__(self, version: Path, own: dict[str, Any], settings: dict[str, Any]) -> None:
        super().__init__()
        config = parse_config(json.dumps({**SETTINGS, **settings, "tensorrt_llm": own}))
        built = build_engine(config, version)
        assert isinstance(built, TrtllmBuilt)
        self.built = built
        sessions = Sessions(built.codec, 10_000)
        limits = Limits(built.max_context, built.vocab_size, 16)
        self.translator = Translator(built.codec, limits, config.classes, "chatbot", built.prefill_seconds, sessions)
        roster = Roster(64, 100_000, built.prefill_seconds)
        self.worker = built.worker(self.responder, self.metrics, roster, sessions, self.failed)
        self.start()


@pytest.fixture
def replica(version: Path, gpu: None) -> Iterator[Callable[..., Replica]]:
    """Makes a running replica; all are closed at the end."""
    made: list[Replica] = []

    def make(settings: dict[str, Any] | None = None, **own: Any) -> Replica:
        made.append(Replica(version, own, settings or {}))
        return made[-1]

    yield make
    for each in made:
        each.close()


def answer(prompt: list[int], new: int) -> list[int]:
    """What the stand-in model says after a prompt."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + new:
        tokens.append(next_token(tokens, VOCABULARY))
        if tokens[-1] == 0:
            break
    return tokens[len(prompt) :]


def held(front: LlmFront, when: Callable[[], bool]) -> tuple[threading.Event, threading.Event]:
    """Stop the engine before its first turn at which `when` holds. It is `inside` then, and waits for `go_on`."""
    inside, go_on, take = threading.Event(), threading.Event(), front._llm._take

    def waits(wait: bool) -> Any:
        if not go_on.is_set() and when():
            inside.set()
            go_on.wait(PATIENCE)
        return take(wait)

    front._llm._take = waits
    return inside, go_on


@ALL
@pytest.mark.filterwarnings("error:the FCFS waiting queue")
@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@pytest.mark.parametrize("mode", ["full", "trim", "governor", "shadow"])
def test_requests_are_answered_with_a_receipt(
    replica: Callable[..., Replica], release: str, mode: str, overlap: bool
) -> None:
    """Sixteen requests of all classes: the right tokens, once, and a receipt that says what was promised."""
    running = replica(mode=mode, overlap=overlap)
    asked = [EASY, {"slo_class": "coding"}, {"slo_class": "best_effort"}, {"slo_class": "summarization"}]
    prompts = [[5 + i] * (3 + 5 * i) for i in range(16)]
    callers = [
        running.send(f"r{i}", input_ids=prompt, max_tokens=12, return_token_ids=True, **asked[i % 4])
        for i, prompt in enumerate(prompts)
    ]
    for prompt, caller in zip(prompts, callers, strict=True):
        caller.wait()
        assert caller.refusal is None
        ids = [token for response in caller.responses for token in response.get("output_ids", [])]
        assert ids == answer(prompt, 12)
        assert caller.receipt["tokens"] == len(ids)
        assert caller.receipt["ttft_ms"] > 0
    admitted = [caller.receipt["admitted"] for caller in callers]
    assert all(admitted[::4])
    assert not any(admitted[2::4])
    running.close()
    gauges = {
        labels: value
        for numbers in running.numbers
        for (name, labels), value in numbers.gauges.items()
        if name == "slos_serve_trtllm_mode"
    }
    assert [dict(labels)["mode"] for labels, value in gauges.items() if value] == [mode]


def test_a_caller_may_leave_and_a_stop_string_ends_a_text(replica: Callable[..., Replica]) -> None:
    """Cancelling and stopping both free the engine, which goes on with the others."""
    running = replica(mode="full", overlap=True)
    gone = running.send("gone", input_ids=[9] * 20, max_tokens=90)
    text = running.send("text", input_ids=[7, 7, 7], max_tokens=40).wait().text
    stopped = running.send("stopped", input_ids=[7, 7, 7], max_tokens=40, stop=[text[3:5]]).wait()
    assert stopped.text == text[: text.index(text[3:5])]
    assert stopped.finish_reason == "stop"
    gone.has_hung_up = True
    gone.wait()
    assert running.send("again", input_ids=[7, 7, 7], max_tokens=40).wait().text == text


@pytest.mark.parametrize("finishes", [True, False], ids=["as we do", "at once"])
def test_a_prompt_that_is_given_up_spoils_nobody_else_s(replica: Callable[..., Replica], finishes: bool) -> None:
    """With block reuse a cancel waits for the prompt's end; at once, the next one with it would read garbage."""
    front = replica({"max_batch_tokens": 16}, mode="full", overlap=True).built.front
    front._finishes_prompts = finishes
    prompt = list(range(10, 106))

    def in_the_middle() -> bool:
        return any(16 <= request.context_current_position < 80 for request in front.engine.active_requests)

    inside, go_on = held(front, in_the_middle)

    async def run() -> list[int]:
        wish = Generation("r", prompt, (8,), SamplingParams(ignore_eos=True))
        handle = front.generate(wish, (), Tickets(), None)
        assert inside.wait(PATIENCE)
        handle.abort()
        go_on.set()
        async for _ in handle.results():
            pass
        again = front.generate(wish, (), Tickets(), None)
        return [token async for fresh in again.results() for token in fresh.token_ids]

    assert (asyncio.run(run()) == answer(prompt, 8)) is finishes


def test_a_text_sent_twice_in_a_session_keeps_its_history(replica: Callable[..., Replica]) -> None:
    """A later round starts with the tokens of the one before, as they were generated."""
    running = replica(mode="full")
    first = running.send("a", text_input="def f(x)", session_id="s", max_tokens=8).wait()
    second = running.send("b", text_input=f"def f(x){first.text} return", session_id="s", max_tokens=8).wait()
    assert second.receipt["prompt_tokens"] > first.receipt["prompt_tokens"]


def test_thinking_has_a_pace_and_a_stage_of_its_own(replica: Callable[..., Replica]) -> None:
    """The receipt tells both stages."""
    running = replica(mode="full")
    receipt = (
        running.send("r", input_ids=[3, 4, 5], max_tokens=20, thinking_tokens=8, slo_class="reasoning").wait().receipt
    )
    assert [stage["tokens"] for stage in receipt["stages"]] == [8, receipt["tokens"] - 8]


def test_a_dead_engine_is_noticed_and_everybody_is_answered(
    version: Path, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When TensorRT-LLM's loop ends, what is in flight gets INTERNAL and nothing more is accepted."""
    monkeypatch.setenv("STANDIN_FAILS_AT", "30")
    running = Replica(version, {"mode": "full"}, {})
    caller = running.send("r", input_ids=[5] * 9, max_tokens=110)
    caller.wait()
    assert caller.refusal is not None
    assert caller.refusal.code == "INTERNAL"
    until = time.monotonic() + PATIENCE
    while running.failure is None and time.monotonic() < until:
        time.sleep(0.01)
    assert "event loop has ended" in str(running.failure)
    with pytest.raises(Refusal) as refused:
        running.send("late", input_ids=[5], max_tokens=1)
    assert refused.value.code == "UNAVAILABLE"
    running.close()


def test_unloading_answers_what_is_in_flight(replica: Callable[..., Replica]) -> None:
    """What does not end in time is UNAVAILABLE."""
    running = replica(mode="full")
    callers = [running.send(f"r{i}", input_ids=[5 + i] * 9, max_tokens=110) for i in range(6)]
    running.close()
    codes = {caller.wait().refusal.code for caller in callers if caller.wait().refusal is not None}
    assert codes == {"UNAVAILABLE"}


@pytest.mark.parametrize("mode", ["full", "governor"])
def test_a_warm_up_run_measures_what_no_profile_knows(
    replica: Callable[..., Replica], version: Path, mode: str
) -> None:
    """A model that no shipped profile is about gets a time model: by a pilot looking on, else from the outside."""
    path = version / "target" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": 64}))
    running = replica(mode=mode)
    assert running.built.perf.to_json() != trtllm_speed.UNMEASURED
    assert running.built.prefill_seconds(60) > 0.001  # a busy machine shifts time between the fixed part and the slope
    assert running.send("r", input_ids=[5] * 9, max_tokens=5).wait().receipt["tokens"]


def test_shipped_profiles_are_chosen_by_gpu_and_model(version: Path) -> None:
    """A name that contains the card, and the model's shape; host time is added."""
    found = shipped_profile("NVIDIA H100 80GB HBM3", version / "target", 1)
    assert found is not None
    assert found[0] == "h100-llama-3-8b"
    assert shipped_profile("NVIDIA H100 80GB HBM3", version / "target", 8) is None
    assert shipped_profile("NVIDIA L4", version / "target", 1) is None


# Bad input


@pytest.mark.parametrize(
    ("settings", "own", "message"),
    [
        ({"dtype": "float32"}, {}, "dtype: tensorrt_llm computes in bfloat16 or float16"),
        ({"model": "nowhere"}, {}, "nowhere has no config.json"),
        ({"policy": "luck"}, {}, "policy: must be one of"),
        ({"block_tokens": 12}, {}, "block_tokens: must be a power of two, got 12"),
        ({"max_batch_tokens": 4}, {}, "max_batch_tokens: must hold one block"),
        ({}, {"speculation": "draft_target"}, "draft_model: speculation 'draft_target' needs one"),
        ({"draft_model": "target"}, {"speculation": "ngram"}, "draft_model: speculation 'ngram' has none"),
        ({"max_draft": 0}, {"speculation": "ngram"}, "max_draft: speculation 'ngram' needs at least 1"),
        ({}, {"speculation": "ngram", "overlap": True, "mode": "full"}, "overlap: must be false"),
        ({}, {"speculation": "ngram", "overlap": True}, "overlap: must be false"),
        ({}, {"tensor_parallel": 2}, "tensor_parallel: 2 GPUs are needed, 1 are there"),
        ({"profile": "mine.json"}, {}, "profile: there is no file"),
    ],
)
def test_what_cannot_be_served_is_named_at_load(
    version: Path, gpu: None, settings: dict[str, Any], own: dict[str, Any], message: str
) -> None:
    """The model stays not ready, and the message says which setting and what was got."""
    config = parse_config(json.dumps({**SETTINGS, **settings, "tensorrt_llm": own}))
    with pytest.raises(ValueError, match=re.escape(message)):
        build_engine(config, version)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"mode": "fast"}, "tensorrt_llm: mode: must be one of auto, full"),
        ({"kv_fraction": 1.5}, "tensorrt_llm: kv_fraction: must be a number between 0 and 1, got 1.5"),
        ({"overlap": 1}, "tensorrt_llm: overlap: must be true or false, got 1"),
        ({"tensor_parallel": 0}, "tensorrt_llm: tensor_parallel: must be an integer of at least 1, got 0"),
        ({"tp": 2}, "tensorrt_llm: its settings: unknown key 'tp'"),
        ([], "tensorrt_llm: its settings: must be a JSON object, got []"),
    ],
)
def test_wrong_settings_are_named(own: Any, message: str) -> None:
    """As for all settings."""
    with pytest.raises(ValueError, match=r"^engine\.json: " + re.escape(message)):
        parse_config(json.dumps({"tensorrt_llm": own}))


def test_a_machine_without_tensorrt_llm_says_where_it_comes_from(
    version: Path, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in NVIDIA's image."""
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(ValueError, match=r"nvcr\.io/nvidia/tritonserver"):
        build_engine(parse_config(json.dumps(SETTINGS)), version)


def test_an_engine_that_cannot_be_loaded_says_so_in_its_own_words(
    version: Path, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever TensorRT-LLM raises while loading: a library that is missing, weights that do not fit."""
    monkeypatch.setenv("STANDIN_PACE", "fast")
    with pytest.raises(ValueError, match=r"standin cannot load .*target: ValueError: could not convert"):
        build_engine(parse_config(json.dumps(SETTINGS)), version)
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(OSError("libnvinfer.so.10")))
    with pytest.raises(ValueError, match=r"tensorrt_llm cannot be imported \(libnvinfer\.so\.10\)"):
        trtllm_api.load()


def test_a_machine_without_a_gpu_or_with_an_old_one_is_refused(
    version: Path, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-LLM would fail later and in more words."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(ValueError, match=r"capability 7\.5, at least 8\.0 is needed"):
        build_engine(parse_config(json.dumps(SETTINGS)), version)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="1 GPUs are needed, 0 are there"):
        build_engine(parse_config(json.dumps(SETTINGS)), version)


def compiled(version: Path, build: dict[str, Any], made_by: str = "1.2.1") -> None:
    """Turn the model folder into a compiled engine's."""
    (version / "target" / "rank0.engine").touch()
    content = {"version": made_by, "build_config": build, "pretrained_config": {"vocab_size": VOCABULARY}}
    (version / "target" / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("release", "build", "own", "message"),
    [
        ("1.2", {"plugin_config": {"paged_kv_cache": False}}, {}, "built without a paged KV cache"),
        ("1.2", {"plugin_config": {"use_paged_context_fmha": False}}, {}, "built without chunked context"),
        ("1.2", {"max_num_tokens": 32}, {}, "max_batch_tokens: "),
        ("1.2", {}, {"mode": "full"}, "a compiled engine can only be governed"),
        ("1.2", {}, {"tensor_parallel": 2}, "was built for 1, got 2"),
        ("1.1", {}, {}, "was built by TensorRT-LLM 1.2.1, this is 1.1.0+standin: build it again"),
        ("1.3", {}, {}, "was built by TensorRT-LLM 1.2.1, this is 1.3.0+standin: build it again"),
    ],
    indirect=["release"],
)
def test_a_compiled_engine_that_cannot_be_served_is_refused(
    version: Path, gpu: None, release: str, build: dict[str, Any], own: dict[str, Any], message: str
) -> None:
    """Its own configuration says how it was built."""
    compiled(version, build)
    with pytest.raises(ValueError, match=re.escape(message)):
        build_engine(parse_config(json.dumps({**SETTINGS, "tensorrt_llm": own})), version)


@pytest.mark.parametrize("release", ["1.3"], indirect=True)
def test_a_release_without_compiled_engines_says_so(version: Path, gpu: None, release: str) -> None:
    """They are retired since 1.3, whoever built them."""
    compiled(version, {}, "1.3.0")
    with pytest.raises(ValueError, match="a compiled engine folder, and this TensorRT-LLM runs none"):
        build_engine(parse_config(json.dumps(SETTINGS)), version)


def test_a_compiled_engine_is_governed(replica: Callable[..., Replica], version: Path, release: str) -> None:
    """Through the executor's API: promised, ordered and bounded in front of it, timed from outside."""
    compiled(version, {})
    running = replica()
    assert running.built.mode.value == "governor"
    assert "no Python scheduler" in running.built.findings.reasons[0]
    caller = running.send("r", input_ids=[4, 5, 6], max_tokens=12, return_token_ids=True, **EASY).wait()
    assert [token for response in caller.responses for token in response.get("output_ids", [])] == answer([4, 5, 6], 12)
    assert caller.receipt["admitted"]


def test_a_draft_of_another_vocabulary_is_refused(version: Path, gpu: None) -> None:
    """Its guesses would be other tokens."""
    shutil.copytree(version / "target", version / "draft")
    (version / "draft" / "config.json").write_text(json.dumps({"vocab_size": 100}))
    settings = {**SETTINGS, "draft_model": "draft", "tensorrt_llm": {"speculation": "draft_target"}}
    with pytest.raises(ValueError, match=r"has a vocabulary of 100, .* one of 304"):
        build_engine(parse_config(json.dumps(settings)), version)


def test_speculation_is_planned_where_the_drafter_asks(replica: Callable[..., Replica]) -> None:
    """The planner's draft length reaches the engine, and the text is the same as without."""
    running = replica({"max_draft": 3}, mode="full", speculation="ngram")
    assert running.built.capabilities.max_draft == 3
    caller = running.send("r", input_ids=[4, 5, 6], max_tokens=60, return_token_ids=True).wait()
    ids = [token for response in caller.responses for token in response.get("output_ids", [])]
    assert ids == answer([4, 5, 6], 60)
    running.close()
    assert sum(running.counted("slos_serve_accepted_tokens_total").values()) > 0


# Official switches


@ALL
def test_the_official_switches_are_used_where_a_release_has_them(replica: Callable[..., Replica], release: str) -> None:
    """The Python scheduler, the priority queue, and KV manager 1; a release without them is not told of them."""
    front = replica(mode="full").built.front
    scheduler, cache = front._llm.args["scheduler_config"], front._llm.args["kv_cache_config"]
    has = release == "1.3"
    assert type(front.engine.scheduler.pilot.stock).__name__ == ("SimpleUnifiedScheduler" if has else "SimpleScheduler")
    assert getattr(getattr(scheduler, "waiting_queue_policy", None), "value", None) == ("priority" if has else None)
    assert getattr(cache, "use_kv_cache_manager_v2", None) == (False if has else None)
    assert front._takes_priority is has


@pytest.mark.parametrize("release", ["1.3"], indirect=True)
def test_a_queue_that_knows_no_priority_is_left_alone(
    replica: Callable[..., Replica], release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In between there were releases whose only policy was first come, first served."""
    llmapi = importlib.import_module("tensorrt_llm.llmapi")
    only = enum.Enum("WaitingQueuePolicy", {"FCFS": "fcfs"})
    monkeypatch.setattr(llmapi.SchedulerConfig.model_fields["waiting_queue_policy"], "annotation", only)
    running = replica(mode="full")
    assert running.built.front._llm.args["scheduler_config"].waiting_queue_policy is None
    assert running.send("r", input_ids=[5] * 9, max_tokens=5).wait().receipt["tokens"]


@pytest.mark.parametrize("release", ["1.3"], indirect=True)
def test_the_engine_s_own_queue_serves_the_tightest_promise_first(
    replica: Callable[..., Replica], release: str
) -> None:
    """Requests that pile up in front of a full engine go in by their SLO, best effort last."""
    front = replica(mode="governor").built.front
    front.engine.max_num_active_requests = 1
    slos = [None, None, Slo(5.0, 0.1), Slo(0.2, 0.1), None, Slo(1.0, 0.1)]

    inside, go_on = held(front, lambda: True)
    ended: list[int] = []

    async def drain(index: int, handle: LlmHandle) -> None:
        async for _ in handle.results():
            pass
        ended.append(index)

    async def run() -> None:
        assert inside.wait(PATIENCE)
        handles = []
        for index, slo in enumerate(slos):
            wish = Generation(f"r{index}", [7, index], (6,), SamplingParams(ignore_eos=True))
            ticket = Ticket(Request(f"r{index}", 0.0, 2, (Stage(6, slo),)))
            handles.append(front.generate(wish, (), Tickets(), ticket))
        go_on.set()
        await asyncio.gather(*(drain(index, handle) for index, handle in enumerate(handles)))

    asyncio.run(run())
    assert ended == [3, 5, 2, 0, 1, 4]


@ALL
def test_the_drafter_is_given_a_schedule_that_never_stops_guessing(
    replica: Callable[..., Replica], release: str
) -> None:
    """Up to 1.2 a key is where its length begins, since 1.3 where it ends: the most at every batch size, in both."""
    front = replica({"max_draft": 3}, mode="trim", speculation="ngram").built.front
    lookup = type(front.engine.drafter).get_draft_len_for_batch_size
    assert {lookup(front.engine.drafter, size) for size in range(1, 9)} == {3}


@ALL
@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_an_engine_that_guesses_inside_gets_a_schedule_where_it_looks_one_up(
    replica: Callable[..., Replica], version: Path, release: str, kind: str
) -> None:
    """As many guesses as pay at each batch size, by the time model; before 1.3 the number is fixed."""
    draft = {"draft_model": "draft"} if kind == "eagle3" else {}
    if draft:
        shutil.copytree(version / "target", version / "draft")
    running = replica({"max_draft": 3, **draft}, mode="full", speculation=kind)
    config = running.built.front._llm.args["speculative_config"]
    if release == "1.3":
        assert list(config.draft_len_schedule) == [1, 2, 4, 8]
        assert config.draft_len_schedule[1] == 3
    else:
        assert config.draft_len_schedule is None
    assert running.built.capabilities.max_draft == 0  # not the planner's to choose
    caller = running.send("r", input_ids=[4, 5, 6], max_tokens=60, return_token_ids=True).wait()
    assert [token for response in caller.responses for token in response.get("output_ids", [])] == answer([4, 5, 6], 60)


def test_a_draft_schedule_falls_with_the_batch() -> None:
    """Where tokens are free everybody guesses all; where they cost, the last guesses do not pay, but one stays."""
    free = PerfModel((Piece(0.01, 1e-9),))
    assert draft_schedule(free, 4, 6) == {1: 4, 2: 4, 4: 4, 6: 4}
    costly = PerfModel((Piece(0.01, 0.0), Piece(0.0, 1e-4)))
    schedule = draft_schedule(costly, 4, 256)
    assert schedule[1] == 4
    assert schedule[256] == 1
    assert list(schedule.values()) == sorted(schedule.values(), reverse=True)


# The command for somebody with a GPU


def test_the_check_command_passes_on_the_stand_in(
    version: Path, gpu: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ten checks are there and pass where they can be tried, the four modes are played, the file holds it all."""
    (version / "engine.json").write_text(json.dumps(SETTINGS))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "standin"))  # for the child that it starts
    monkeypatch.setenv("STANDIN_GPU", f"not {os.getpid()}")
    out, profile = tmp_path / "check.json", tmp_path / "profile.json"
    code = main(["trtllm-check", str(version), "--out", str(out), "--seconds", "1", "--profile", str(profile)])
    printed, errors = capfd.readouterr()
    report = json.loads(out.read_text())
    states = {result["name"]: result["passed"] for result in report["checks"]}
    assert list(states) == [
        "G1", "G1 overlap", "G2", "G3", "G3 overlap", "G4", "G5", "G6", "G7", "G8", "G9", "G10"
    ]  # fmt: skip
    failed = {name for name, passed in states.items() if passed is False}
    assert failed <= {"G9"}, printed + errors  # how regular the times are here is no fault of ours
    assert code == bool(failed)
    assert {name for name, passed in states.items() if passed is None} == {"G2", "G5"}  # no room, no draft model
    details = {result["name"]: result["detail"] for result in report["checks"]}
    assert "this release does not bear a pause there" in details["G4"]
    assert re.search(r"tpot_ms [\d.]+ in this process, [\d.]+ in its own", details["G10"])
    assert [row["mode"] for row in report["workload"]] == ["stock", "shadow", "trim", "full"]
    assert [row["mode_at_end"] for row in report["workload"]] == ["stock", "shadow", "trim", "full"]
    assert report["probe"] == {"mode": "full", "reasons": []}
    assert report["start"]["mode"] == "full"
    assert set(report["decode_ms"]) == {"shadow", "trim", "full"}
    assert "| full |" in printed
    (version / "engine.json").write_text(json.dumps({**SETTINGS, "profile": str(profile)}))
    again = build_engine(read_config(version), version)
    assert isinstance(again, TrtllmBuilt)
    assert again.perf.to_json() == report["fit"]["perf"]
    again.front.shutdown()


# Several GPUs


@pytest.fixture
def two_gpus(gpu: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two of them, and ranks whose interpreter has run the line of the .pth file; as it was, afterwards."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    creator = importlib.import_module(trtllm_ranks.CREATOR)
    original = creator.create_py_executor
    load = trtllm_engine.load
    monkeypatch.setattr(trtllm_engine, "load", lambda *args: (trtllm_ranks.bootstrap(), load(*args))[1])
    yield
    creator.create_py_executor = original
    os.environ.pop(trtllm_ranks.VARIABLE, None)


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
def test_two_ranks_run_what_the_first_one_plans(replica: Callable[..., Replica], two_gpus: None, overlap: bool) -> None:
    """The planner sits in rank 0, SLOs and times go over the link, and both ranks end with the same texts."""
    running = replica(mode="full", overlap=overlap, tensor_parallel=2)
    assert running.built.perf.to_json() != trtllm_speed.UNMEASURED
    assert running.built.mode.value == "full"
    prompts = [[5 + i] * (3 + 5 * i) for i in range(16)]
    asked = [EASY, {"slo_class": "best_effort"}]
    callers = [
        running.send(f"r{i}", input_ids=prompt, max_tokens=12, return_token_ids=True, **asked[i % 2])
        for i, prompt in enumerate(prompts)
    ]
    for prompt, caller in zip(prompts, callers, strict=True):
        ids = [token for response in caller.wait().responses for token in response.get("output_ids", [])]
        assert ids == answer(prompt, 12)
    admitted = [caller.receipt["admitted"] for caller in callers]
    assert all(admitted[::2])
    assert not any(admitted[1::2])
    llm = running.built.front._llm
    running.close()
    assert [other.outputs for other in llm.others] == [llm._engine.outputs]
    assert running.counted("slos_serve_iterations_total")


def test_ranks_that_do_not_call_are_governed_from_the_front(
    replica: Callable[..., Replica], gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the .pth line no rank gets a planner; the reason says so, and requests are served."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(trtllm_ranks, "HELLO_SECONDS", 0.1)
    running = replica(tensor_parallel=2)
    assert running.built.mode.value == "governor"
    assert "install the .pth line" in running.built.findings.reasons[0]
    assert running.send("r", input_ids=[5] * 9, max_tokens=5, **EASY).wait().receipt["admitted"]
    os.environ.pop(trtllm_ranks.VARIABLE, None)


def test_the_ranks_imports_are_left_alone_until_the_creator_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The finder waits for one module, wraps its function, and steps aside."""
    monkeypatch.setenv(trtllm_ranks.VARIABLE, "{}")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, trtllm_ranks.CREATOR, raising=False)
    before = len(sys.meta_path)
    trtllm_ranks.bootstrap()
    assert len(sys.meta_path) == before + 1
    importlib.import_module("wave")
    creator = importlib.import_module(trtllm_ranks.CREATOR)
    assert creator.create_py_executor.is_slos_serve
    assert len(sys.meta_path) == before
    del sys.modules[trtllm_ranks.CREATOR]
