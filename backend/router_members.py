"""Which instances there are: a list in the settings, a file that is read again, a name with several addresses.

A source that cannot be read keeps what it said last, so a lookup that fails or a file half written takes no
instance away. Says nothing about whether an instance is well.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from pathlib import Path

from .router_config import RouterConfig, parse_addresses

log = logging.getLogger(__name__)


class Members:
    """The addresses now. `changed` is called with all of them, in order, when they are others than before."""

    def __init__(self, config: RouterConfig, version_dir: Path, changed: Callable[[tuple[str, ...]], None]) -> None:
        self._config = config
        self._file = None if config.instances_file is None else version_dir / config.instances_file
        self._changed = changed
        self._from_file: tuple[str, ...] = ()
        self._from_dns: tuple[str, ...] = ()
        self._known: tuple[str, ...] | None = None
        self._complaint = ""

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(max(self._config.refresh_s, 0.05))

    async def look(self) -> None:
        """Look once."""
        try:
            if self._file is not None:
                self._from_file = parse_addresses(self._file.read_text(encoding="utf-8"))
            if self._config.dns is not None:
                self._from_dns = await resolve(self._config.dns)
            self._complaint = ""
        except (OSError, ValueError) as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.warning("instances: %s; keeping those known", error)
        addresses = tuple(dict.fromkeys((*self._config.instances, *self._from_file, *self._from_dns)))
        if addresses != self._known:
            self._known = addresses
            self._changed(addresses)


async def resolve(name: str) -> tuple[str, ...]:
    """Every address of HOST:PORT, sorted. Raises OSError."""
    host, _, port = name.rpartition(":")
    found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    addresses = {str(address[0]) for *_, address in found}
    return tuple(sorted(f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}" for ip in addresses))
