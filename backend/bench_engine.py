"""How fast the engine is on this machine: against a bound by hand, transformers' own `generate`, and vLLM.

    slos-serve bench-engine --model model_repository/slos_llm/1/target --threads 1 [--vllm-python ENV/bin/python]

Everything is measured in one run, each time the least of a few repeats, and shown as ratios, so that a
slow or busy machine slows both sides. The bound is the longer of moving all weights and keys once, at the
bandwidth with which so many bytes are read again and again (what fits into a cache is read from there), and of
computing all products at the rate of a large product, PyTorch's or ours, whichever is faster. "x parts" is
against the sum of that for the products with weights and for attention, which no single thread does at once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from slos_serve.scheduler.core import Chunk, Plan

from .random_model import write_model

if TYPE_CHECKING:
    import torch

    from .attention import Span
    from .hf_model import LoadedModel
    from .torch_engine import TorchEngine

DECODES: Final = (1, 2, 4, 8, 16, 32, 64)
PREFILLS: Final = (64, 128, 256, 512, 1024)
PROMPT_TOKENS: Final = 128
NEW_TOKENS: Final = 64
STREAMS: Final = (1, 8)
BLOCK_TOKENS: Final = 16
HEADER: Final = f"{'ms':>8} {'tokens/s':>9} {'x bound':>8} {'x parts':>8}"
VLLM: Final = f" {'vLLM ms':>8} {'/ ours':>8}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (default: a Llama with random weights)")
    parser.add_argument("--layers", type=int, default=8, help="layers of the random Llama (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=512, help="its hidden size (default: %(default)s)")
    parser.add_argument("--context", type=int, default=512, help="tokens before a decode (default: %(default)s)")
    parser.add_argument("--decodes", type=int, nargs="*", default=DECODES, help="batches (default: 1 to 64)")
    parser.add_argument("--prompts", type=int, nargs="*", default=PREFILLS, help="tokens (default: 64 to 1024)")
    parser.add_argument("--vllm-python", type=Path, help="the interpreter of an environment with vLLM's CPU build")
    parser.add_argument("--vllm-dtype", help="its type of weights (default: ours)")
    parser.add_argument("--dtype", default="float32", help="type of weights and KV (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="PyTorch threads (default: one for each core)")
    parser.add_argument(
        "--repeats", type=int, default=7, help="runs of which the fastest counts (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    import torch

    from .hf_model import load_model

    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or Path(scratch)
        if not args.model:
            write_model(folder, args.hidden, args.layers, args.hidden // 64)
        model = load_model(folder, dtype=args.dtype)
        machine = measure_machine(model, args.repeats)
        print(f"{folder}: {model.num_layers} layers, {_parameters(model) / 1e6:.1f} M parameters, {model.dtype}")
        print(
            f"{torch.get_num_threads()} threads, {machine.bandwidth / 1e9:.1f} GB/s, {machine.rate / 1e9:.0f} GFLOP/s"
        )
        _print_steps(model, machine, args, _vllm_steps(folder, args) if args.vllm_python else {})
        _print_generate(model, folder, args.repeats)
    return 0


def _vllm_steps(folder: Path, args: argparse.Namespace) -> Mapping[str, Mapping[str, float]]:
    """Seconds of vLLM's iterations, `decodes` and `prompts` by their size; runs before ours, alone."""
    import torch

    program = args.vllm_python.parents[1]
    openmp = program / "lib" / "libiomp5.so"  # vLLM's own advice
    command = [args.vllm_python, Path(__file__).with_name("vllm_steps.py"), folder]
    command += ["--dtype", args.vllm_dtype or args.dtype, "--threads", str(torch.get_num_threads())]
    command += ["--context", str(args.context), "--repeats", str(args.repeats)]
    command += ["--decodes", *map(str, args.decodes), "--prompts", *map(str, args.prompts)]
    # without the number vLLM takes all cores where its engine runs in one process, whatever it is bound to
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment |= {"LD_PRELOAD": str(openmp)} if openmp.exists() else {}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"slos-serve bench-engine: --vllm-python {args.vllm_python}: vLLM ended with {done.returncode}"
        )
    found: Mapping[str, Mapping[str, float]] = json.loads(done.stdout.splitlines()[-1])
    print(f"vLLM kept {found['cores']['busy']:.2f} cores busy")
    return found


@dataclass(frozen=True, slots=True)
class Machine:
    """What the hardware can do: bytes per second read, and floating-point operations per second."""

    bandwidth: float
    rate: float

    def reading(self, model: LoadedModel, kv_tokens: int) -> float:
        """Least seconds to read all weights once and `kv_tokens` keys and values."""
        return _moved(model, kv_tokens) / self.bandwidth

    def computing(self, model: LoadedModel, tokens: int, pairs: int, rows: int | None = None) -> float:
        """Least seconds for all products of `tokens` with `pairs` of query and key, and logits of `rows` of them."""
        head = int(model.model.lm_head.weight.numel())
        attention = 4 * pairs * model.num_layers * model.num_heads * model.head_dim
        products = (_parameters(model) - head) * tokens + head * (tokens if rows is None else rows)
        return (2 * products + attention) / self.rate

    def bounds(self, model: LoadedModel, tokens: int, pairs: int, kv_tokens: int, rows: int) -> tuple[float, float]:
        """Least seconds for a batch of `tokens` with `pairs` of query and key, over `kv_tokens` keys in all.

        First when all reading and all computing overlap, then when products and attention follow each other.
        """
        best = replace(self, bandwidth=max(self.bandwidth, _bandwidth_of(_moved(model, kv_tokens), model.device)))
        weights, keys = best.reading(model, 0), kv_tokens * model.kv_bytes_per_token / best.bandwidth
        products, attention = self.computing(model, tokens, 0, rows), self.computing(model, 0, pairs, 0)
        return max(weights + keys, products + attention), max(weights, products) + max(keys, attention)


def measure_machine(model: LoadedModel, repeats: int, numbers: int = 1 << 26, side: int = 1024) -> Machine:
    """The bandwidth of summing so many numbers of 4 bytes, and the rate of a square product of the model's type."""
    import torch

    large = torch.ones(numbers, device=model.device)
    square = torch.ones(side, side, dtype=model.dtype, device=model.device)
    reading = _least_seconds(lambda: large.sum().item(), repeats)
    computing = _least_seconds(lambda: (square @ square)[0, 0].item(), repeats)
    if model.device.type == "cpu":
        computing = min(computing, _own_product(side, repeats))
    return Machine(large.nbytes / reading, 2 * side**3 / computing)


def _own_product(side: int, repeats: int) -> float:
    import torch

    from .packed import PackedLinear

    packed = PackedLinear(torch.nn.Linear(side, side, bias=False))
    square = torch.ones(side, side)
    return _least_seconds(lambda: packed(square), repeats)


def _moved(model: LoadedModel, kv_tokens: int) -> int:
    """Bytes of all weights and of `kv_tokens` keys and values."""
    return _parameters(model) * model.dtype.itemsize + kv_tokens * model.kv_bytes_per_token


def _bandwidth_of(moved: int, device: torch.device) -> float:
    """Bytes per second when a power of two of bytes, the next below `moved`, is read again and again."""
    return _bandwidth(max(1 << 20, 1 << (moved.bit_length() - 1)), device)


@lru_cache(maxsize=32)
def _bandwidth(size: int, device: torch.device, repeats: int = 9) -> float:
    import torch

    numbers = torch.ones(size // 4, device=device)
    return size / _least_seconds(lambda: numbers.sum().item(), repeats)


def _least_seconds(action: Callable[[], object], repeats: int) -> float:
    action()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)


def _parameters(model: LoadedModel) -> int:
    """Weights that every token is multiplied with: all but the embeddings that are only looked up."""
    count = sum(parameter.numel() for parameter in model.model.parameters())
    embedding = model.model.get_input_embeddings().weight
    return int(count if model.model.lm_head.weight is embedding else count - embedding.numel())


class _Bench:
    """An engine with requests of random tokens."""

    def __init__(self, model: LoadedModel, requests: int, tokens: int) -> None:
        from .torch_engine import TorchEngine

        size = model.kv_bytes_per_token * BLOCK_TOKENS * (requests * (tokens // BLOCK_TOKENS + 1) + 2)
        self.engine: TorchEngine = TorchEngine(
            model, None, kv_cache_bytes=size, block_tokens=BLOCK_TOKENS,
            max_batch_tokens=tokens * requests, max_batch_requests=requests, max_context=tokens,
        )  # fmt: skip
        self._room = tokens
        self._computed: dict[str, int] = {}
        self._forward = self.engine._model.forward
        self.forward_seconds = 0.0  # of the last step, inside the model
        # the time inside the model is nobody's business but a bench's: the engine has no hook for it
        self.engine._model.forward = self._timed_forward  # type: ignore[method-assign]

    def _timed_forward(self, spans: Sequence[Span], rows: Sequence[int]) -> torch.Tensor:
        started = time.monotonic()
        logits = self._forward(spans, rows)
        self.forward_seconds = time.monotonic() - started
        return logits

    def add(self, name: str, prompt: Sequence[int], new_tokens: int | None = None) -> None:
        from .generation import Generation, SamplingParams

        limit = new_tokens or self._room - len(prompt)
        self._computed[name] = self.engine.add(Generation(name, prompt, (limit,), SamplingParams(ignore_eos=True)))

    def step(self, lengths: dict[str, int]) -> float:
        """Run one batch; its seconds."""
        chunks = tuple(Chunk(name, self._computed[name], length) for name, length in lengths.items())
        report = self.engine.step(Plan(chunks), 0.0)
        for advance in report.advances:
            self._computed[advance.request_id] = advance.computed
            if advance.done:
                del self._computed[advance.request_id]
        return report.finished_at - report.started_at

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        """All prompts in one batch, then one token of each at a time."""
        for index, prompt in enumerate(prompts):
            self.add(str(index), prompt, new_tokens)
        self.step({name: len(prompts[0]) - computed for name, computed in self._computed.items()})
        while self._computed:
            self.step(dict.fromkeys(self._computed, 1))


def _prompts(model: LoadedModel, count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    chance = np.random.default_rng(seed)
    prompts: list[list[int]] = chance.integers(0, model.vocab_size, (count, tokens)).tolist()
    return prompts


def _print_steps(
    model: LoadedModel, machine: Machine, args: argparse.Namespace, vllm: Mapping[str, Mapping[str, float]]
) -> None:
    """Tables of decodes and prompts; the last columns only where vLLM was asked."""
    context = min(args.context, model.max_positions // 2)
    longest = max([context + len(args.decodes) * (args.repeats + 1), *args.prompts]) + 1
    room = min(model.max_positions, longest)
    most = max([1, *args.decodes])
    bench = _Bench(model, most, room)
    print(f"\n{'decodes at context ' + str(context):>24} {HEADER} {'x singles':>9} {'outside':>8}" + VLLM * bool(vllm))
    names = [f"decode {index}" for index in range(most)]
    for name, prompt in zip(names, _prompts(model, len(names), context), strict=True):
        bench.add(name, prompt)
        bench.step({name: context})
    single = 0.0
    for count in args.decodes:
        batch = dict.fromkeys(names[:count], 1)
        seconds, forward = min((bench.step(batch), bench.forward_seconds) for _ in range(args.repeats + 1))
        single = single or seconds / count
        bounds = machine.bounds(model, count, count * context, count * context, count)
        print(
            _line(count, seconds, bounds) + f" {seconds / (single * count):9.2f} {1 - forward / seconds:8.1%}"
            + _beside(vllm, "decodes", count, seconds)
        )  # fmt: skip
    for name in names:
        bench.engine.release(name)
    print(f"\n{'prompt tokens':>24} {HEADER}" + VLLM * bool(vllm))
    for count in (count for count in args.prompts if count < room):
        seconds = min(_prefill(bench, model, count, seed) for seed in range(1, args.repeats + 2))
        bounds = machine.bounds(model, count, count * count // 2, count, 1)
        print(_line(count, seconds, bounds) + _beside(vllm, "prompts", count, seconds))


def _beside(vllm: Mapping[str, Mapping[str, float]], kind: str, count: int, seconds: float) -> str:
    if not vllm:
        return ""
    theirs = vllm[kind][str(count)]
    return f" {theirs * 1e3:8.2f} {theirs / seconds:8.2f}"


def _prefill(bench: _Bench, model: LoadedModel, tokens: int, seed: int) -> float:
    """Seconds for a new random prompt."""
    name = f"prefill {seed} {tokens}"
    bench.add(name, _prompts(model, 1, tokens, seed=seed * 10_000 + tokens)[0])  # no beginning seen before
    seconds = bench.step({name: tokens})
    bench.engine.release(name)
    return seconds


def _line(tokens: int, seconds: float, bounds: Sequence[float]) -> str:
    ratios = "".join(f" {seconds / bound:8.2f}" for bound in bounds)
    return f"{tokens:>24} {seconds * 1e3:8.2f} {tokens / seconds:9.0f}{ratios}"


def _print_generate(model: LoadedModel, folder: Path, repeats: int) -> None:
    """The same prompts, greedy, all with the same number of new tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from .hf_model import no_progress_bars

    with no_progress_bars():
        plain = AutoModelForCausalLM.from_pretrained(str(folder), dtype=model.dtype, local_files_only=True)
    plain = plain.to(model.device).eval()
    print(f"\n{PROMPT_TOKENS} + {NEW_TOKENS} tokens, new tokens/s")
    print(f"{'streams':>24} {'engine':>8} {'generate':>9} {'ratio':>8}")
    for streams in STREAMS:
        prompts = _prompts(model, streams, PROMPT_TOKENS)
        ids = torch.tensor(prompts, device=model.device)
        ours = theirs = float("inf")
        for _ in range(repeats):  # in turns, so that other load on the machine meets both
            ours = min(ours, _engine_seconds(model, prompts))
            theirs = min(theirs, _plain_seconds(plain, ids))
        tokens = streams * NEW_TOKENS
        print(f"{streams:>24} {tokens / ours:8.0f} {tokens / theirs:9.0f} {theirs / ours:8.2f}")


def _engine_seconds(model: LoadedModel, prompts: Sequence[Sequence[int]]) -> float:
    bench = _Bench(model, len(prompts), PROMPT_TOKENS + NEW_TOKENS)
    started = time.perf_counter()
    bench.generate(prompts, NEW_TOKENS)
    return time.perf_counter() - started


def _plain_seconds(plain: Any, ids: Any) -> float:
    import torch

    started = time.perf_counter()
    with torch.inference_mode():
        plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
    return time.perf_counter() - started
