"""The tensors on the wire: every name, type and meaning, once. numpy only.

The backend declares exactly these tensors, the client encodes and decodes them, and a test holds both
to this table. Names are the union of what TensorRT-LLM's and vLLM's Triton backends accept, so callers
written for those work unchanged; SLO fields are optional additions. Every tensor has shape [1] unless
its `dims` say [-1].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor: Triton data type, dims without batch, and the canonical field it stands for."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    means: str
    doc: str = ""


def _f(name: str, dtype: str, doc: str = "", *, means: str = "", many: bool = False) -> Field:
    return Field(name, dtype, (-1,) if many else (1,), means or name, doc)


INPUTS: Final[tuple[Field, ...]] = (
    _f("text_input", "BYTES", "the prompt as UTF-8 text; this or input_ids"),
    _f("input_ids", "INT32", "the prompt as token ids; this or text_input", many=True),
    _f("max_tokens", "INT32", "most tokens to generate, thinking included"),
    _f("sampling_param_max_tokens", "INT32", means="max_tokens"),
    _f("request_output_len", "INT32", means="max_tokens"),
    _f("min_tokens", "INT32", "end-of-sequence is masked until so many tokens"),
    _f("min_length", "INT32", means="min_tokens"),
    _f("stream", "BOOL", "deltas as they come (true) or one response (false, the default)"),
    _f("streaming", "BOOL", means="stream"),
    _f("temperature", "FP32", "0 is greedy (the default)"),
    _f("sampling_param_temperature", "FP32", means="temperature"),
    _f("top_p", "FP32", "nucleus: keep the smallest set with this probability, in (0, 1]"),
    _f("runtime_top_p", "FP32", means="top_p"),
    _f("sampling_param_top_p", "FP32", means="top_p"),
    _f("top_k", "INT32", "keep the k likeliest; 0 or -1 keeps all"),
    _f("runtime_top_k", "INT32", means="top_k"),
    _f("sampling_param_top_k", "INT32", means="top_k"),
    _f("min_p", "FP32", "drop tokens below this share of the likeliest, in [0, 1]"),
    _f("repetition_penalty", "FP32", "> 0; 1 is none"),
    _f("presence_penalty", "FP32", "in [-2, 2]; 0 is none"),
    _f("sampling_param_presence_penalty", "FP32", means="presence_penalty"),
    _f("frequency_penalty", "FP32", "in [-2, 2]; 0 is none"),
    _f("sampling_param_frequency_penalty", "FP32", means="frequency_penalty"),
    _f("seed", "UINT64", "makes sampling repeatable"),
    _f("random_seed", "UINT64", means="seed"),
    _f("sampling_param_seed", "UINT64", means="seed"),
    _f("stop", "BYTES", "stop strings; the text ends before the first of them", many=True),
    _f("stop_words", "BYTES", means="stop", many=True),
    _f("sampling_param_stop", "BYTES", means="stop", many=True),
    _f("ignore_eos", "BOOL", "go on past the end-of-sequence token"),
    _f("end_id", "INT32", "end-of-sequence token id instead of the model's"),
    _f("exclude_input_from_output", "BOOL", "leave the prompt out of text_output (default true)"),
    _f("exclude_input_in_output", "BOOL", means="exclude_input_from_output"),
    _f("sampling_param_exclude_input_from_output", "BOOL", means="exclude_input_from_output"),
    _f("beam_width", "INT32", "only 1 is served"),
    _f("sampling_parameters", "BYTES", "JSON object of the fields above, as vLLM's backend takes it"),
    _f("return_token_ids", "BOOL", "send output_ids"),
    _f("slo_class", "BYTES", "an application class of the model's settings"),
    _f("slo_ttft_ms", "FP32", "time to first token, in place of the class's"),
    _f("slo_tpot_ms", "FP32", "time per output token, in place of the class's"),
    _f("slo_thinking_tpot_ms", "FP32", "time per thinking token, in place of the class's"),
    _f("thinking_tokens", "INT32", "thinking budget: tokens before the answer that keep the thinking pace"),
    _f("session_id", "BYTES", "chains tool rounds: the next prompt continues this one's tokens and KV"),
    _f("may_decline", "BOOL", "end at once with finish_reason declined where the SLO cannot be promised here"),
    _f("elapsed_ms", "FP32", "how long ago the request arrived at the service; deadlines count from then"),
    _f("resume_ids", "INT32", "tokens that another instance has delivered: generation goes on after them", many=True),
    _f("resume_times_ms", "FP32", "when each of them was delivered, from the arrival", many=True),
    _f("coalesce_ms", "FP32", "tokens after the first are held so long, to be sent together; 0 is the default"),
    _f("control", "BYTES", "stop (the request with this id), watch, offer, place or suggest; see control_output"),
    _f("ticket", "BYTES", "claims the stream of a request that was offered to this instance"),
)

OUTPUTS: Final[tuple[Field, ...]] = (
    _f("text_output", "BYTES", "new text since the last response (stream) or all of it"),
    _f("output_ids", "INT32", "the token ids of this response, when asked for", many=True),
    _f("token_index", "INT32", "tokens sent so far, this response included: a gap means a lost event"),
    _f("finish_reason", "BYTES", "in the last response: stop, length, cancelled or declined"),
    _f("receipt", "BYTES", "in the last response: JSON, what was promised and what was kept"),
    _f("control_output", "BYTES", "JSON, what a control request asked for: a load, a ticket, or a place"),
)

INPUT_BY_NAME: Final[Mapping[str, Field]] = {field.name: field for field in INPUTS}
CANONICAL: Final[Mapping[str, Field]] = {field.means: field for field in INPUTS if field.means == field.name}

_NUMPY: Final[Mapping[str, type[Any]]] = {
    "BYTES": np.object_,
    "INT32": np.int32,
    "FP32": np.float32,
    "BOOL": np.bool_,
    "UINT64": np.uint64,
}


def numpy_dtype(field: Field) -> type[Any]:
    """The numpy type of a field's tensor."""
    return _NUMPY[field.dtype]


def encode(values: Mapping[str, Any]) -> dict[str, Array]:
    """Canonical names to arrays ready to send. Values that are None are left out.

    Text becomes UTF-8 bytes; a list goes into a [-1] tensor. Raises ValueError naming an unknown field
    or a value that its type cannot hold.
    """
    arrays: dict[str, Array] = {}
    for name, value in values.items():
        if value is None:
            continue
        field = INPUT_BY_NAME.get(name)
        if field is None:
            raise ValueError(f"unknown field {name!r}; known: {', '.join(sorted(INPUT_BY_NAME))}")
        items: list[Any] = list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value]
        if field.dtype == "BYTES":
            items = [item.encode() if isinstance(item, str) else item for item in items]
        try:
            if field.dtype in ("INT32", "UINT64"):
                _check_integers(items, np.iinfo(numpy_dtype(field)))
            arrays[name] = np.array(items, dtype=numpy_dtype(field))
        except (OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{name}: expected {field.dtype}, got {value!r}") from error
    return arrays


def _check_integers(items: Iterable[Any], limits: np.iinfo[Any]) -> None:
    """Raises ValueError for what numpy would cut to fit."""
    if any(item != int(item) or not limits.min <= item <= limits.max for item in items):
        raise ValueError(f"integers from {limits.min} to {limits.max}")


def text(array: Array | None) -> str:
    """The text of a BYTES tensor of shape [1]; an absent or empty tensor is the empty text."""
    if array is None or array.size == 0:
        return ""
    item = array.reshape(-1)[0]
    return item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item)


def serialize(array: Array) -> bytes:
    """The raw bytes of a tensor as gRPC carries them; before each BYTES element stands its length."""
    if array.dtype != np.object_:
        return array.tobytes()
    items = [item if isinstance(item, bytes) else str(item).encode() for item in array.reshape(-1).tolist()]
    return b"".join(len(item).to_bytes(4, "little") + item for item in items)
