"""From the tensors of a Triton request to a validated `Submission`; everything wrong is refused here.

A field may come as a tensor, inside the JSON of `sampling_parameters`, or as a request parameter, in
this order of precedence, under its own name or an alias of `client.wire`. Nothing here sees Triton.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from slos_serve.client.wire import CANONICAL, INPUT_BY_NAME, Array, Field
from slos_serve.scheduler.core import Request, Slo, Stage

from .config import SloClass
from .generation import Generation, SamplingParams
from .refusal import Refusal, invalid
from .sessions import Sessions
from .tokenizer import Codec, IncrementalDecoder, StopText

# Keys of vLLM's sampling parameters that are served with one value only, which changes nothing here.
ONLY_VALUE: Final[Mapping[str, Any]] = {
    "n": 1,
    "best_of": 1,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "early_stopping": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "detokenize": True,
}
PROMPT_FIELDS: Final = ("text_input", "input_ids", "sampling_parameters")
SAMPLING_FIELDS: Final = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "seed", "min_tokens", "ignore_eos", "end_id",
)  # fmt: skip
MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARS: Final = 256
MAX_NAME_CHARS: Final = 256

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Submission:
    """One accepted request: what the scheduler, the engine and the responder each need to know."""

    request: Request
    generation: Generation
    text: StopText
    prompt: str | None  # the prompt as text, when it came as text
    echo: str = ""  # goes before the first text
    streaming: bool = False
    return_token_ids: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for: the context in tokens, the vocabulary and the default output length."""

    max_context: int
    vocab_size: int
    default_max_tokens: int


def read_fields(tensors: Mapping[str, Array], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Canonical field names to plain Python values. Raises Refusal for what cannot be read."""
    values = _from_tensors(tensors)
    chosen = _from_json(values.pop("sampling_parameters", None))
    known = {name: value for name, value in parameters.items() if name in INPUT_BY_NAME}
    nested = _from_json(_text_of(known.pop("sampling_parameters", None), "sampling_parameters"))
    return {**_from_scalars(known), **nested, **chosen, **values}


def _from_tensors(tensors: Mapping[str, Array]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, array in tensors.items():
        field = INPUT_BY_NAME.get(name)
        if field is None:
            raise invalid(name, f"must be one of {', '.join(INPUT_BY_NAME)}", "an unknown tensor")
        _put(values, field, _plain(field, array))
    return values


def _plain(field: Field, array: Array) -> Any:
    """A tensor's value: a list for fields of any length, one item otherwise."""
    if field.name == "input_ids":
        return array.reshape(-1)
    items = [_item(field, item) for item in array.reshape(-1).tolist()]
    if field.dims == (-1,):
        return items
    if len(items) != 1:
        raise invalid(field.name, "must be one value", f"{len(items)}")
    return items[0]


def _item(field: Field, item: Any) -> Any:
    if field.dtype != "BYTES":
        return item
    try:
        return item if isinstance(item, str) else bytes(item).decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(field.name, f"must be UTF-8 text ({error.reason} at byte {error.start})", item[:40]) from error


def _put(values: dict[str, Any], field: Field, value: Any) -> None:
    """Under its canonical name. Two aliases may both be given when they agree."""
    if field.means in values and values[field.means] != value:
        raise invalid(field.name, f"must agree with the other names of {field.means}", value)
    values[field.means] = value


def _from_json(text: str | None) -> dict[str, Any]:
    """The fields of `sampling_parameters`, vLLM's way: a JSON object whose numbers may be strings."""
    if text is None:
        return {}
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid("sampling_parameters", f"must be a JSON object ({error})", text) from error
    if not isinstance(data, dict):
        raise invalid("sampling_parameters", "must be a JSON object", text)
    for name in data.keys() & ONLY_VALUE.keys():
        _check_only_value(name, data.pop(name))
    for name in data:
        if name not in INPUT_BY_NAME or name in PROMPT_FIELDS:
            raise invalid("sampling_parameters", "keys must be sampling or SLO fields", name)
    return _from_scalars(data)


def _check_only_value(name: str, value: Any) -> None:
    only = ONLY_VALUE[name]
    given = value.strip().lower() if isinstance(value, str) else json.dumps(value)
    if value is not None and given not in (json.dumps(only), str(int(only))):
        raise invalid(f"sampling_parameters.{name}", f"only {json.dumps(only)} is served", value)


def _from_scalars(data: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in data.items():
        if value is not None:
            field = INPUT_BY_NAME[name]
            _put(values, field, _scalar(field, value))
    return values


def _scalar(field: Field, value: Any) -> Any:
    """A JSON value as the field's type; numbers and booleans may come as strings."""
    if field.dims == (-1,):
        items = value if isinstance(value, list) else [value]
        return [_scalar(Field(field.name, field.dtype, (1,), field.means), item) for item in items]
    if field.dtype == "BYTES":
        return _text_of(value, field.name)
    if field.dtype == "BOOL":
        return _truth(field.name, value)
    return _number(field, value)


def _text_of(value: Any, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise invalid(name, "must be a string", value)


def _truth(name: str, value: Any) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False}
    word = str(value).strip().lower()
    if word not in words:
        raise invalid(name, "must be true or false", value)
    return words[word]


def _number(field: Field, value: Any) -> int | float:
    kind = "a number" if field.dtype == "FP32" else "an integer"
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value) if field.dtype == "FP32" else _integer(value)
    except (ValueError, OverflowError):
        raise invalid(field.name, f"must be {kind}", value) from None
    return number


def _integer(value: int | float | str) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError
    return int(value)


@dataclass(frozen=True, slots=True)
class Translator:
    """Everything needed to accept or refuse a request. `prefill_seconds` is the time that a prompt of so
    many tokens takes on an idle machine."""

    codec: Codec
    limits: Limits
    classes: Mapping[str, SloClass]
    default_class: str
    prefill_seconds: Callable[[int], float]
    sessions: Sessions

    def submission(
        self, request_id: str, tensors: Mapping[str, Array], parameters: Mapping[str, Any], arrived_at: float
    ) -> Submission:
        """The request, ready to run. Raises Refusal naming the field and what was got."""
        values = read_fields(tensors, parameters)
        if values.get("beam_width", 1) != 1:
            raise invalid("beam_width", "must be 1", values["beam_width"])
        sampling = self._sampling(values)
        stop = _stop(values)
        prompt, ids = self._prompt(values)
        stages = self._stages(values, len(ids))
        request = Request(
            id=request_id,
            arrived_at=arrived_at,
            prompt_tokens=len(ids),
            stages=stages,
            slo_class=self._class_name(values),
            weight=self.classes[self._class_name(values)].weight,
            session=_name(values, "session_id"),
        )
        echo = "" if values.get("exclude_input_from_output", True) else (prompt or self.codec.decode(ids))
        return Submission(
            request=request,
            generation=Generation(
                request_id=request_id,
                token_ids=ids,
                stage_limits=tuple(stage.max_new_tokens for stage in stages),
                sampling=sampling,
                stop=self._stop_test(ids, stop, sampling.min_tokens),
            ),
            text=self._text(ids, stop, sampling.min_tokens),
            prompt=prompt,
            echo=echo,
            streaming=values.get("stream", False),
            return_token_ids=values.get("return_token_ids", False),
        )

    def _sampling(self, values: Values) -> SamplingParams:
        chosen = {name: values[name] for name in SAMPLING_FIELDS if name in values}
        end_id = chosen.get("end_id")
        if end_id is not None and not 0 <= end_id < self.limits.vocab_size:
            raise invalid("end_id", f"must be a token id in [0, {self.limits.vocab_size})", end_id)
        try:
            return SamplingParams(**chosen)
        except ValueError as error:
            raise Refusal("INVALID_ARGUMENT", str(error)) from error

    def _prompt(self, values: Values) -> tuple[str | None, tuple[int, ...]]:
        text, ids = values.get("text_input"), values.get("input_ids")
        if text is None and ids is None:
            raise invalid("text_input", "a prompt must be given, as text_input or input_ids", None)
        if text is not None and ids is not None:
            raise invalid("text_input", "only one of text_input and input_ids may be given", "both")
        if text is None:
            return None, self._check_ids(np.asarray(ids))
        if not text:
            raise invalid("text_input", "must not be empty", text)
        self._check_context("text_input", self.codec.least_tokens(text), "at least ")
        session = _name(values, "session_id")
        tokens = self.sessions.encode(session, text) if session else self.codec.encode(text)
        if not tokens:
            raise invalid("text_input", "must have at least one token", text)
        self._check_context("text_input", len(tokens))
        return text, tuple(tokens)

    def _check_ids(self, ids: Array) -> tuple[int, ...]:
        if ids.size == 0:
            raise invalid("input_ids", "must have at least one token", [])
        self._check_context("input_ids", ids.size)
        wrong = ids[(ids < 0) | (ids >= self.limits.vocab_size)]
        if wrong.size:
            raise invalid("input_ids", f"every token id must be in [0, {self.limits.vocab_size})", int(wrong[0]))
        return tuple(map(int, ids))

    def _check_context(self, field: str, tokens: int, prefix: str = "") -> None:
        if tokens >= self.limits.max_context:
            wanted = f"prompt and one new token must fit in the context of {self.limits.max_context} tokens"
            raise Refusal("INVALID_ARGUMENT", f"{field}: {wanted}, got {prefix}{tokens} prompt tokens")

    def _stages(self, values: Values, prompt_tokens: int) -> tuple[Stage, ...]:
        """The thinking, if asked for, and the answer. A too large `max_tokens` ends with the context."""
        asked = values.get("max_tokens", self.limits.default_max_tokens)
        thinking = values.get("thinking_tokens", 0)
        if asked < 1:
            raise invalid("max_tokens", "must be at least 1", asked)
        if thinking < 0:
            raise invalid("thinking_tokens", "must be at least 0", thinking)
        new_tokens = min(asked, self.limits.max_context - prompt_tokens)
        thinking = min(thinking, new_tokens)
        thought, answer = self._slos(values, prompt_tokens)
        stages = (Stage(thinking, thought),) if thinking else ()
        return stages + ((Stage(new_tokens - thinking, answer),) if new_tokens > thinking else ())

    def _class_name(self, values: Values) -> str:
        name: str = values.get("slo_class", self.default_class)
        if name not in self.classes:
            raise invalid("slo_class", f"must be one of {', '.join(sorted(self.classes))}", name)
        return name

    def _slos(self, values: Values, prompt_tokens: int) -> tuple[Slo | None, Slo | None]:
        """The promises about thinking and answer: the class's, with explicit values in their place."""
        slo_class = self.classes[self._class_name(values)]
        ttft = _milliseconds(values, "slo_ttft_ms")
        tpot = _milliseconds(values, "slo_tpot_ms")
        thinking_tpot = _milliseconds(values, "slo_thinking_tpot_ms")
        if slo_class.best_effort and ttft is None and tpot is None and thinking_tpot is None:
            return None, None
        ttft = ttft if ttft is not None else self._ttft(slo_class, prompt_tokens)
        tpot = tpot if tpot is not None else slo_class.tpot_ms
        for name, value in (("slo_ttft_ms", ttft), ("slo_tpot_ms", tpot)):
            if value is None:
                raise invalid(name, "a best-effort class has none, so explicit SLOs need both TTFT and TPOT", None)
        assert ttft is not None
        assert tpot is not None
        thinking_tpot = thinking_tpot or slo_class.thinking_tpot_ms or tpot
        return Slo(ttft / 1000, thinking_tpot / 1000), Slo(ttft / 1000, tpot / 1000)

    def _ttft(self, slo_class: SloClass, prompt_tokens: int) -> float | None:
        if slo_class.ttft_slowdown is None:
            return slo_class.ttft_ms
        return max(slo_class.ttft_slowdown * self.prefill_seconds(prompt_tokens) * 1000, slo_class.ttft_floor_ms)

    def _text(self, ids: tuple[int, ...], stop: tuple[str, ...], min_tokens: int) -> StopText:
        return StopText(IncrementalDecoder(self.codec, ids), stop, min_tokens)

    def _stop_test(self, ids: tuple[int, ...], stop: tuple[str, ...], min_tokens: int) -> Callable[[int], bool] | None:
        """Whether a stop string is complete with this token; runs on the engine thread, with its own decoder."""
        if not stop:
            return None
        text = self._text(ids, stop, min_tokens)

        def stopped(token_id: int) -> bool:
            text.push(token_id)
            return text.stopped

        return stopped


def _stop(values: Values) -> tuple[str, ...]:
    stop = tuple(values.get("stop", ()))
    if len(stop) > MAX_STOP_STRINGS:
        raise invalid("stop", f"must be at most {MAX_STOP_STRINGS} strings", f"{len(stop)} strings")
    for item in stop:
        if not 0 < len(item) <= MAX_STOP_CHARS:
            raise invalid("stop", f"every string must have 1 to {MAX_STOP_CHARS} characters", item)
    return stop


def _name(values: Values, field: str) -> str | None:
    name: str | None = values.get(field)
    if name is not None and not 0 < len(name) <= MAX_NAME_CHARS:
        raise invalid(field, f"must have 1 to {MAX_NAME_CHARS} characters", name)
    return name


def _milliseconds(values: Values, field: str) -> float | None:
    value: float | None = values.get(field)
    if value is not None and not (math.isfinite(value) and value > 0):
        raise invalid(field, "must be a positive, finite number of milliseconds", value)
    return value


assert set(SAMPLING_FIELDS) <= set(CANONICAL)
