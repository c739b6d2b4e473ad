"""Builds one replica on TensorRT-LLM: checks the settings, loads, probes, takes over, and knows its speed.

    settings -> folder, device, speculation are checked     trtllm_settings.py: ValueError, the model stays not ready
             -> LLM(...)                                    trtllm_load.py: with the official switches that are there
             -> probe                                       trtllm_probe.py: which mode is safe, and why not more
             -> time model                                  trtllm_speed.py: a profile, a shipped one, or a warm-up run
             -> Pilot in the scheduler's place              trtllm_pilot.py

With one GPU the engine runs in this process (TLLM_WORKER_USE_SINGLE_PROCESS), so its scheduler is an attribute
away. With several it runs in processes of its own.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from slos_serve.scheduler import POLICIES, BatchShape, Capabilities, PerfModel, Request, Stage
from slos_serve.scheduler.core import Plan, Snapshot, StepReport
from slos_serve.scheduler.engine import Planner

from . import trtllm_api
from .config import EngineConfig
from .herald import Meter
from .loading import weights_fingerprint
from .roster import Roster
from .sessions import Sessions
from .tokenizer import Codec, Tokenizer
from .trtllm_front import LlmFront
from .trtllm_gate import Gate
from .trtllm_load import load, takes_priority
from .trtllm_pilot import Cockpit, Mode, Pilot, Ticket
from .trtllm_probe import Check, Findings, capabilities_of, check_requests, limits_of, prepare, probe, scheduler_class
from .trtllm_ranks import Ranks, RemotePilot
from .trtllm_settings import check_built_by, check_compiled, check_device, check_settings, end_ids, vocab_size
from .trtllm_speed import UNMEASURED, gpu_name, known_time_model, time_model
from .trtllm_worker import EngineMetrics, Tickets, TrtllmWorker
from .worker import Voice

log = logging.getLogger(__name__)

ONE_PROCESS: Final = "set tensor_parallel to 1, and TLLM_WORKER_USE_SINGLE_PROCESS to 1 where something else sets it"


@dataclass(frozen=True, slots=True)
class TrtllmBuilt:
    """One replica on TensorRT-LLM, ready to be given its callers."""

    front: LlmFront
    codec: Codec
    vocab_size: int
    perf: PerfModel
    capabilities: Capabilities
    findings: Findings
    most_active: int
    stage_end: int | None
    version: str
    gpu: str
    mode: Mode
    install: Callable[[Mode, Any, Tickets, Callable[[], Planner] | None], Pilot | RemotePilot | None]
    tickets: Callable[[], Tickets]
    fingerprint: str = ""  # equal for instances whose answers go on where another's ended

    @property
    def think_end_id(self) -> int | None:
        return self.stage_end

    def meter(self) -> Meter:
        """The load of this replica, by its time model."""
        return Meter(self.capabilities, self.perf.seconds)

    @property
    def max_context(self) -> int:
        limits = self.capabilities
        return min(limits.max_context, limits.num_blocks * limits.block_tokens)

    def prefill_seconds(self, tokens: int) -> float:
        """The time of a prompt on an idle engine, in batches as large as they may be."""
        whole = self.capabilities.max_batch_tokens
        parts = [(start, min(whole, tokens - start)) for start in range(0, tokens, whole)]
        return math.fsum(self.perf.seconds(BatchShape(n, 0, n * (start + 0.5 * n))) for start, n in parts)

    def worker(
        self,
        voice: Voice,
        observer: EngineMetrics,
        roster: Roster,
        sessions: Sessions,
        failed: Callable[[BaseException], None],
        meter: Meter | None = None,
    ) -> TrtllmWorker:
        """The worker, with the planner in the engine's scheduler where the checks allowed it."""
        tickets = self.tickets()
        pilots: list[Pilot | RemotePilot] = []

        def mode() -> Mode:
            return pilots[0].mode if pilots else Mode.GOVERNOR

        gate = Gate(self.perf, self.most_active, self.prefill_seconds, lambda: mode() is Mode.GOVERNOR)
        worker = TrtllmWorker(
            self.front, gate, tickets, lambda: mode().value, voice, observer, roster, sessions, failed, self.stage_end,
            meter,
        )  # fmt: skip
        pilot = self.install(self.mode, worker, tickets, None)
        if pilot is not None:
            pilots.append(pilot)
        for reason in self.findings.reasons:
            observer.counted("refused", reason.partition(":")[0])
        return worker


def build(config: EngineConfig, version_dir: Path) -> TrtllmBuilt:
    """Load and probe. Raises ValueError or OSError naming what is wrong."""
    started = time.monotonic()
    folder = version_dir / config.model
    check_settings(config, version_dir)
    is_compiled = any(folder.glob("rank*.engine"))
    if is_compiled:
        check_compiled(folder, config)
    elif not (folder / "config.json").exists():
        raise ValueError(f"model: {folder} has no config.json: neither a Hugging Face nor a compiled engine folder")
    api = trtllm_api.load()
    if is_compiled:
        check_built_by(folder, api.version)
    check_device(config.tensorrt_llm.tensor_parallel)
    codec = Tokenizer(folder if (folder / "tokenizer_config.json").exists() else version_dir / "tokenizer")
    ranks = Ranks() if config.tensorrt_llm.tensor_parallel > 1 and not is_compiled and api.has_inner else None
    llm = None
    try:
        llm = load(config, version_dir, api, is_compiled, known_time_model(config, version_dir))
        log.info("TensorRT-LLM %s loaded %s in %.1f s", api.version, folder, time.monotonic() - started)
        built = _build(config, version_dir, api, llm, codec, is_compiled, ranks)
    except BaseException:
        if llm is not None:
            llm.shutdown()  # it holds the GPU's memory
        if ranks is not None:
            ranks.close()
        raise
    log.info("ready after %.1f s: %s", time.monotonic() - started, built.capabilities)
    return built


def _build(
    config: EngineConfig,
    version_dir: Path,
    api: Any,
    llm: Any,
    codec: Tokenizer,
    is_compiled: bool,
    ranks: Ranks | None,
) -> TrtllmBuilt:
    folder = version_dir / config.model
    engine = getattr(getattr(llm, "_executor", None), "engine", None)
    front = LlmFront(
        llm, api.SamplingParams, end_ids(folder),
        engine=None if is_compiled else engine,
        closes=ranks.close if ranks is not None else lambda: None,
        takes_priority=not is_compiled and takes_priority(api),
        finishes_prompts=config.tensorrt_llm.block_reuse,
    )  # fmt: skip
    takes = None if is_compiled or not api.has_inner or engine is None else engine
    findings = ranks.findings() if ranks is not None else _findings(api, takes, is_compiled)
    capabilities = _capabilities(config, takes, ranks)
    mode = chosen_mode(config.tensorrt_llm.mode, findings)
    log.info("mode %s: %s", mode.value, "; ".join(findings.reasons) or "every check passed")

    vocabulary = vocab_size(folder, codec)

    def put(
        wanted: Mode, watcher: Any, tickets: Tickets, planner: Callable[[], Planner] | None, perf: PerfModel
    ) -> Pilot | RemotePilot | None:
        if mode is Mode.GOVERNOR:
            return None
        if ranks is not None:
            return ranks.fly(wanted, config.policy, perf, capabilities, watcher)
        make = planner or (lambda: POLICIES[config.policy](capabilities, perf))
        return install(takes, api, make, wanted, watcher, tickets)

    unmeasured = PerfModel.from_json(UNMEASURED)
    tickets = Tickets() if ranks is None else ranks.tickets()
    shadow = partial(put, Mode.SHADOW, _Nobody(), tickets, None, unmeasured)
    perf = time_model(config, version_dir, front, shadow, vocabulary, tickets)
    return TrtllmBuilt(
        front, codec, vocabulary, perf, capabilities, findings,
        most_active=_most_active(config, takes, ranks),
        stage_end=codec.token_id(config.think_end),
        version=api.version,
        gpu=gpu_name(),
        mode=mode,
        install=partial(put, perf=perf),
        fingerprint=weights_fingerprint(folder, config.dtype),
        tickets=Tickets if ranks is None else ranks.tickets,
    )  # fmt: skip


def chosen_mode(asked: str, findings: Findings) -> Mode:
    """The mode that was asked for, or the next one below it that the checks allow."""
    order = [Mode.FULL, Mode.TRIM, Mode.GOVERNOR]
    if asked == "shadow":
        return Mode.SHADOW if findings.mode is not Mode.GOVERNOR else Mode.GOVERNOR
    wanted = Mode.FULL if asked == "auto" else Mode(asked)
    return max(wanted, findings.mode, key=order.index)


def _findings(api: Any, engine: Any, is_compiled: bool) -> Findings:
    if engine is not None:
        prepare(engine)
        found = probe(api, engine)
        return Findings((*found.checks, check_requests(api)))
    if is_compiled:
        why = Check("compiled engine", Mode.GOVERNOR, "no Python scheduler", "give the Hugging Face folder for more")
    elif api.missing:
        why = Check("PyExecutor", Mode.GOVERNOR, api.missing[0], "this release has moved it")
    else:
        why = Check("one process", Mode.GOVERNOR, "the engine runs in other processes", ONE_PROCESS)
    return Findings((why,))


def _most_active(config: EngineConfig, engine: Any, ranks: Ranks | None) -> int:
    if ranks is not None and ranks.hello:
        return int(ranks.hello["most_active"])
    return int(getattr(engine, "max_num_active_requests", config.max_batch_requests))


def _capabilities(config: EngineConfig, engine: Any, ranks: Ranks | None) -> Capabilities:
    """By the engine's own numbers where they are known; else by the settings, and memory is left to the engine."""
    if ranks is not None and ranks.hello:
        return Capabilities(**{**ranks.hello["capabilities"], "max_context": config.max_context})
    if engine is None:
        blocks = config.max_batch_requests * -(-config.max_context // config.block_tokens)
        return Capabilities(
            blocks, config.block_tokens, config.max_batch_tokens, config.max_batch_requests, config.max_context
        )
    draft = drafts(engine)
    limits = limits_of(engine, chunked=True, max_draft=draft)
    blocks = int(engine.kv_cache_manager.get_max_resource_count())
    return capabilities_of(limits, blocks, config.max_context, draft)


def drafts(engine: Any) -> int:
    """The longest draft that the planner may choose per batch; 0 where the length is not its to choose."""
    drafter: Any = getattr(engine, "drafter", None)
    asks = drafter is not None and hasattr(drafter, "get_draft_len_for_batch_size")
    if not asks or getattr(drafter, "draft_len_schedule", None) is None or not engine.disable_overlap_scheduler:
        return 0
    return int(drafter.max_draft_len)


def install(
    engine: Any,
    api: Any,
    make_planner: Callable[[], Planner],
    mode: Mode,
    watcher: Any,
    tickets: Mapping[int, Ticket],
) -> Pilot:
    """Put a pilot in the place of a live, idle engine's scheduler, which becomes its stock."""
    stock = uninstall(engine)
    cache = engine.kv_cache_manager
    cockpit = Cockpit(
        stock=stock,
        states=api.LlmRequestState,
        make_output=api.SchedulerOutput,
        limits=limits_of(engine, chunked=True, max_draft=drafts(engine)),
        free_blocks=cache.get_num_free_blocks,
        is_unread=lambda: getattr(engine, "previous_batch", None) is not None and not engine.disable_overlap_scheduler,
    )
    pilot = Pilot(cockpit, make_planner, mode, watcher, tickets)
    _warm_up(make_planner())
    most = drafts(engine)
    if most and mode is Mode.FULL:
        # A length of 0 once would switch guessing off for the requests of that batch for good.
        least = 1 if hasattr(api.LlmRequest, "py_disable_speculative_decoding") else 0
        engine.drafter.get_draft_len_for_batch_size = lambda size: pilot.draft_length(
            least, most, engine.active_requests
        )
    engine.scheduler = scheduler_class(api)(pilot)
    return pilot


def uninstall(engine: Any) -> Any:
    """Give an idle engine its own scheduler and draft lengths back; returns that scheduler."""
    engine.scheduler = getattr(getattr(engine.scheduler, "pilot", None), "stock", engine.scheduler)
    if getattr(engine, "drafter", None) is not None:
        vars(engine.drafter).pop("get_draft_len_for_batch_size", None)
    return engine.scheduler


def _warm_up(planner: Planner) -> None:
    """Plan once, so that the first real plan compiles nothing."""
    planner.add(Request("warm-up", 0.0, 1, (Stage(1),)), 0.0)
    planner.plan(0.0)


class _Nobody:
    """Is told and does not care."""

    def stepped(self, plan: Plan, report: StepReport, planning: float) -> None: ...
    def event(self, kind: str, detail: str) -> None: ...
    def planned(self, plan: Plan, clients: Mapping[str, int]) -> None: ...
    def measured(self, snapshot: Snapshot) -> None: ...
