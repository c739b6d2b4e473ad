"""From the fields of a Triton request to a validated `Submission`; everything wrong is refused here.

Nothing here sees Triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from slos_serve.client.wire import CANONICAL, Array
from slos_serve.scheduler.attainment import due_times
from slos_serve.scheduler.core import Request, Slo, Stage

from .config import SloClass
from .fields import Values, milliseconds, name_of, read_fields
from .generation import Generation, SamplingParams
from .refusal import Refusal, invalid
from .sessions import Sessions
from .tokenizer import Codec, IncrementalDecoder, StopText

SAMPLING_FIELDS: Final = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "seed", "min_tokens", "ignore_eos", "end_id",
)  # fmt: skip
MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARS: Final = 256


@dataclass(frozen=True, slots=True)
class Resumed:
    """What another instance delivered of a request before this one took it over.

    `asked` is the request as it first was; `token_times` are absolute and `stage_tokens` count the tokens of
    each stage so far.
    """

    asked: Request
    token_times: tuple[float, ...]
    stage_tokens: tuple[int, ...]


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
    resumed: Resumed | None = None
    may_decline: bool = False
    coalesce: float = 0.0  # seconds


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for: the context in tokens, the vocabulary and the default output length.

    `think_end_id` is the token that ends the thinking, where the vocabulary has it.
    """

    max_context: int
    vocab_size: int
    default_max_tokens: int
    think_end_id: int | None = None


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
        asked = Request(
            id=request_id,
            arrived_at=arrived_at - (milliseconds(values, "elapsed_ms", least=0.0) or 0.0) / 1000,
            prompt_tokens=len(ids),
            stages=self._stages(values, len(ids)),
            slo_class=self._class_name(values),
            weight=self.classes[self._class_name(values)].weight,
            session=name_of(values, "session_id"),
        )
        done = self._check_resumed(values)
        request, resumed = (asked, None) if not done else _resume(asked, done, values, self.limits.think_end_id)
        echo = "" if values.get("exclude_input_from_output", True) else (prompt or self.codec.decode(ids))
        text, stop_test = self._text(ids, stop, sampling.min_tokens), self._stop_test(ids, stop, sampling.min_tokens)
        for token in done:  # its text is out already
            text.push(token)
            if stop_test is not None:
                stop_test(token)
        return Submission(
            request=request,
            generation=Generation(
                request_id=request_id,
                token_ids=ids + done,
                stage_limits=tuple(stage.max_new_tokens for stage in request.stages),
                sampling=sampling,
                stop=stop_test,
                resumed=len(done),
            ),
            text=text,
            prompt=prompt,
            echo=echo,
            streaming=values.get("stream", False),
            return_token_ids=values.get("return_token_ids", False),
            resumed=resumed,
            may_decline=values.get("may_decline", False),
            coalesce=(milliseconds(values, "coalesce_ms", least=0.0) or 0.0) / 1000,
        )

    def _check_resumed(self, values: Values) -> tuple[int, ...]:
        ids = np.asarray(values.get("resume_ids", ()), dtype=np.int64)
        if len(values.get("resume_times_ms", ())) != ids.size:
            times = len(values.get("resume_times_ms", ()))
            raise invalid("resume_times_ms", f"must have a time for each of {ids.size} resume_ids", f"{times} times")
        wrong = ids[(ids < 0) | (ids >= self.limits.vocab_size)]
        if wrong.size:
            raise invalid("resume_ids", f"every token id must be in [0, {self.limits.vocab_size})", int(wrong[0]))
        return tuple(ids.tolist())

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
        session = name_of(values, "session_id")
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
        ttft = milliseconds(values, "slo_ttft_ms")
        tpot = milliseconds(values, "slo_tpot_ms")
        thinking_tpot = milliseconds(values, "slo_thinking_tpot_ms")
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


def _resume(asked: Request, done: tuple[int, ...], values: Values, think_end_id: int | None) -> tuple[Request, Resumed]:
    """What is left of `asked` after the tokens `done`, as a request of its own: its next token is due when it was."""
    counts = [0]
    for token in done:
        stage = asked.stages[len(counts) - 1]
        is_last = len(counts) == len(asked.stages)
        if counts[-1] == stage.max_new_tokens:
            raise invalid("resume_ids", f"must be fewer than max_tokens ({asked.max_new_tokens})", f"{len(done)} ids")
        counts[-1] += 1
        if not is_last and (counts[-1] == stage.max_new_tokens or token == think_end_id):
            counts.append(0)
    first, *later = asked.stages[len(counts) - 1 :]
    left = first.max_new_tokens - counts[-1]
    if left < 1:
        raise invalid("resume_ids", f"must be fewer than max_tokens ({asked.max_new_tokens})", f"{len(done)} ids")
    due = list(due_times(asked.stages, [*counts[:-1], counts[-1] + 1], 0.0))[-1]
    slo = Slo(due, first.slo.tpot) if first.slo else None
    rest = replace(asked, prompt_tokens=asked.prompt_tokens + len(done), stages=(Stage(left, slo), *later))
    times = tuple(asked.arrived_at + float(ms) / 1000 for ms in values["resume_times_ms"])
    if not all(map(math.isfinite, times)):
        raise invalid("resume_times_ms", "every time must be a finite number of milliseconds", times)
    return rest, Resumed(asked, times, tuple(counts))


assert set(SAMPLING_FIELDS) <= set(CANONICAL)
