"""The ensemble that plain callers address: every tensor of the wire format, mapped one to one onto the router.

Triton passes a request through an ensemble with its id, parameters and timeout, streams what comes back, and
never tells the step that the caller has gone: such a request ends by its timeout, its length, a stop request, or the
router's own bounds (`unseen_tokens`, `unseen_s`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from slos_serve.client.wire import INPUTS, OUTPUTS, Field

STEP = "slos_router"


def ensemble_config(step: str = STEP) -> str:
    """The text of the ensemble's `config.pbtxt`: Triton completes no ensemble by itself."""
    return "\n".join(_lines(step)) + "\n"


def _lines(step: str) -> Iterator[str]:
    yield "# Written by slos_serve.backend.ensemble from client/wire.py; a test compares."
    yield 'platform: "ensemble"'
    yield "max_batch_size: 0"
    yield from (f"input {{ {_tensor(field)} optional: true }}" for field in INPUTS)
    yield from (f"output {{ {_tensor(field)} }}" for field in OUTPUTS)
    yield "ensemble_scheduling {"
    yield "  step {"
    yield f'    model_name: "{step}"'
    yield "    model_version: -1"
    yield from _maps("input_map", INPUTS)
    yield from _maps("output_map", OUTPUTS)
    yield "  }"
    yield "}"


def _tensor(field: Field) -> str:
    data_type = {"BYTES": "TYPE_STRING"}.get(field.dtype, f"TYPE_{field.dtype}")
    return f'name: "{field.name}" data_type: {data_type} dims: {list(field.dims)}'


def _maps(kind: str, fields: Iterable[Field]) -> Iterator[str]:
    return (f'    {kind} {{ key: "{field.name}" value: "{field.name}" }}' for field in fields)
