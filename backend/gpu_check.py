"""`slos-serve gpu-check`: is the engine right and fast on this GPU, and does the simulator predict it?

    slos-serve gpu-check --json result.json         Llama-3-8B and OPT-13B shapes, random weights, one GPU
    slos-serve gpu-check --through-triton           the last part through the real server and tritonclient
    slos-serve gpu-check --tiny                     the same steps on a CPU in seconds, with tiny shapes

For each shape: logits against float32, the time model on batches it was not fitted to, decodes against the
bytes that they move and prefills against the rate of a large product, then requests in real time under three
policies, measured beside simulated. Nothing is downloaded. Exits with 1 when logits are wrong; how fast it
is is reported beside the goal and judged by the reader.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from slos_serve.scheduler import POLICIES, BatchShape, PerfModel, Request, Slo, Stage
from slos_serve.scheduler.comparison import ALL, Comparison, compare, to_json
from slos_serve.scheduler.core import Chunk, Plan
from slos_serve.scheduler.observed import Observed
from slos_serve.scheduler.recording import Header, Recorder, read
from slos_serve.scheduler.simulator import Turnaround

if TYPE_CHECKING:
    import torch

    from .hf_model import LoadedModel
    from .torch_engine import TorchEngine

EXAMINED: Final = ("slos_serve", "sarathi", "vllm")
SHAPES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama-3-8b": (
        "LlamaConfig",
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
            "rope_theta": 500000.0, "bos_token_id": None, "eos_token_id": None,
        },
    ),
    "opt-13b": (
        "OPTConfig",
        {
            "vocab_size": 50272, "hidden_size": 5120, "ffn_dim": 20480, "num_hidden_layers": 40,
            "num_attention_heads": 40, "max_position_embeddings": 2048, "word_embed_proj_dim": 5120,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        },
    ),
}  # fmt: skip
TINY: Final[dict[str, dict[str, Any]]] = {
    "llama-3-8b": {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2},
    "opt-13b": {"hidden_size": 64, "ffn_dim": 128, "num_attention_heads": 4, "word_embed_proj_dim": 64},
}
NOISE: Final = 0.05  # of simulated iteration times
MAX_ERROR: Final = 0.05  # of the logits' norm: bfloat16 keeps 8 bits, in a few hundred roundings
GOALS: Final = {"decode": 1.3, "prefill": 0.6}


@dataclass(frozen=True, slots=True)
class Scale:
    """How large and how long everything is."""

    device: str
    layers: int | None  # None: the shape's own
    checked_layers: int
    block_tokens: int
    max_context: int
    max_batch_tokens: int
    max_requests: int
    kv_bytes: int  # 0: four fifths of what is free
    decodes: tuple[int, ...]
    context: int
    prefills: tuple[int, ...]
    profile_seconds: float
    serve_seconds: float
    load: float = 0.9  # of the capacity that the time model says
    repeats: int = 10


GPU: Final = Scale(
    "cuda", None, 4, 256, 2048, 2048, 128, 0, (1, 8, 32, 64, 128), 1024, (256, 512, 1024, 2048), 30.0, 20.0
)
CPU: Final = Scale("cpu", 2, 2, 16, 256, 128, 16, 4 << 20, (1, 4), 64, (32, 128), 1.0, 2.0, 0.5, 3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU: shows that the check itself works")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only this one (may be given again)")
    parser.add_argument("--through-triton", action="store_true", help="serve through tritonserver and its client")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=EXAMINED, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results, with hardware and versions")
    text = "where --through-triton takes its tokenizer from (default: %(default)s)"
    parser.add_argument("--tokenizer", type=Path, default=Path("model_repository/slos_llm/1/target"), help=text)


def run(args: argparse.Namespace) -> int:
    """Check every shape; 1 when logits are wrong. Raises ValueError without a GPU."""
    import torch

    if not args.tiny and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; --tiny runs the same steps on the CPU")
    scale = CPU if args.tiny else GPU
    results: dict[str, Any] = {"machine": facts(), "scale": asdict(scale), "shapes": {}}
    print(json.dumps(results["machine"]))
    wrong = False
    for name in args.shape or SHAPES:
        print(f"\n{name}: random weights", flush=True)
        found = results["shapes"][name] = _check(name, scale, args)
        wrong |= not found["correctness"]["right"]
        if args.json:  # after each, so that a lease that ends early leaves what there is
            args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(wrong)


def facts() -> dict[str, Any]:
    """Hardware and versions that the numbers are of."""
    import torch
    import transformers

    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "gpu": gpu.name if gpu else None,
        "gpu_memory_gb": round(gpu.total_memory / 2**30, 1) if gpu else None,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _config(name: str, scale: Scale, **changed: Any) -> Any:
    import transformers

    kind, fields = SHAPES[name]
    if scale.layers is not None:
        fields = {**fields, **TINY[name], "vocab_size": 512, "num_hidden_layers": scale.layers}
    return getattr(transformers, kind)(**{**fields, **changed})


def _check(name: str, scale: Scale, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from .hf_model import random_model

    found: dict[str, Any] = {
        "correctness": check_logits(_config(name, scale, num_hidden_layers=scale.checked_layers), scale)
    }
    _free(torch)
    model = random_model(_config(name, scale), dtype=torch.bfloat16, device=scale.device)
    engine = _engine(model, scale)
    perf, found["time_model"] = check_time_model(engine, model.vocab_size, scale)
    found["speed"] = check_speed(engine, model, scale)
    if not args.through_triton:
        found["serving"] = {
            policy: to_json(serve(policy, engine, model.vocab_size, perf, scale)) for policy in args.policies
        }
    del engine, model
    _free(torch)
    if args.through_triton:
        found["serving"] = serve_through_triton(name, scale, args)
    return found


def _free(torch: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _engine(model: LoadedModel, scale: Scale, **changed: Any) -> TorchEngine:
    import torch

    from . import flash
    from .torch_engine import TorchEngine

    free = scale.kv_bytes or int(0.8 * torch.cuda.mem_get_info()[0])
    settings = {
        "kv_cache_bytes": free, "block_tokens": scale.block_tokens, "max_batch_tokens": scale.max_batch_tokens,
        "max_batch_requests": scale.max_requests, "max_context": scale.max_context,
        "kernel": None if scale.device == "cuda" else flash.reference,
    }  # fmt: skip
    return TorchEngine(model, None, **{**settings, **changed})


# Correctness


def check_logits(config: Any, scale: Scale) -> dict[str, Any]:
    """Prefill in chunks beside decodes, then decodes alone, against one plain float32 forward of each prompt."""
    import torch

    from . import flash
    from .attention import Span
    from .hf_model import PagedModel, random_model

    model = random_model(config, dtype=torch.bfloat16, device=scale.device)
    blocks = 3 * -(-scale.max_context // scale.block_tokens)
    paged = PagedModel(
        model, blocks, scale.block_tokens, max_requests=4, kernel=None if scale.device == "cuda" else flash.reference
    )
    print(f"  {paged.way}")
    chance = np.random.default_rng(0)
    lengths = (scale.max_context // 2 + 3, scale.max_context // 4 + 1, 17)
    prompts = [chance.integers(0, model.vocab_size, length) for length in lengths]
    tables = [list(range(index, blocks, 3)) for index in range(3)]
    rows: list[list[torch.Tensor]] = [[], [], []]
    done = [0, 0, 0]
    with torch.inference_mode():
        while left := [index for index in range(3) if done[index] < lengths[index]]:
            # a large chunk, a small one and single tokens; the last eight of each prompt one at a time
            sizes = [
                max(1, min(size, lengths[index] - 8 - done[index]))
                for index, size in zip(left, (100, 30, 1), strict=False)
            ]
            spans = [
                Span(prompts[index][done[index] : done[index] + size], done[index], tables[index])
                for index, size in zip(left, sizes, strict=True)
            ]
            logits = paged.forward(spans, range(sum(sizes)))
            for index, part in zip(left, torch.split(logits, sizes), strict=True):
                rows[index].append(part.clone())
                done[index] += len(part)
        model.model.config._attn_implementation = "eager"
        plain = model.model.float()
        errors, same, count = [], 0, 0
        for prompt, parts in zip(prompts, rows, strict=True):
            wanted = plain(torch.from_numpy(prompt)[None].to(scale.device)).logits[0]
            got = torch.cat(parts).float()
            errors.append(float((got - wanted).norm() / wanted.norm()))
            same += int((got.argmax(-1) == wanted.argmax(-1)).sum())
            count += len(prompt)
    result = {
        "way": paged.way,
        "relative_error": max(errors),
        "limit": MAX_ERROR,
        "same_top_token": same / count,
        "right": max(errors) < MAX_ERROR,
    }
    verdict, same_share = "right" if result["right"] else "WRONG", f"{100 * same / count:.1f} %"
    print(f"  logits {verdict}: relative error {max(errors):.4f} (limit {MAX_ERROR}), same top token {same_share}")
    return result


# Speed


def check_time_model(engine: TorchEngine, vocab_size: int, scale: Scale) -> tuple[PerfModel, dict[str, Any]]:
    """The time model of this engine and its quality on batches it was not fitted to."""
    from .profiling import fit_samples, measure

    samples = measure(engine, vocab_size, scale.profile_seconds)
    perf, score = fit_samples(samples)
    print(
        f"  time model of {len(samples)} batches, {score.samples} held out: R2 {score.r2:.3f}, MAPE {score.mape:.1f} %"
    )
    return perf, {"perf": perf.to_json(), **asdict(score)}


def check_speed(engine: TorchEngine, model: LoadedModel, scale: Scale) -> dict[str, Any]:
    """Decodes against reading weights and keys once, prefills against the rate of a large product."""
    from .bench_engine import measure_machine

    machine = measure_machine(model, scale.repeats, *((1 << 30, 8192) if scale.device == "cuda" else (1 << 22, 256)))
    print(f"  {machine.bandwidth / 1e9:.0f} GB/s read, {machine.rate / 1e12:.1f} TFLOP/s in a large product")
    decodes = []
    for count, seconds in _decode_seconds(engine, model.vocab_size, scale):
        floor = machine.reading(model, count * scale.context)
        decodes.append({"requests": count, "seconds": seconds, "times_floor": seconds / floor})
        print(f"  {count:5d} decodes at {scale.context}: {1e3 * seconds:8.2f} ms, {seconds / floor:5.2f} x the floor")
    prefills = []
    for tokens, seconds in _prefill_seconds(engine, model.vocab_size, scale):
        share = machine.computing(model, tokens, tokens * tokens // 2, rows=1) / seconds
        prefills.append({"tokens": tokens, "seconds": seconds, "share_of_ceiling": share})
        print(f"  prompt of {tokens:5d}:       {1e3 * seconds:8.2f} ms, {100 * share:5.1f} % of the ceiling")
    return {
        "bandwidth": machine.bandwidth,
        "rate": machine.rate,
        "decode": decodes,
        "prefill": prefills,
        "goals": GOALS,
    }


def _decode_seconds(engine: TorchEngine, vocab_size: int, scale: Scale) -> Iterator[tuple[int, float]]:
    for count in scale.decodes:
        names = [f"decode {count} {index}" for index in range(count)]
        for name in names:
            _add(engine, name, scale.context, scale.repeats + 2, vocab_size)
            _prefill(engine, name, scale.context)
        times = []
        for turn in range(scale.repeats):
            plan = Plan(tuple(Chunk(name, scale.context + turn, 1) for name in names))
            report = engine.step(plan, 0.0)
            times.append(report.finished_at - report.started_at)
        for name in names:
            engine.release(name)
        yield count, min(times[1:])


def _prefill_seconds(engine: TorchEngine, vocab_size: int, scale: Scale) -> Iterator[tuple[int, float]]:
    for tokens in (each for each in scale.prefills if each < scale.max_context):
        times = []
        for turn in range(scale.repeats):
            name = f"prefill {tokens} {turn}"
            _add(engine, name, tokens, 1, vocab_size)
            report = engine.step(Plan((Chunk(name, 0, tokens),)), 0.0)
            times.append(report.finished_at - report.started_at)
        yield tokens, min(times[1:])


def _add(engine: TorchEngine, name: str, tokens: int, new_tokens: int, vocab_size: int) -> int:
    """A request with a random prompt of its own: no two names share a prefix."""
    from .generation import Generation, SamplingParams

    ids = np.random.default_rng(zlib.crc32(name.encode())).integers(0, vocab_size, tokens).tolist()
    return engine.add(Generation(name, ids, (new_tokens,), SamplingParams(ignore_eos=True)))


def _prefill(engine: TorchEngine, name: str, tokens: int) -> None:
    room = engine.capabilities.max_batch_tokens
    for start in range(0, tokens, room):
        engine.step(Plan((Chunk(name, start, min(room, tokens - start)),)), 0.0)


# Serving


def arrivals(perf: PerfModel, scale: Scale, seed: int = 0) -> list[Request]:
    """A chat and a coding class and best effort, Poisson at `scale.load` of what the time model can do.

    All tokens asked for are generated. SLOs are multiples of what the engine does on its own, so that every
    shape is as hard.
    """
    chance = np.random.default_rng(seed)
    longest = scale.max_context // 2
    alone = perf.seconds(BatchShape(1, longest))
    tpot = 4 * perf.seconds(BatchShape(scale.max_requests // 4, scale.max_requests // 4 * longest))
    kinds = {"chat": Slo(max(0.25, 20 * alone), 2 * tpot), "code": Slo(max(0.25, 20 * alone), tpot), "free": None}
    found: list[Request] = []
    at = 0.0
    rows = max(scale.max_requests // 4, 1)
    step = perf.seconds(BatchShape(rows, rows * longest // 2)) / rows
    while True:
        prompt = int(np.clip(chance.lognormal(math.log(longest / 3), 0.7), 4, longest))
        output = int(np.clip(chance.lognormal(math.log(longest / 6), 0.7), 2, longest - 1))
        at += float(chance.exponential((prompt * _token_seconds(perf, scale) + output * step) / scale.load))
        if at > scale.serve_seconds:
            return found
        kind = str(chance.choice(list(kinds), p=(0.5, 0.3, 0.2)))
        found.append(Request(str(len(found)), at, prompt, (Stage(output, kinds[kind]),), slo_class=kind))


def _token_seconds(perf: PerfModel, scale: Scale) -> float:
    most = scale.max_batch_tokens
    return perf.seconds(BatchShape(most, 0, most * most / 2)) / most


def serve(policy: str, engine: TorchEngine, vocab_size: int, perf: PerfModel, scale: Scale) -> list[Comparison]:
    """Real requests in real time under a policy, and the simulation of the same arrivals."""
    from .build import warm_up

    warm_up(POLICIES[policy](engine.capabilities, perf))
    header = Header(policy, engine.capabilities, perf)
    lines: list[str] = []
    planner = Recorder(POLICIES[policy](engine.capabilities, perf), header, lines.append)
    start = time.monotonic() + 0.05
    pending = [
        replace(each, id=f"{policy}-{each.id}", arrived_at=start + each.arrived_at) for each in arrivals(perf, scale)
    ][::-1]
    live = 0
    while pending or live:
        now = time.monotonic()
        while pending and pending[-1].arrived_at <= now:
            request = pending.pop()
            cached = _add(engine, request.id, request.prompt_tokens, request.max_new_tokens, vocab_size)
            planner.add(replace(request, cached_tokens=cached), now)
            live += 1
        plan = planner.plan(time.monotonic())
        if plan.chunks or plan.evicted:
            report = engine.step(plan, now)
            planner.report(report)
            live -= sum(advance.done for advance in report.advances)
        elif pending:
            time.sleep(max(0.0, min(pending[-1].arrived_at - time.monotonic(), 0.05)))
    (recording,) = read(lines)
    world = Observed(perf, NOISE, Turnaround())
    rows = compare(recording, POLICIES[policy], {policy: lambda name: True}, world)
    (whole,) = (row for row in rows if row.slo_class == ALL)
    print(
        f"  {policy:10s} {whole.live.requests} requests: attained {_share(whole.live.attained)} measured, "
        f"{_share(whole.simulated.attained)} simulated; TTFT p50 {_ms(whole.live.ttft_ms)} / "
        f"{_ms(whole.simulated.ttft_ms)} ms, TPOT p50 {_ms(whole.live.tpot_ms)} / {_ms(whole.simulated.tpot_ms)} ms",
        flush=True,
    )
    return rows


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def serve_through_triton(name: str, scale: Scale, args: argparse.Namespace) -> dict[str, Any]:
    """The demo's mixture through tritonserver under each policy, by `slos-serve reality` on a saved random model.

    The model has the vocabulary of the shipped tokenizer, since text must come out.
    """
    with tempfile.TemporaryDirectory(prefix="slos-gpu-check-") as scratch:
        repository = Path(scratch) / "repository"
        _save_repository(name, scale, args.tokenizer, repository / "slos_llm")
        results = {}
        for policy in args.policies:
            output = Path(scratch) / f"{policy}.json"
            command = [sys.executable, "-m", "slos_serve.backend.cli", "reality", f"--model-repository={repository}"]
            command += [f"--set=policy={policy}", f"--json={output}", f"--seconds={scale.serve_seconds}"]
            command += ["--loads", "0.9", f"--profile-seconds={scale.profile_seconds}"]
            command += [f"--probe-requests={scale.max_requests}"]
            print(f"  {policy} through tritonserver", flush=True)
            subprocess.run(command, check=True)
            results[policy] = json.loads(output.read_text(encoding="utf-8"))
    return results


def _save_repository(name: str, scale: Scale, tokenizer: Path, folder: Path) -> None:
    import torch

    from .hf_model import random_model

    target = folder / "1" / "target"
    target.mkdir(parents=True)
    shipped = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
    # prompts of the mixture need the context of the shipped model
    context = max(scale.max_context, 2048)
    config = _config(name, scale, vocab_size=shipped["vocab_size"], max_position_embeddings=context)
    model = random_model(config, dtype=torch.bfloat16, device=scale.device)
    model.model.save_pretrained(target)
    for path in tokenizer.glob("tokenizer*"):
        (target / path.name).write_bytes(path.read_bytes())
    (folder / "config.pbtxt").write_text('backend: "slos_serve"\ninstance_group [{ kind: KIND_MODEL count: 1 }]\n')
    free = torch.cuda.mem_get_info()[0] if scale.device == "cuda" else 0
    settings = {
        "dtype": "bfloat16", "device": scale.device, "block_tokens": scale.block_tokens, "max_context": context,
        "max_batch_tokens": max(scale.max_batch_tokens, 256), "max_batch_requests": scale.max_requests, "max_draft": 0,
        "kv_cache_mb": int(0.8 * free / 2**20) if free else 64,
    }  # fmt: skip
    (folder / "1" / "engine.json").write_text(json.dumps(settings))
    del model
    _free(torch)
