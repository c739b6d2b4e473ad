"""Every request is either understood exactly or refused with the field and what was got."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slos_serve.backend.config import DEFAULT_CLASSES
from slos_serve.backend.refusal import Refusal
from slos_serve.backend.sessions import Round, Sessions
from slos_serve.backend.tokenizer import Tokenizer
from slos_serve.backend.translate import Limits, Submission, Translator
from slos_serve.client import wire
from slos_serve.scheduler.core import Slo, Stage

CONTEXT = 200
Send = Callable[..., Submission]


@pytest.fixture(scope="module")
def translator(codec: Tokenizer) -> Translator:
    return Translator(
        codec=codec,
        limits=Limits(CONTEXT, codec.vocab_size, default_max_tokens=32),
        classes=DEFAULT_CLASSES,
        default_class="chatbot",
        prefill_seconds=lambda tokens: tokens / 100,
        sessions=Sessions(codec, 1000),
    )


@pytest.fixture
def send(translator: Translator) -> Send:
    """A request with these fields, as tensors, with request parameters beside them."""

    def submission(parameters: Mapping[str, Any] | None = None, **fields: Any) -> Submission:
        return translator.submission("r", wire.encode(fields), parameters or {}, 10.0)

    return submission


def refusal(send: Send, parameters: Mapping[str, Any] | None = None, **fields: Any) -> str:
    with pytest.raises(Refusal) as caught:
        send(parameters, **fields)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert str(caught.value).startswith("INVALID_ARGUMENT: ")
    return str(caught.value)


def test_a_prompt_alone_gets_the_defaults(send: Send, codec: Tokenizer) -> None:
    """Text in; greedy, whole, without the prompt; the default class with its floor on the TTFT."""
    got = send(text_input="def f(")
    assert got.generation.token_ids == tuple(codec.encode("def f("))
    assert got.generation.sampling.is_greedy
    assert (got.streaming, got.return_token_ids, got.echo) == (False, False, "")
    assert got.request.slo_class == "chatbot"
    assert got.request.stages == (Stage(32, Slo(0.25, 0.1)),)
    assert got.request.arrived_at == 10.0


def test_token_ids_are_taken_as_they_are(send: Send) -> None:
    """Ids in, the same ids to the engine."""
    got = send(input_ids=[5, 6, 7], exclude_input_from_output=False)
    assert got.generation.token_ids == (5, 6, 7)
    assert got.echo


def test_names_of_other_backends_mean_the_same(send: Send) -> None:
    """TensorRT-LLM's and vLLM's names, JSON with numbers as strings, and parameters end in one place."""
    fields = {"max_tokens": 7, "temperature": 0.5, "top_k": 3, "seed": 9, "stop": ["x"], "stream": True}
    want = send(text_input="a", **fields)
    trt = send(
        text_input="a",
        request_output_len=7,
        sampling_param_temperature=0.5,
        runtime_top_k=3,
        random_seed=9,
        stop_words=["x"],
        streaming=True,
    )
    text = json.dumps({"max_tokens": "7", "temperature": "0.5", "top_k": "3", "seed": 9, "stop": "x", "n": 1})
    vllm = send(text_input="a", sampling_parameters=text, stream=True)
    parameters = send({**fields, "stop": "x", "triton_private": 1}, text_input="a")
    for got in (trt, vllm, parameters):
        assert got.generation.sampling == want.generation.sampling
        assert got.request == want.request
        assert got.streaming


def test_a_tensor_wins_over_json_and_json_over_a_parameter(send: Send) -> None:
    """The more specific place decides."""
    text = json.dumps({"max_tokens": 6, "top_k": 2})
    got = send({"max_tokens": 7, "top_k": 3, "seed": 4}, text_input="a", max_tokens=5, sampling_parameters=text)
    assert got.request.max_new_tokens == 5
    assert (got.generation.sampling.top_k, got.generation.sampling.seed) == (2, 4)


def test_slo_by_class_and_by_value(send: Send) -> None:
    """A class sets TTFT by slowdown; explicit values replace its own, one by one."""
    prompt = list(range(1, 101))
    assert send(input_ids=prompt, slo_class="coding").request.stages[0].slo == Slo(5.0, 0.05)
    assert send(input_ids=prompt, slo_class="coding", slo_ttft_ms=900.0).request.stages[0].slo == Slo(0.9, 0.05)
    assert send(input_ids=prompt, slo_tpot_ms=20.0).request.stages[0].slo == Slo(5.0, 0.02)
    assert send(input_ids=prompt, slo_class="best_effort").request.is_best_effort
    both = send(input_ids=prompt, slo_class="best_effort", slo_ttft_ms=900.0, slo_tpot_ms=30.0)
    assert both.request.stages[0].slo == Slo(0.9, 0.03)


def test_thinking_is_a_stage_with_its_own_pace(send: Send) -> None:
    """The thinking budget comes out of max_tokens; without an answer left it is the only stage."""
    got = send(text_input="a", slo_class="reasoning", thinking_tokens=10, max_tokens=30)
    assert got.request.stages == (Stage(10, Slo(0.25, 0.05)), Stage(20, Slo(0.25, 0.1)))
    assert got.generation.stage_limits == (10, 20)
    only = send(text_input="a", slo_thinking_tpot_ms=5.0, thinking_tokens=99, max_tokens=30)
    assert only.request.stages == (Stage(30, Slo(0.25, 0.005)),)


def test_a_huge_max_tokens_ends_with_the_context(send: Send) -> None:
    """Nobody can ask for more than fits."""
    assert send(input_ids=[1] * 50, max_tokens=2**31 - 1).request.max_new_tokens == CONTEXT - 50


BAD = [
    ({}, "text_input", "None"),
    ({"text_input": ""}, "text_input", "''"),
    ({"text_input": "a", "input_ids": [1]}, "text_input", "both"),
    ({"text_input": b"\xff\xfe"}, "text_input", "UTF-8"),
    ({"text_input": "word " * 400}, "text_input", f"{CONTEXT} tokens"),
    ({"input_ids": []}, "input_ids", "[]"),
    ({"input_ids": [-1]}, "input_ids", "-1"),
    ({"input_ids": [10**6]}, "input_ids", "1000000"),
    ({"input_ids": [1] * CONTEXT}, "input_ids", f"got {CONTEXT}"),
    ({"max_tokens": 0}, "max_tokens", "0"),
    ({"max_tokens": -5}, "max_tokens", "-5"),
    ({"max_tokens": 3, "request_output_len": 4}, "request_output_len", "agree"),
    ({"temperature": math.nan}, "temperature", "nan"),
    ({"temperature": -1.0}, "temperature", "-1"),
    ({"temperature": math.inf}, "temperature", "inf"),
    ({"top_p": 0.0}, "top_p", "0"),
    ({"top_p": 1.5}, "top_p", "1.5"),
    ({"top_k": -2}, "top_k", "-2"),
    ({"min_p": -0.5}, "min_p", "-0.5"),
    ({"repetition_penalty": 0.0}, "repetition_penalty", "0"),
    ({"presence_penalty": 3.0}, "presence_penalty", "3"),
    ({"frequency_penalty": math.nan}, "frequency_penalty", "nan"),
    ({"min_tokens": -1}, "min_tokens", "-1"),
    ({"end_id": 10**6}, "end_id", "1000000"),
    ({"beam_width": 2}, "beam_width", "2"),
    ({"stop": [""]}, "stop", "''"),
    ({"stop": ["x"] * 50}, "stop", "50 strings"),
    ({"stop": ["x" * 10**6]}, "stop", "characters"),
    ({"stop": [b"\xc3"]}, "stop", "UTF-8"),
    ({"slo_class": "vip"}, "slo_class", "chatbot, coding"),
    ({"slo_ttft_ms": 0.0}, "slo_ttft_ms", "0.0"),
    ({"slo_ttft_ms": -1.0}, "slo_ttft_ms", "-1.0"),
    ({"slo_ttft_ms": math.nan}, "slo_ttft_ms", "nan"),
    ({"slo_tpot_ms": math.inf}, "slo_tpot_ms", "inf"),
    ({"slo_thinking_tpot_ms": -math.inf}, "slo_thinking_tpot_ms", "-inf"),
    ({"slo_class": "best_effort", "slo_ttft_ms": 5.0}, "slo_tpot_ms", "None"),
    ({"thinking_tokens": -1}, "thinking_tokens", "-1"),
    ({"session_id": ""}, "session_id", "''"),
    ({"sampling_parameters": "{"}, "sampling_parameters", "JSON"),
    ({"sampling_parameters": "[1]"}, "sampling_parameters", "[1]"),
    ({"sampling_parameters": "[" * 100_000}, "sampling_parameters", "JSON"),
    ({"sampling_parameters": '{"n": 2}'}, "sampling_parameters.n", "2"),
    ({"sampling_parameters": '{"use_beam_search": true}'}, "use_beam_search", "True"),
    ({"sampling_parameters": '{"logprobs": 5}'}, "sampling_parameters", "logprobs"),
    ({"sampling_parameters": '{"text_input": "x"}'}, "sampling_parameters", "text_input"),
    ({"sampling_parameters": '{"temperature": NaN}'}, "temperature", "nan"),
    ({"sampling_parameters": '{"temperature": "warm"}'}, "temperature", "warm"),
    ({"sampling_parameters": '{"max_tokens": 1.5}'}, "max_tokens", "1.5"),
    ({"sampling_parameters": '{"max_tokens": true}'}, "max_tokens", "True"),
    ({"sampling_parameters": '{"max_tokens": Infinity}'}, "max_tokens", "inf"),
    ({"sampling_parameters": '{"max_tokens": [1]}'}, "max_tokens", "[1]"),
    ({"sampling_parameters": '{"ignore_eos": "maybe"}'}, "ignore_eos", "maybe"),
    ({"sampling_parameters": '{"stop": [1]}'}, "stop", "1"),
    ({"sampling_parameters": '{"slo_class": 3}'}, "slo_class", "3"),
]


@pytest.mark.parametrize(("fields", "field", "shown"), BAD, ids=[f"{i}-{bad[1]}" for i, bad in enumerate(BAD)])
def test_what_is_wrong_is_named(send: Send, fields: dict[str, Any], field: str, shown: str) -> None:
    """A refusal names the field and shows what was got or what is allowed."""
    prompt = {} if {"text_input", "input_ids"} & fields.keys() or not fields else {"text_input": "a"}
    message = refusal(send, **prompt, **fields)
    assert field in message
    assert shown in message
    assert len(message) < 400


def test_a_ten_megabyte_prompt_is_refused_before_it_is_encoded(translator: Translator) -> None:
    """Its length alone says that it cannot fit."""

    class Unused(Tokenizer):
        def __init__(self) -> None: ...
        def encode(self, text: str, *, start: bool = True) -> list[int]:
            raise AssertionError("encoded")

        def least_tokens(self, text: str) -> int:
            return translator.codec.least_tokens(text)

    patient = Translator(
        Unused(), translator.limits, DEFAULT_CLASSES, "chatbot", translator.prefill_seconds, translator.sessions
    )
    with pytest.raises(Refusal, match=r"text_input: .* got at least \d+ prompt tokens"):
        patient.submission("r", wire.encode({"text_input": "x" * 10_000_000}), {}, 0.0)


def test_a_wrong_parameter_is_refused_and_a_foreign_one_ignored(send: Send) -> None:
    """Parameters of ours are checked as strictly as tensors."""
    assert "max_tokens" in refusal(send, {"max_tokens": "many"}, text_input="a")
    assert "sampling_parameters" in refusal(send, {"sampling_parameters": 5}, text_input="a")
    assert send({"priority": 3, "id": "x"}, text_input="a").prompt == "a"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from([field.name for field in wire.INPUTS]) | st.text(max_size=6)


@given(data=st.dictionaries(NAMES, JSON_VALUES, max_size=5), parameters=st.dictionaries(NAMES, JSON_VALUES, max_size=3))
@settings(max_examples=400, deadline=None)
def test_any_json_is_understood_or_refused(
    translator: Translator, data: dict[str, Any], parameters: dict[str, Any]
) -> None:
    """Whatever comes in, the only exception is a refusal."""
    tensors = wire.encode({"text_input": "a", "sampling_parameters": json.dumps(data)})
    with contextlib.suppress(Refusal):
        got = translator.submission("r", tensors, parameters, 0.0)
        assert 1 <= got.request.max_new_tokens <= CONTEXT


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_any_tensors_are_understood_or_refused(translator: Translator, data: st.DataObject) -> None:
    """The server checks types and shapes only; every value has to be coped with."""
    kinds = {
        "INT32": st.integers(-(2**31), 2**31 - 1),
        "UINT64": st.integers(0, 2**64 - 1),
        "FP32": st.floats(width=32),
        "BOOL": st.booleans(),
        "BYTES": st.binary(max_size=12) | st.sampled_from([b"{}", b"coding", b"best_effort", b'{"top_k": 1}']),
    }
    tensors = {}
    for field in data.draw(st.lists(st.sampled_from(wire.INPUTS), max_size=5, unique=True)):
        size = data.draw(st.integers(0, 4)) if field.dims == (-1,) else 1
        values = [data.draw(kinds[field.dtype]) for _ in range(size)]
        tensors[field.name] = np.array(values, dtype=wire.numpy_dtype(field))
    with contextlib.suppress(Refusal):
        translator.submission("r", tensors, {}, 0.0)


def test_the_next_round_of_a_session_repeats_its_tokens(translator: Translator, codec: Tokenizer) -> None:
    """Generated tokens that no encoder would choose come back as they were; other text is encoded afresh."""
    odd = tuple(token for letter in "def f" for token in codec.encode(letter))
    assert odd != tuple(codec.encode("def f"))
    translator.sessions.remember("s", Round("ab", (40, 41), (*odd, 0)))

    def ids(text: str) -> tuple[int, ...]:
        return translator.submission(
            "r", wire.encode({"text_input": text, "session_id": "s"}), {}, 0.0
        ).generation.token_ids

    assert ids("abdef f!") == (40, 41, *odd, *codec.encode("!"))
    assert ids("abdef") == (40, 41, *odd[:3])
    assert ids("other") == tuple(codec.encode("other"))


def test_sessions_are_bounded(codec: Tokenizer) -> None:
    """The longest unused session goes first."""
    sessions = Sessions(codec, max_tokens=6)
    for name in "abc":
        sessions.remember(name, Round("x", (40,), (41, 41)))
    fresh = codec.encode("xjj")
    kept = [name for name in "abc" if sessions.encode(name, "x" + codec.decode((41, 41))) == [40, 41, 41]]
    assert kept == ["b", "c"]
    assert sessions.encode("a", "xjj") == fresh
