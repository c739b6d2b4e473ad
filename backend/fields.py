"""What a Triton request says, as plain Python values by canonical name; refuses what cannot be read.

A field may come as a tensor, inside the JSON of `sampling_parameters`, or as a request parameter, in
this order of precedence, under its own name or an alias of `client.wire`. Never imports torch or Triton, so
that instances and routers read requests alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from slos_serve.client.wire import INPUT_BY_NAME, Array, Field

from .refusal import invalid

Values: TypeAlias = Mapping[str, Any]

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
MAX_NAME_CHARS: Final = 256


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
    if field.name in ("input_ids", "resume_ids", "resume_times_ms"):
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


def name_of(values: Values, field: str) -> str | None:
    """A name of the caller's, or None. Raises Refusal for an empty or a very long one."""
    name: str | None = values.get(field)
    if name is not None and not 0 < len(name) <= MAX_NAME_CHARS:
        raise invalid(field, f"must have 1 to {MAX_NAME_CHARS} characters", name)
    return name


def milliseconds(values: Values, field: str, least: float | None = None) -> float | None:
    """Above 0, or from `least` on where that is given."""
    value: float | None = values.get(field)
    if value is not None and not (math.isfinite(value) and (value > 0 if least is None else value >= least)):
        bound = "positive" if least is None else f"of at least {least:g}"
        raise invalid(field, f"must be a {bound}, finite number of milliseconds", value)
    return value
