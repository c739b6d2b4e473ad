"""Builds one replica on TensorRT-LLM: checks the settings, loads, probes, takes over, and knows its speed.

    settings -> folder, device, speculation are checked     ValueError: the model stays not ready
             -> LLM(...)                                    TensorRT-LLM's own LLM API
             -> probe                                       trtllm_probe.py: which mode is safe, and why not more
             -> time model                                  a profile, a shipped one, or a warm-up run
             -> Pilot in the scheduler's place              trtllm_pilot.py

With one GPU the engine runs in this process (TLLM_WORKER_USE_SINGLE_PROCESS), so its scheduler is an attribute
away. With several it runs in processes of its own.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from slos_serve.scheduler import POLICIES, BatchShape, Capabilities, PerfModel, Request, Stage
from slos_serve.scheduler.core import Plan, Snapshot, StepReport
from slos_serve.scheduler.engine import Planner

from . import trtllm_api
from .config import EngineConfig
from .generation import Generation, SamplingParams
from .herald import Meter
from .loading import weights_fingerprint
from .profiling import Profile, Sample, fit_samples
from .roster import Roster
from .sessions import Sessions
from .shipped import shipped_profile
from .tokenizer import Codec, Tokenizer
from .trtllm_gate import Gate
from .trtllm_pilot import Cockpit, Mode, Pilot, Ticket
from .trtllm_probe import Findings, capabilities_of, check_requests, limits_of, prepare, probe, scheduler_class
from .trtllm_ranks import Ranks, RemotePilot
from .trtllm_worker import EngineMetrics, Fresh, Tickets, TrtllmWorker
from .worker import Voice

log = logging.getLogger(__name__)

LEAST_SM: Final = 80  # A100; older ones lack bfloat16 and the paged attention kernels
WARM_UP_SECONDS: Final = 20.0
WARM_UP_ROUNDS: Final = ((1, 64, 16), (4, 256, 24), (16, 128, 24), (32, 512, 32), (2, 2048, 8), (64, 64, 32))
LEAST_SAMPLES: Final = 40
# Iterations of this length are assumed until some were measured: about those of an 8 B model on an A100.
UNMEASURED: Final = {"pieces": [[2e-5, 0.0, 0.012]], "per_context": 5e-8, "per_area": 1e-9}


class LlmHandle:
    """One generation of TensorRT-LLM's LLM API."""

    def __init__(self, output: Any) -> None:
        self._output = output
        self._given = 0

    @property
    def client_id(self) -> int:
        return int(self._output.request_id)

    async def results(self) -> AsyncIterator[Fresh]:
        async for output in self._output:
            completion = output.outputs[0]
            new = tuple(completion.token_ids[self._given :])
            self._given += len(new)
            reason = str(completion.finish_reason or "length") if output.finished else None
            yield Fresh(new, reason)
            if reason is not None:
                return

    def abort(self) -> None:
        if not self._output.finished:
            self._output.abort()


class LlmFront:
    """TensorRT-LLM's LLM: what goes in and out of it. `engine` is its PyExecutor where that is in this process."""

    def __init__(
        self,
        llm: Any,
        make_params: Any,
        end_ids: Sequence[int],
        engine: Any,
        closes: Callable[[], None],
    ) -> None:
        """`closes` is called when the engine is gone."""
        self._closes = closes
        self._llm = llm
        self._make_params = make_params
        self._end_ids = tuple(end_ids)
        self.engine = engine

    @property
    def is_alive(self) -> bool:
        thread = getattr(self.engine, "worker_thread", None)
        return thread is None or bool(thread.is_alive())

    def generate(
        self, generation: Generation, already: Sequence[int], tickets: Tickets, ticket: Ticket | None
    ) -> LlmHandle:
        """Start one; `already` was generated before it was taken back. Raises ValueError for what is refused."""
        left = sum(generation.stage_limits) - len(already)
        params = self._make_params(**sampling_arguments(generation.sampling, left, self._end_ids))
        with tickets.lock:
            output = self._llm.generate_async([*generation.token_ids, *already], params, streaming=True)
            if ticket is not None:
                tickets[int(output.request_id)] = ticket
        return LlmHandle(output)

    def shutdown(self) -> None:
        self._llm.shutdown()
        self._closes()


def _nothing() -> None:
    pass


def sampling_arguments(sampling: SamplingParams, max_tokens: int, end_ids: Sequence[int]) -> dict[str, Any]:
    """Arguments of TensorRT-LLM's SamplingParams. Greedy is a top-k of 1 there; seeds draw other numbers than ours."""
    ends = (sampling.end_id,) if sampling.end_id is not None else tuple(end_ids)
    arguments: dict[str, Any] = {
        "max_tokens": max_tokens,
        "end_id": ends[0] if ends else -1,
        "pad_id": ends[0] if ends else 0,
        "ignore_eos": sampling.ignore_eos,
        "min_tokens": sampling.min_tokens or None,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "detokenize": False,
    }
    if len(ends) > 1 and not sampling.ignore_eos:
        arguments["stop_token_ids"] = list(ends[1:])
    if sampling.is_greedy:
        return {**arguments, "top_k": 1}
    return {
        **arguments,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": max(sampling.top_k, 0),
        "min_p": sampling.min_p,
        "seed": sampling.seed,
    }


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
    check_device(config.tensorrt_llm.tensor_parallel)
    codec = Tokenizer(folder if (folder / "tokenizer_config.json").exists() else version_dir / "tokenizer")
    ranks = Ranks() if config.tensorrt_llm.tensor_parallel > 1 and not is_compiled and api.has_inner else None
    llm = _load(config, version_dir, api, is_compiled)
    log.info("TensorRT-LLM %s loaded %s in %.1f s", api.version, folder, time.monotonic() - started)
    try:
        built = _build(config, version_dir, api, llm, codec, is_compiled, ranks)
    except BaseException:
        llm.shutdown()  # it holds the GPU's memory
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
        llm, api.SamplingParams, end_ids(folder), None if is_compiled else engine, ranks.close if ranks else _nothing
    )
    takes = None if is_compiled or not api.has_inner or engine is None else engine
    findings = ranks.findings() if ranks is not None else _findings(api, takes, is_compiled)
    capabilities = _capabilities(config, takes, ranks)
    mode = chosen_mode(config.tensorrt_llm.mode, findings)
    log.info("mode %s: %s", mode.value, "; ".join(findings.reasons) or "every check passed")

    vocab_size = _vocab_size(folder, codec)

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
    shadow = partial(put, Mode.SHADOW, _Nobody(), Tickets(), None, unmeasured)
    perf = _time_model(config, version_dir, front, shadow, vocab_size)
    return TrtllmBuilt(
        front, codec, vocab_size, perf, capabilities, findings,
        most_active=_most_active(config, takes, ranks),
        stage_end=codec.token_id(config.think_end),
        version=api.version,
        gpu=_gpu_name(),
        mode=mode,
        install=partial(put, perf=perf),
        fingerprint=weights_fingerprint(folder, config.dtype),
        tickets=Tickets if ranks is None else ranks.tickets,
    )  # fmt: skip


# Settings


def check_settings(config: EngineConfig, version_dir: Path) -> None:
    """Raise ValueError for settings that contradict each other or cannot be served."""
    own = config.tensorrt_llm
    if config.policy not in POLICIES:
        raise ValueError(f"policy: must be one of {', '.join(POLICIES)}, got {config.policy!r}")
    if config.dtype == "float32":
        raise ValueError("dtype: tensorrt_llm computes in bfloat16 or float16, got 'float32'")
    if own.speculation in ("draft_target", "eagle3") and not config.draft_model:
        raise ValueError(f"draft_model: speculation {own.speculation!r} needs one, got null")
    if own.speculation in ("ngram", "mtp") and config.draft_model:
        raise ValueError(f"draft_model: speculation {own.speculation!r} has none, got {config.draft_model!r}")
    if own.speculation and not config.max_draft:
        raise ValueError(f"max_draft: speculation {own.speculation!r} needs at least 1, got 0")
    if own.speculation and own.overlap and own.mode == "full":
        raise ValueError("overlap: must be false where the planner chooses draft lengths (speculation in mode full)")
    if config.block_tokens & (config.block_tokens - 1):
        raise ValueError(f"block_tokens: must be a power of two, got {config.block_tokens}")
    if config.max_batch_tokens < config.block_tokens:
        raise ValueError(
            f"max_batch_tokens: must hold one block of {config.block_tokens} tokens, got {config.max_batch_tokens}"
        )
    if config.profile and not (version_dir / config.profile).exists():
        raise ValueError(f"profile: there is no file {version_dir / config.profile}; set null to measure at start")
    if config.draft_model:
        _check_vocabularies(version_dir / config.model, version_dir / config.draft_model, own.speculation)


def _check_vocabularies(target: Path, draft: Path, kind: str | None) -> None:
    sizes = [_read(folder / "config.json").get("vocab_size") for folder in (target, draft)]
    if kind == "draft_target" and sizes[0] != sizes[1]:
        raise ValueError(f"draft_model: {draft} has a vocabulary of {sizes[1]}, {target} one of {sizes[0]}")


def check_compiled(folder: Path, config: EngineConfig) -> None:
    """Raise ValueError for a compiled engine that cannot be served, or not by these settings."""
    data = _read(folder / "config.json")
    built, plugins = data.get("build_config", {}), data.get("build_config", {}).get("plugin_config", {})
    for name, text in (("paged_kv_cache", "a paged KV cache"), ("use_paged_context_fmha", "chunked context")):
        if plugins.get(name) is False:
            raise ValueError(f"model: {folder} was built without {text}: build it again with {name} enabled")
    ranks = len(list(folder.glob("rank*.engine")))
    if ranks != config.tensorrt_llm.tensor_parallel:
        raise ValueError(f"tensor_parallel: {folder} was built for {ranks}, got {config.tensorrt_llm.tensor_parallel}")
    for ours, theirs in (("max_batch_tokens", "max_num_tokens"), ("max_context", "max_seq_len")):
        most, asked = built.get(theirs), getattr(config, ours)
        if most is not None and asked > most:
            raise ValueError(f"{ours}: {folder} was built for at most {most}, got {asked}")
    if config.tensorrt_llm.mode not in ("auto", "governor"):
        raise ValueError(f"mode: a compiled engine can only be governed, got {config.tensorrt_llm.mode!r}")


def check_device(tensor_parallel: int) -> None:
    """Raise ValueError where there is no GPU that TensorRT-LLM runs on, or too few."""
    import torch

    count = torch.cuda.device_count()
    if count < tensor_parallel:
        raise ValueError(f"tensor_parallel: {tensor_parallel} GPUs are needed, {count} are there")
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < LEAST_SM:
        raise ValueError(
            f"device: {torch.cuda.get_device_name()} has compute capability {major}.{minor}, at least 8.0 is needed"
        )


def chosen_mode(asked: str, findings: Findings) -> Mode:
    """The mode that was asked for, or the next one below it that the checks allow."""
    order = [Mode.FULL, Mode.TRIM, Mode.GOVERNOR]
    if asked == "shadow":
        return Mode.SHADOW if findings.mode is not Mode.GOVERNOR else Mode.GOVERNOR
    wanted = Mode.FULL if asked == "auto" else Mode(asked)
    return max(wanted, findings.mode, key=order.index)


# Loading


def _load(config: EngineConfig, version_dir: Path, api: Any, is_compiled: bool) -> Any:
    own = config.tensorrt_llm
    kv_cache: dict[str, Any] = {
        "free_gpu_memory_fraction": own.kv_fraction,
        "enable_block_reuse": own.block_reuse,
        "tokens_per_block": config.block_tokens,
    }
    if "use_kv_cache_manager_v2" in _fields(api.KvCacheConfig):
        kv_cache["use_kv_cache_manager_v2"] = False
    arguments: dict[str, Any] = {
        "model": str(version_dir / config.model),
        "tensor_parallel_size": own.tensor_parallel,
        "skip_tokenizer_init": True,
        "kv_cache_config": api.KvCacheConfig(**kv_cache),
        "enable_chunked_prefill": True,
    }
    if is_compiled:
        return trtllm_api.compiled_llm()(**arguments)
    arguments |= {
        "dtype": config.dtype,
        "max_batch_size": config.max_batch_requests,
        "max_num_tokens": config.max_batch_tokens,
        "max_seq_len": config.max_context,
        "disable_overlap_scheduler": not own.overlap,
        "scheduler_config": api.SchedulerConfig(
            capacity_scheduler_policy=api.CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
        ),
        "enable_iter_perf_stats": True,
    }
    if not own.cuda_graphs:
        arguments["cuda_graph_config"] = None
    if own.speculation is not None:
        arguments["speculative_config"] = _speculation(config, version_dir)
    return api.LLM(**arguments)


def _speculation(config: EngineConfig, version_dir: Path) -> Any:
    kind = config.tensorrt_llm.speculation
    assert kind is not None
    if kind == "mtp":
        return trtllm_api.speculation(kind)(num_nextn_predict_layers=config.max_draft)
    make = trtllm_api.speculation(kind)
    arguments: dict[str, Any] = {"max_draft_len": config.max_draft}
    known = _fields(make)
    if config.draft_model:
        name = "speculative_model" if "speculative_model" in known else "speculative_model_dir"
        arguments[name] = str(version_dir / config.draft_model)
    if kind != "eagle3" and "draft_len_schedule" in known:
        # Permissive: with it the drafter is asked for the length of each batch, and the planner answers.
        arguments["draft_len_schedule"] = {1: config.max_draft}
    return make(**arguments)


def _fields(model: Any) -> Mapping[str, Any]:
    return getattr(model, "model_fields", None) or getattr(model, "__annotations__", {})


def _findings(api: Any, engine: Any, is_compiled: bool) -> Findings:
    from .trtllm_probe import Check

    if engine is not None:
        prepare(engine)
        found = probe(api, engine)
        return Findings((*found.checks, check_requests(api)))
    if is_compiled:
        why = Check("compiled engine", Mode.GOVERNOR, "no Python scheduler", "give the Hugging Face folder for more")
    elif api.missing:
        why = Check("PyExecutor", Mode.GOVERNOR, api.missing[0], "this release has moved it")
    else:
        why = Check("one process", Mode.GOVERNOR, "the engine runs in other processes", "set tensor_parallel to 1")
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


# Speed


def _time_model(
    config: EngineConfig,
    version_dir: Path,
    front: LlmFront,
    shadow: Callable[[], Pilot | RemotePilot | None],
    vocab_size: int,
) -> PerfModel:
    """A profile file, else the shipped time model of this GPU and model, else one measured in a warm-up run.

    `shadow` lets a pilot look on. Where none can, a common iteration time is assumed, and said so.
    """
    if config.profile:
        return Profile.read(version_dir / config.profile).perf
    found = shipped_profile(_gpu_name(), version_dir / config.model, config.tensorrt_llm.tensor_parallel)
    if found is not None:
        log.info("time model of %s", found[0])
        return found[1]
    pilot = shadow()
    if isinstance(pilot, Pilot):
        asyncio.run(_exercise(front, config, vocab_size, WARM_UP_SECONDS))
        fitted = fit_observed(pilot)
        if fitted is not None:
            log.info("time model from %d batches of a warm-up run, MAPE %.1f %%", len(pilot.samples), fitted[1])
            return fitted[0]
    log.warning("iteration times are assumed, not measured: give a profile")
    return PerfModel.from_json(UNMEASURED)


async def _exercise(front: LlmFront, config: EngineConfig, vocab_size: int, seconds: float) -> None:
    """Run random prompts of several sizes and numbers, for about `seconds` but every size once."""
    chance = random.Random(0)
    until = time.monotonic() + seconds
    first = True
    while first or time.monotonic() < until:
        for count, prompt, new in WARM_UP_ROUNDS:
            if not first and time.monotonic() > until:
                return
            prompt = min(prompt, config.max_context - new - 1)
            if prompt < 1:
                continue
            jobs = []
            for index in range(min(count, config.max_batch_requests)):
                ids = [chance.randrange(vocab_size) for _ in range(max(1, prompt - chance.randrange(prompt // 2 + 1)))]
                wish = Generation(f"warm-up-{index}", ids, (new,), SamplingParams(ignore_eos=True))
                jobs.append(_drain(front.generate(wish, (), Tickets(), None)))
            await asyncio.gather(*jobs)
        first = False


async def _drain(handle: LlmHandle) -> None:
    async for _ in handle.results():
        pass


class _Nobody:
    """Is told and does not care."""

    def stepped(self, plan: Plan, report: StepReport, planning: float) -> None: ...
    def event(self, kind: str, detail: str) -> None: ...
    def planned(self, plan: Plan, clients: Mapping[str, int]) -> None: ...
    def measured(self, snapshot: Snapshot) -> None: ...


def _gpu_name() -> str:
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else ""


def fit_observed(pilot: Pilot) -> tuple[PerfModel, float] | None:
    """The time model of the batches that a pilot saw, and its error in percent; None for too few."""
    samples = [Sample(shape, seconds) for shape, seconds in list(pilot.samples) if seconds > 0]
    if len(samples) < LEAST_SAMPLES:
        return None
    perf, score = fit_samples(samples)
    return perf, score.mape


# The folder


def end_ids(folder: Path) -> tuple[int, ...]:
    """The tokens that end a text, of the generation settings or the model's."""
    for name in ("generation_config.json", "config.json"):
        found = _read(folder / name).get("eos_token_id") if (folder / name).exists() else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    return ()


def _vocab_size(folder: Path, codec: Tokenizer) -> int:
    data = _read(folder / "config.json")
    return int(data.get("vocab_size") or data.get("pretrained_config", {}).get("vocab_size") or codec.vocab_size)


def _read(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model: {path} is not JSON: {error}") from error
    return data
