"""How fast the engine is on this machine: against a bound by hand, and against transformers' own `generate`.

    slos-serve bench-engine --model model_repository/slos_llm/1/target

Everything is measured in one run, each time the least of a few repeats, and shown as ratios, so that a
slow or busy machine slows both sides. The bound is the longer of moving all weights and keys once at the
measured memory bandwidth, and of computing all products at the measured rate of a large product.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from slos_serve.scheduler.core import Chunk, Plan

if TYPE_CHECKING:
    from .hf_model import LoadedModel
    from .torch_engine import TorchEngine

CONTEXT: Final = 512
DECODES: Final = (1, 2, 4, 8, 16, 32, 64)
PREFILLS: Final = (64, 128, 256, 512, 1024)
PROMPT_TOKENS: Final = 128
NEW_TOKENS: Final = 64
STREAMS: Final = (1, 8)
BLOCK_TOKENS: Final = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (default: a Llama with random weights)")
    parser.add_argument("--layers", type=int, default=8, help="layers of the random Llama (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=512, help="its hidden size (default: %(default)s)")
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
        folder = args.model or _random_llama(Path(scratch), args.layers, args.hidden)
        model = load_model(folder, dtype=args.dtype)
        machine = measure_machine(model, args.repeats)
        print(f"{folder}: {model.num_layers} layers, {_parameters(model) / 1e6:.1f} M parameters, {model.dtype}")
        print(
            f"{torch.get_num_threads()} threads, {machine.bandwidth / 1e9:.1f} GB/s, {machine.rate / 1e9:.0f} GFLOP/s"
        )
        _print_steps(model, machine, args.repeats)
        _print_generate(model, folder, args.repeats)
    return 0


@dataclass(frozen=True, slots=True)
class Machine:
    """What the hardware can do: bytes per second read, and floating-point operations per second."""

    bandwidth: float
    rate: float

    def reading(self, model: LoadedModel, kv_tokens: int) -> float:
        """Least seconds to read all weights once and `kv_tokens` keys and values."""
        moved = _parameters(model) * model.dtype.itemsize + kv_tokens * model.kv_bytes_per_token
        return moved / self.bandwidth

    def computing(self, model: LoadedModel, tokens: int, pairs: int, rows: int | None = None) -> float:
        """Least seconds for all products of `tokens` with `pairs` of query and key, and logits of `rows` of them."""
        head = int(model.model.lm_head.weight.numel())
        attention = 4 * pairs * model.num_layers * model.num_heads * model.head_dim
        products = (_parameters(model) - head) * tokens + head * (tokens if rows is None else rows)
        return (2 * products + attention) / self.rate

    def bound(self, model: LoadedModel, tokens: int, pairs: int, kv_tokens: int) -> float:
        """Least seconds for a batch of `tokens` with `pairs` of query and key, over `kv_tokens` keys in all."""
        return max(self.reading(model, kv_tokens), self.computing(model, tokens, pairs))


def measure_machine(model: LoadedModel, repeats: int, numbers: int = 1 << 26, side: int = 1024) -> Machine:
    """The bandwidth of summing so many numbers of 4 bytes, and the rate of a square product of the model's type."""
    import torch

    large = torch.ones(numbers, device=model.device)
    square = torch.ones(side, side, dtype=model.dtype, device=model.device)
    reading = _least_seconds(lambda: large.sum().item(), repeats)
    computing = _least_seconds(lambda: (square @ square)[0, 0].item(), repeats)
    return Machine(large.nbytes / reading, 2 * side**3 / computing)


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


def _random_llama(folder: Path, layers: int, hidden: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 128), max_position_embeddings=2048,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


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


def _print_steps(model: LoadedModel, machine: Machine, repeats: int) -> None:
    room = min(model.max_positions, max(PREFILLS) + 1)
    context = min(CONTEXT, room // 2)
    bench = _Bench(model, max(DECODES), room)
    print(f"\n{'decodes at context ' + str(context):>24} {'ms':>8} {'tokens/s':>9} {'x bound':>8} {'x singles':>9}")
    names = [f"decode {index}" for index in range(max(DECODES))]
    for name, prompt in zip(names, _prompts(model, len(names), context), strict=True):
        bench.add(name, prompt)
        bench.step({name: context})
    single = 0.0
    for count in DECODES:
        batch = dict.fromkeys(names[:count], 1)
        seconds = min(bench.step(batch) for _ in range(repeats + 1))
        single = single or seconds
        bound = machine.bound(model, count, count * context, count * context)
        print(_line(count, seconds, count, bound) + f" {seconds / (single * count):9.2f}")
    for name in names:
        bench.engine.release(name)
    print(f"\n{'prompt tokens':>24} {'ms':>8} {'tokens/s':>9} {'x bound':>8}")
    for count in (count for count in PREFILLS if count < room):
        seconds = min(_prefill(bench, model, count, seed) for seed in range(1, repeats + 2))
        print(_line(count, seconds, count, machine.bound(model, count, count * count // 2, count)))


def _prefill(bench: _Bench, model: LoadedModel, tokens: int, seed: int) -> float:
    """Seconds for a new random prompt."""
    name = f"prefill {seed} {tokens}"
    bench.add(name, _prompts(model, 1, tokens, seed=seed * 10_000 + tokens)[0])  # no beginning seen before
    seconds = bench.step({name: tokens})
    bench.engine.release(name)
    return seconds


def _line(label: object, seconds: float, tokens: int, bound: float) -> str:
    return f"{label:>24} {seconds * 1e3:8.2f} {tokens / seconds:9.0f} {seconds / bound:8.2f}"


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
