"""`slos-serve admit FILE.json.gz --json OUT`: exact admission on problems from a file.

The file is JSON, gzipped or not: `instances`, each with `id`, `now`, `mem_free_blocks`, `perf_pieces` (lists of
[k_token, k_step, b] in seconds), `max_batch_tokens`, `tpots` (seconds per token), `sd` (null, or `alpha` and
`max_len`) and `requests`; each request with `id`, `running`, `deadline` (absolute seconds), `remaining_prompt`
(tokens), `mem_blocks`, `tier` (index into `tpots`) and `profit`. Other fields are ignored. The answer has, for each
instance, `id`, `accepted` (request ids, the running ones included because they are kept), `seconds` of the call,
`value` (of the new ones), `bound` (no set within the fluid bound is worth more), `exact` and `feasible`
(whether the running requests alone can be served).

Promises that a malformed file is refused with its name, the instance and the field, and that the answer
appears whole or not at all.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
import tempfile
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from slos_serve.scheduler.exact import AdmissionProblem, Speculation, admit_exact, warm

LARGEST: Final = 2**53  # whole numbers up to here survive JSON readers that know only floats
GZIP_MAGIC: Final = b"\x1f\x8b"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="planning problems, JSON or gzipped JSON")
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="where the answer goes")
    parser.add_argument("--fluid", action="store_true", help="ask for the fluid bound only, not for a real schedule")
    parser.add_argument("--effort", type=int, default=4, help="multiplies the bounds on work (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for a malformed file, OSError for one that cannot be read or written."""
    named = read_problems(args.file)
    warm()
    answers = [answer(name, problem, ids, not args.fluid, args.effort) for name, problem, ids in named]
    write_whole(args.json, json.dumps({"instances": answers}) + "\n")
    seconds = [each["seconds"] for each in answers] or [0.0]
    print(
        f"{len(answers)} instances, {sum(each['exact'] for each in answers)} solved exactly, "
        f"median {1e3 * statistics.median(seconds):.3f} ms, slowest {1e3 * max(seconds):.3f} ms: {args.json}"
    )
    return 0


def answer(name: Any, problem: AdmissionProblem, ids: list[Any], constructive: bool, effort: int) -> dict[str, Any]:
    start = time.perf_counter()
    result = admit_exact(problem, constructive=constructive, effort=effort)
    seconds = time.perf_counter() - start
    accepted = sorted({*result.accepted, *np.flatnonzero(problem.running).tolist()})
    return {
        "id": name,
        "accepted": [ids[i] for i in accepted],
        "seconds": seconds,
        "value": result.value,
        "bound": result.bound,
        "exact": result.exact,
        "feasible": result.kept,
    }


def write_whole(path: Path, text: str) -> None:
    """Through a file beside it, renamed when complete. Raises OSError, leaving what was there."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8") as file:
        partial = Path(file.name)
        try:
            file.write(text)
            file.close()
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def read_problems(path: Path) -> list[tuple[Any, AdmissionProblem, list[Any]]]:
    """(instance id, problem, request ids) for each instance. Raises ValueError naming file, instance and field."""
    try:
        instances = _parsed(path)["instances"]
        if not isinstance(instances, list):
            raise ValueError(f"instances: must be a list, got {instances!r:.60}")
        problems = [_problem(each, f"instances[{i}]") for i, each in enumerate(instances)]
        _distinct([name for name, _, _ in problems], "instances")
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]}: is missing") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return problems


def _parsed(path: Path) -> Mapping[str, Any]:
    data = path.read_bytes()
    try:
        text = gzip.decompress(data) if data.startswith(GZIP_MAGIC) else data
        parsed = json.loads(text.decode("utf-8"))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"is not a whole gzip file: {error}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"must be an object with `instances`, got {parsed!r:.60}")
    return parsed


def _problem(given: Any, where: str) -> tuple[Any, AdmissionProblem, list[Any]]:
    name = _identity(given, where)
    where = f"instance {name!r}"
    tpots = [_number(t, f"{where}: tpots[{i}]") for i, t in enumerate(_list(given, "tpots", where))]
    requests = _list(given, "requests", where)
    ids = [_identity(each, f"{where}: requests[{i}]") for i, each in enumerate(requests)]
    _distinct(ids, f"{where}: requests")
    places = [f"{where}: request {each!r}" for each in ids]
    both = list(zip(requests, places, strict=True))
    tiers = [_whole(each, "tier", place) for each, place in both]
    for tier, place in zip(tiers, places, strict=True):
        if tier >= len(tpots):
            raise ValueError(f"{place}: tier: must be below the number of tpots, {len(tpots)}, got {tier}")
    try:
        problem = AdmissionProblem(
            now=_number(_field(given, "now", where), f"{where}: now"),
            pieces=_pieces(given, where),
            max_batch_tokens=_whole(given, "max_batch_tokens", where),
            tpots=tuple(tpots),
            free_blocks=_whole(given, "mem_free_blocks", where),
            deadlines=np.array([_number(_field(r, "deadline", at), f"{at}: deadline") for r, at in both], np.float64),
            prompts=np.array([_whole(r, "remaining_prompt", at) for r, at in both], np.int64),
            blocks=np.array([_whole(r, "mem_blocks", at) for r, at in both], np.int64),
            tiers=np.array(tiers, np.int64),
            values=np.array([_number(_field(r, "profit", at), f"{at}: profit") for r, at in both], np.float64),
            running=np.array([_truth(r, "running", at) for r, at in both], np.bool_),
            speculation=_speculation(given, where),
        )
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(where) else f"{where}: {text}") from None
    return name, problem, ids


def _pieces(given: Any, where: str) -> tuple[tuple[float, float, float], ...]:
    pieces = []
    for i, piece in enumerate(_list(given, "perf_pieces", where)):
        place = f"{where}: perf_pieces[{i}]"
        if not isinstance(piece, list) or len(piece) != 3:
            raise ValueError(f"{place}: must be [k_token, k_step, b], got {piece!r:.60}")
        token, step, base = (_number(value, place) for value in piece)
        pieces.append((token, step, base))
    return tuple(pieces)


def _speculation(given: Any, where: str) -> Speculation | None:
    sd = _field(given, "sd", where)
    if sd is None:
        return None
    place = f"{where}: sd"
    return Speculation(_number(_field(sd, "alpha", place), f"{place}.alpha"), _whole(sd, "max_len", place))


def _field(given: Any, name: str, where: str) -> Any:
    if not isinstance(given, dict):
        raise ValueError(f"{where}: must be an object, got {given!r:.60}")
    if name not in given:
        raise ValueError(f"{where}: {name}: is missing")
    return given[name]


def _identity(given: Any, where: str) -> Any:
    name = _field(given, "id", where)
    if isinstance(name, bool) or not isinstance(name, (int, str)):
        raise ValueError(f"{where}: id: must be a string or a whole number, got {name!r:.60}")
    return name


def _distinct(names: list[Any], where: str) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{where}: id: {name!r} occurs twice")
        seen.add(name)


def _list(given: Any, name: str, where: str) -> list[Any]:
    value = _field(given, name, where)
    if not isinstance(value, list):
        raise ValueError(f"{where}: {name}: must be a list, got {value!r:.60}")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{where}: must be a finite number, got {value!r:.60}")
    return float(value)


def _whole(given: Any, name: str, where: str) -> int:
    value = _number(_field(given, name, where), f"{where}: {name}")
    if value != math.floor(value) or value < 0:
        raise ValueError(f"{where}: {name}: must be a whole number >= 0, got {given[name]!r:.60}")
    return int(value)


def _truth(given: Any, name: str, where: str) -> bool:
    value = _field(given, name, where)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {name}: must be true or false, got {value!r:.60}")
    return value
