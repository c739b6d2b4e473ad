"""`locust -f loadtest/locustfile.py`: open-loop load with SLO statistics, in the web page or headless.

    locust -f loadtest/locustfile.py --headless -u 1 -t 60s --addresses 127.0.0.1:8001 --rate 4 --rhythm onoff
    locust -f loadtest/locustfile.py --via place --addresses HOST1:8001,HOST2:8001     # then open the web page

Each Locust user is one source of arrivals at `--rate`, played by a process of its own (`player`), so N users bring
N times the rate, on as many workers as there are, and Locust's own green threads distort no time. Statistics by
application class: the request, TTFT, TPOT, and SLO, whose failures are the misses. GENERATOR LAG is how late requests
were sent; a run whose 99th percentile is above `--max-lag-ms` is called invalid, whatever else it shows.

Exit code: 0 kept, 1 attainment below `--min-attainment` or a request lost, 3 invalid.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

import gevent
from locust import User, constant, events

from slos_serve.loadtest.player import RHYTHMS, VIA, Settings

log = logging.getLogger("slos_serve.locust")

LAG: Final = ("LAG", "generator")
FAIR: Final = ("done", "refused", "cancelled")


class Missed(Exception):
    """A request with an SLO that was not kept."""


class Unfair(Exception):
    """A request that was lost, answered twice, failed or left hanging."""


def _arguments(parser: Any) -> None:
    group = parser.add_argument_group("slos-serve")
    choices = {"via": VIA, "rhythm": RHYTHMS}
    for field in fields(Settings):
        kind = {"str": str, "float": float, "int": int}[str(field.type)]
        option = f"--{field.name.replace('_', '-')}"
        group.add_argument(option, type=kind, default=field.default, choices=choices.get(field.name))
    group.add_argument("--min-attainment", type=float, default=0.0, help="of each class, for exit code 0")
    group.add_argument("--max-lag-ms", type=float, default=100.0, help="above it the run is invalid")
    group.add_argument("--records", default="", help="file for one JSON line per request")
    group.add_argument("--slo-json", default="", help="file for the summary by class")


class Source(User):  # type: ignore[misc]
    """One source of arrivals: runs a player and turns its lines into Locust's statistics."""

    wait_time = constant(1)
    _count = 0

    def on_start(self) -> None:
        options = self.environment.parsed_options
        Source._count += 1
        runner = self.environment.runner
        index = getattr(runner, "worker_index", 0) if runner is not None else 0
        values = {field.name: getattr(options, field.name) for field in fields(Settings)}
        values["seed"] = options.seed + 1000 * max(index, 0) + Source._count
        settings = Settings.from_json(values)
        command = [sys.executable, "-m", "slos_serve.loadtest.player", json.dumps(asdict(settings))]
        self._player = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._records = Path(options.records) if options.records else None
        self._reader = gevent.spawn(self._read)

    def watch(self) -> None:
        """Locust's task: the player does the work, and here only its death is noticed."""
        if self._player.poll() not in (None, 0):
            log.error("the player ended with %s", self._player.poll())
            self.environment.process_exit_code = 1
            self.environment.runner.quit()

    tasks: Final = [watch]

    def on_stop(self) -> None:
        """Send nothing new, and wait for what runs."""
        if self._player.stdin is not None:
            self._player.stdin.close()
        self._reader.join()
        self._player.wait()

    def _read(self) -> None:
        assert self._player.stdout is not None
        for text in self._player.stdout:
            if self._records is not None:
                with self._records.open("a", encoding="utf-8") as file:
                    file.write(text)
            self._count_in(json.loads(text))

    def _count_in(self, ended: dict[str, Any]) -> None:
        name = ended["slo_class"]
        fault = None if ended["outcome"] in FAIR else Unfair(f"{ended['outcome']}: {ended['error'][:200]}")
        self._fire(ended["transport"].upper(), name, ended["total_ms"] or 0.0, ended["tokens"], fault)
        self._fire(*LAG, max(ended["lag_ms"], 0.0))
        if ended["ttft_ms"] is not None:
            self._fire("TTFT", name, ended["ttft_ms"])
        if ended["tpot_ms"] is not None:
            self._fire("TPOT", name, ended["tpot_ms"])
        if ended["attained"] is not None:
            missed = None if ended["attained"] else Missed("a token came late" if ended["tokens"] else "no token")
            self._fire("SLO", name, max(ended["late_ms"] or 0.0, 0.0), 0, missed)

    def _fire(self, kind: str, name: str, value: float, length: int = 0, fault: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type=kind, name=name, response_time=value, response_length=length, exception=fault, context={}
        )


def summary(stats: Any) -> dict[str, Any]:
    """Attainment, TTFT and TPOT by class, faults, and the generator's lag, from Locust's own statistics."""
    classes: dict[str, dict[str, Any]] = {}
    faults = 0
    lag = None
    for (name, kind), entry in stats.entries.items():
        if (kind, name) == LAG:
            lag = entry.get_response_time_percentile(0.99)
        elif kind in ("GRPC", "HTTP"):
            faults += entry.num_failures
            classes.setdefault(name, {}).setdefault("requests", 0)
            classes[name]["requests"] += entry.num_requests
        elif kind == "SLO":
            classes.setdefault(name, {})["attained"] = 1.0 - entry.num_failures / max(entry.num_requests, 1)
        elif kind in ("TTFT", "TPOT"):
            spread = {f"p{p}_ms": entry.get_response_time_percentile(p / 100) for p in (50, 99)}
            classes.setdefault(name, {})[kind.lower()] = spread
    return {"classes": classes, "faults": faults, "lag_p99_ms": lag}


def _page(environment: Any, **_: Any) -> None:
    """The summary as JSON beside Locust's own page, at /slo."""
    if environment.web_ui is not None:
        environment.web_ui.app.add_url_rule("/slo", "slo", lambda: summary(environment.stats))


def _conclude(environment: Any, **_: Any) -> None:
    """The verdict, as text and as exit code; on the master, or where there are no workers."""
    if type(environment.runner).__name__ == "WorkerRunner":
        return
    options, found = environment.parsed_options, summary(environment.stats)
    if options.slo_json:
        Path(options.slo_json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    lag = found["lag_p99_ms"]
    below = [n for n, each in found["classes"].items() if each.get("attained", 1.0) < options.min_attainment]
    for name, each in sorted(found["classes"].items()):
        kept = f"{100 * each['attained']:.1f} %" if "attained" in each else "-"
        log.info("%-14s %5d requests, attained %s", name, each.get("requests", 0), kept)
    if lag is None:
        environment.process_exit_code = 3
        log.error("INVALID: no request was sent")
    elif lag > options.max_lag_ms:
        environment.process_exit_code = 3
        log.error("INVALID: requests were sent up to %.0f ms late (p99), allowed are %.0f", lag, options.max_lag_ms)
    elif found["faults"] or below:
        environment.process_exit_code = 1
        log.error("%d requests lost or failed; below the attainment wanted: %s", found["faults"], ", ".join(below))
    else:
        environment.process_exit_code = 0


events.init_command_line_parser.add_listener(_arguments)
events.init.add_listener(_page)
events.quitting.add_listener(_conclude)
