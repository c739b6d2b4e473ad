"""The settings of a router, read from `router.json` beside it.

Unknown keys, wrong values, duplicate and malformed addresses are refused with what was got.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

_SECONDS: Final = ("refresh_s", "silent_s", "stalled_s", "wait_s", "coalesce_ms", "max_responses_s", "unseen_s")


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """One router. Where the instances are: `instances`, `instances_file` and `dns` add up; one must be given."""

    # The model that every instance serves.
    model: str = "slos_llm"
    # Addresses HOST:PORT of the instances' gRPC side.
    instances: tuple[str, ...] = ()
    # A file with one address a line, read again when it changes: relative to the version folder, or absolute.
    instances_file: str | None = None
    # HOST:PORT where HOST has an address for each instance (a headless service), looked up again and again.
    dns: str | None = None
    # Seconds between two looks at file and name: more means later news.
    refresh_s: float = 1.0
    # Without a sign of life for so long an instance is suspected, and its requests move: less moves them sooner,
    # and by mistake when the machine is busy.
    silent_s: float = 0.5
    # The same for an engine whose process answers.
    stalled_s: float = 4.0
    # How long a request waits for an instance when there is none; then UNAVAILABLE.
    wait_s: float = 5.0
    # Instances that may decline a request before it is served best effort.
    max_hops: int = 3
    # Instances that are compared for a request; of more so many are drawn at random: more costs time, per request.
    max_ranked: int = 64
    # Instances that may fail under one request before it is given up: a request may be what kills them.
    max_losses: int = 4
    # Tokens that are early are held so long to be forwarded together: more costs less, and the text comes in pieces.
    coalesce_ms: float = 100.0
    # Responses that this router passes on in a second, about: with more streams they are held longer, as far as their
    # due times allow. More keeps the text smoother and takes more of the machine.
    max_responses_s: float = 400.0
    # Nobody can see the caller of an ensemble leave: what may be computed for one who has left is at most so many
    # tokens, and, where the request has no timeout of its own, what so many seconds allow.
    unseen_tokens: int = 8192
    unseen_s: float = 600.0
    # Requests in flight at once; beyond: OVERLOADED.
    max_requests: int = 4096

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model: must be a non-empty string, got {self.model!r}")
        for name in ("instances_file", "dns"):
            if getattr(self, name) is not None and not (isinstance(getattr(self, name), str) and getattr(self, name)):
                raise ValueError(f"{name}: must be a non-empty string or null, got {getattr(self, name)!r}")
        for name in _SECONDS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name}: must be a number of at least 0, got {value!r}")
        if not self.max_responses_s > 0:
            raise ValueError(f"max_responses_s: must be above 0, got {self.max_responses_s!r}")
        for name in ("max_hops", "max_ranked", "max_losses", "unseen_tokens", "max_requests"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: must be an integer of at least 1, got {value!r}")
        if not self.instances and self.instances_file is None and self.dns is None:
            raise ValueError("instances, instances_file, dns: one of them must say where the instances are")
        check_addresses(self.instances)
        if self.dns is not None:
            check_address(self.dns)


def check_address(address: object) -> None:
    """Raises ValueError unless it is HOST:PORT."""
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or any(c.isspace() for c in host):
        raise ValueError(f"an address must be HOST:PORT, got {address!r}")


def check_addresses(addresses: Iterable[object]) -> None:
    """Raises ValueError for a malformed address, and for one that is there twice."""
    seen: set[object] = set()
    for address in addresses:
        check_address(address)
        if address in seen:
            raise ValueError(f"instances: {address} is listed twice")
        seen.add(address)


def parse_addresses(text: str) -> tuple[str, ...]:
    """One address a line; empty lines and what follows # are left out. Raises ValueError as `check_addresses`."""
    found = tuple(line for line in (raw.partition("#")[0].strip() for raw in text.splitlines()) if line)
    check_addresses(found)
    return found


def read_router_config(version_dir: Path) -> RouterConfig:
    """The settings in `router.json`. Raises FileNotFoundError, or ValueError that starts with the file's name."""
    path = version_dir / "router.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        known = [field.name for field in fields(RouterConfig)]
        if not isinstance(data, dict):
            raise ValueError(f"must be a JSON object, got {data!r}")
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}; known: {', '.join(known)}")
        if not isinstance(data.get("instances", []), list):
            raise ValueError(f"instances: must be a list of addresses, got {data['instances']!r}")
        return RouterConfig(**{**data, "instances": tuple(data.get("instances", ()))})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
