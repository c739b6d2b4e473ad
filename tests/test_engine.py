"""The engine computes what plain Hugging Face code computes, whatever the batches; memory is never lost."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from slos_serve.backend.attention import Span
from slos_serve.backend.generation import Generation, Output, SamplingParams
from slos_serve.backend.hf_model import LoadedModel, ModelError, PagedModel, load_model
from slos_serve.backend.torch_engine import TorchEngine
from slos_serve.scheduler.core import Advance, Chunk, Plan

VOCABULARY = 96
CONTEXT = 320
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32,
    "max_position_embeddings": CONTEXT, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
GATED: dict[str, Any] = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
OPT: dict[str, Any] = {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GATED),
    "llama-one-kv-head": LlamaConfig(**{**GATED, "num_key_value_heads": 1}),
    "llama-all-kv-heads": LlamaConfig(**{**GATED, "num_key_value_heads": 4}),
    "qwen2": Qwen2Config(**GATED),
    "qwen3": Qwen3Config(**GATED, head_dim=16),
    "mistral": MistralConfig(**GATED, sliding_window=None),
    "opt": OPTConfig(**OPT),
    "opt-350m": OPTConfig(**{**OPT, "word_embed_proj_dim": 16}, do_layer_norm_before=False),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models gain nothing from more, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a folder with random weights, large enough that attention matters."""

    def folder(config: PretrainedConfig, seed: int = 0) -> Path:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        path = tmp_path_factory.mktemp("model")
        model.save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="module")
def target(build: Callable[..., Path]) -> LoadedModel:
    return load_model(build(FAMILIES["llama"]), device="cpu")


@pytest.fixture(scope="module")
def draft(build: Callable[..., Path]) -> LoadedModel:
    return load_model(build(LlamaConfig(**{**GATED, "num_hidden_layers": 1}), seed=1), device="cpu")


def prompts(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    chance = np.random.default_rng(seed)
    return [chance.integers(2, VOCABULARY, length) for length in lengths]


def engine(model: LoadedModel, draft: LoadedModel | None = None, blocks: int = 64, **settings: Any) -> TorchEngine:
    """An engine with so many blocks of 16 tokens."""
    drafted = draft.kv_bytes_per_token if draft is not None and settings.get("max_draft") else 0
    defaults = {"max_batch_tokens": 512, "max_batch_requests": 32, "max_context": CONTEXT}
    size = (model.kv_bytes_per_token + drafted) * 16 * (blocks + 2)
    return TorchEngine(model, draft, kv_cache_bytes=size, **{**defaults, **settings})


def check_memory(engine: TorchEngine) -> None:
    """The pool is whole and every request holds exactly the blocks of its computed tokens."""
    engine._pool.check()
    for sequence in engine._sequences.values():
        assert len(sequence.blocks) == engine._pool.blocks_for(sequence.computed), sequence.request_id


@dataclass
class Driver:
    """Runs requests to their end with any plans that the engine must be able to run."""

    engine: TorchEngine
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    known: dict[str, int] = field(default_factory=dict)
    computed: dict[str, int] = field(default_factory=dict)
    said: dict[str, list[int]] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, prompt: np.ndarray, sampling: SamplingParams | None = None, **options: Any) -> int:
        limits = options.pop("limits", (24,))
        cached = self.engine.add(Generation(name, prompt, limits, sampling or SamplingParams(), **options))
        self.known[name], self.computed[name], self.said[name] = len(prompt), cached, []
        return cached

    def step(self, *chunks: Chunk, evicted: tuple[str, ...] = ()) -> tuple[Advance, ...]:
        for name in evicted:
            self.computed[name] = 0
        report = self.engine.step(Plan(tuple(chunks), evicted), 0.0)
        for advance in report.advances:
            self.known[advance.request_id] += advance.new_tokens
            self.computed[advance.request_id] = advance.computed
        for output in self.engine.outputs:
            self._take(output)
        check_memory(self.engine)
        live = [name for name in self.known if name not in self.ended]
        held = sum(-(-self.computed[name] // 16) for name in live)
        assert report.free_blocks is not None
        assert self.engine.capabilities.num_blocks - report.free_blocks + report.shared_blocks == held
        return tuple(report.advances)

    def _take(self, output: Output) -> None:
        self.said[output.request_id] += output.token_ids
        if output.finish_reason is not None:
            self.ended[output.request_id] = output.finish_reason

    def next_chunk(self, name: str, length: int, draft: int = 0) -> Chunk:
        start = self.computed[name]
        length = min(length, self.known[name] - start)
        draft = draft if start + length == self.known[name] else 0
        return Chunk(name, start, length + draft, draft)

    def run(self, draft: int = 0) -> dict[str, list[int]]:
        """Everything at once, whole prompts, until all have ended."""
        while live := [name for name in self.known if name not in self.ended]:
            self.step(*(self.next_chunk(name, 10**6, draft) for name in live))
        return self.said

    def run_at_random(self, draft: int = 0, eviction: float = 0.0) -> dict[str, list[int]]:
        """Random requests with random chunks in each batch, some evicted on the way."""
        while live := [name for name in self.known if name not in self.ended]:
            evicted = tuple(name for name in live if self.computed[name] and self.chance.random() < eviction)
            for name in evicted:
                self.computed[name] = 0
            chosen = [name for name in live if self.chance.random() < 0.7]
            sizes = {name: self.chance.choice((1, 2, 5, 17, 40, 300)) for name in chosen}
            self.step(*(self.next_chunk(name, sizes[name], draft) for name in chosen), evicted=evicted)
        return self.said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_threads_change_no_bit(build: Callable[..., Path], family: str, dtype: torch.dtype) -> None:
    """All layers as one call and each step of a layer on three threads give the same logits."""
    model = load_model(build(FAMILIES[family]), dtype=dtype, device="cpu")
    for name, parameter in model.model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    long, short = prompts(300, 40)
    paged = PagedModel(model, 24, 16)
    spans = [Span(long, 0, list(range(19))), Span(short, 0, [22, 20, 21])]
    alone = paged.forward(spans, [7, 299, 339]).clone()
    torch.set_num_threads(3)
    assert torch.equal(paged.forward(spans, [7, 299, 339]), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_plain_model(family: str, dtype: torch.dtype, build: Callable[..., Path]) -> None:
    """Whatever the chunks and the batches, logits equal the plain forward within rounding."""
    folder = build(FAMILIES[family])
    paged = PagedModel(load_model(folder, dtype=dtype, device="cpu"), 32, 16)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = prompts(3, 50, 140, 33)
    chance = random.Random(len(family))
    with torch.inference_mode():
        expected = [plain(torch.from_numpy(ids)[None]).logits[0] for ids in tokens]
        got = run_chunks(paged, tokens, chance)
    # bfloat16 keeps 8 bits of each of a few hundred roundings; the weights are rounded as well
    limit = 1e-4 if dtype == torch.float32 else 0.5
    for wanted, logits in zip(expected, got, strict=True):
        torch.testing.assert_close(logits.float(), wanted, atol=limit, rtol=0)


def run_chunks(
    paged: PagedModel, tokens: list[np.ndarray], chance: random.Random, block_tokens: int = 16
) -> list[torch.Tensor]:
    """All logits of several prompts, computed in random chunks in random batches over scattered blocks."""
    blocks = list(range(32))
    chance.shuffle(blocks)
    tables = [blocks[index * 9 : (index + 1) * 9] for index in range(len(tokens))]
    tables[-1] += blocks[27:]
    parts_of_block = range(16 // block_tokens)
    tables = [[block * len(parts_of_block) + part for block in table for part in parts_of_block] for table in tables]
    parts: list[list[torch.Tensor]] = [[] for _ in tokens]
    done = [0] * len(tokens)
    while left := [index for index, ids in enumerate(tokens) if done[index] < len(ids)]:
        chosen = [index for index in left if chance.random() < 0.7] or left[:1]
        spans = []
        for index in chosen:
            end = done[index] + chance.choice((1, 1, 4, 20, 60))
            spans.append(Span(tokens[index][done[index] : end], done[index], tables[index]))
            done[index] = spans[-1].end
        logits = paged.forward(spans, range(sum(len(span.tokens) for span in spans)))
        for index, part in zip(chosen, logits.split([len(span.tokens) for span in spans]), strict=True):
            parts[index].append(part)
    return [torch.cat(part) for part in parts]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "block_tokens"), [(torch.float32, 16), (torch.bfloat16, 16), (torch.float32, 8)],
    ids=["float32", "bfloat16", "gathered"],
)  # fmt: skip
def test_logits_have_the_same_bits_in_any_batch(
    dtype: torch.dtype, block_tokens: int, threads: int, build: Callable[..., Path]
) -> None:
    """Chunking and batching change no bit, so that no near tie can fall the other way."""
    torch.set_num_threads(threads)
    model = load_model(build(FAMILIES["llama"]), dtype=dtype, device="cpu")
    paged = PagedModel(model, 512 // block_tokens, block_tokens)
    tokens = prompts(3, 50, 140, 33)
    with torch.inference_mode():
        whole = [paged.forward([Span(ids, 0, range(18))], range(len(ids))) for ids in tokens]
        for seed in range(3):
            parts = run_chunks(paged, tokens, random.Random(seed), block_tokens)
            for wanted, logits in zip(whole, parts, strict=True):
                assert torch.equal(wanted, logits)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_logits_are_the_same_where_keys_are_gathered(family: str, build: Callable[..., Path]) -> None:
    """Blocks that the kernels for CPUs do not take are gathered, and give the plain model's logits too."""
    folder = build(FAMILIES[family])
    paged = PagedModel(load_model(folder, device="cpu"), 64, 8)
    assert paged.way == "keys are gathered"
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = prompts(3, 50, 140, 33)
    with torch.inference_mode():
        expected = [plain(torch.from_numpy(ids)[None]).logits[0] for ids in tokens]
        got = run_chunks(paged, tokens, random.Random(0), 8)
    for wanted, logits in zip(expected, got, strict=True):
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


MANNERS = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(temperature=1.0, top_p=0.9, seed=5),
    "penalised": SamplingParams(presence_penalty=0.5, repetition_penalty=1.3, min_tokens=8),
}


@pytest.mark.parametrize("manner", MANNERS)
def test_tokens_are_the_same_alone_and_in_any_mix(manner: str, target: LoadedModel) -> None:
    """Batches, chunking, eviction with recompute and prefix hits leave every request's tokens as they are."""
    ids = prompts(1, 16, 17, 70, 130)
    alone = {}
    for index, prompt in enumerate(ids):
        driver = Driver(engine(target))
        driver.add(str(index), prompt, MANNERS[manner])
        alone |= driver.run()
    for seed in range(3):
        mix = Driver(engine(target), random.Random(seed))
        for index, prompt in enumerate(ids):
            mix.add(str(index), prompt, MANNERS[manner])
        assert mix.run_at_random(eviction=0.05) == alone
        again = {
            f"again {index}": mix.add(f"again {index}", prompt, MANNERS[manner]) for index, prompt in enumerate(ids)
        }
        assert list(again.values()) == [0, 0, 16, 64, 128]
        said = mix.run_at_random()
        assert {name: said[f"again {name}"] for name in alone} == alone


@pytest.mark.parametrize("drafting", ["model", "itself", "lookup"])
@pytest.mark.parametrize("manner", ["greedy", "penalised"])
def test_greedy_tokens_are_the_same_with_guesses(
    manner: str, drafting: str, target: LoadedModel, draft: LoadedModel
) -> None:
    """With a draft model, with the model as its own draft and with lookup, in any mix and after evictions."""
    ids = prompts(1, 16, 40, 130)
    ids[2] = np.tile(ids[2][:8], 5)
    plain = Driver(engine(target))
    for index, prompt in enumerate(ids):
        plain.add(str(index), prompt, MANNERS[manner])
    expected = plain.run()
    drafter = {"model": draft, "itself": target, "lookup": None}[drafting]
    for seed in range(2):
        guessing = Driver(engine(target, drafter, max_draft=4), random.Random(seed))
        for index, prompt in enumerate(ids):
            guessing.add(str(index), prompt, MANNERS[manner])
        assert guessing.run_at_random(draft=seed + 2, eviction=0.03) == expected


def test_guessing_can_stop_and_begin_again(target: LoadedModel) -> None:
    """After steps without guesses the draft model has caught up: as its own draft it is right again at once."""
    driver = Driver(engine(target, target, max_draft=3))
    driver.add("a", prompts(30)[0], SamplingParams(ignore_eos=True), limits=(40,))
    driver.step(driver.next_chunk("a", 30))
    for draft in (3, 0, 0, 0, 2, 0, 1, 3, 0, 3):
        driver.step(driver.next_chunk("a", 1, draft))
        (output,) = driver.engine.outputs
        assert (output.drafted, output.accepted) == (draft, draft)


def test_a_draft_that_is_the_model_itself_is_always_right(target: LoadedModel) -> None:
    """All guesses are accepted, greedy and sampled, also for a prefix whose draft KV was found in the cache."""
    for sampling in (SamplingParams(ignore_eos=True), SamplingParams(temperature=1.0, seed=1, ignore_eos=True)):
        driver = Driver(engine(target, target, max_draft=3))
        for name in ("first", "second"):
            driver.add(name, prompts(50)[0], sampling, limits=(21,))
            driver.step(driver.next_chunk(name, 50))
            while name not in driver.ended:
                (advance,) = driver.step(driver.next_chunk(name, 1, 3))
                (output,) = driver.engine.outputs
                assert (output.drafted, output.accepted, advance.accepted) == (3, 3, 3)
            assert len(driver.said[name]) == 21


def test_guesses_stop_at_the_end_of_a_stage(target: LoadedModel) -> None:
    """No guess is made beyond the limit, and the report says what was computed."""
    driver = Driver(engine(target, target, max_draft=4))
    driver.add("a", prompts(20)[0], SamplingParams(ignore_eos=True), limits=(3,))
    driver.step(driver.next_chunk("a", 20))
    (advance,) = driver.step(Chunk("a", 20, 5, 4))
    assert (advance.computed, advance.new_tokens, advance.accepted, advance.done) == (22, 2, 1, True)
    assert driver.engine.outputs[0].drafted == 1


def test_a_first_chunk_that_ends_inside_the_prompt_says_nothing(target: LoadedModel) -> None:
    """Only the chunk that reaches the last token yields a token."""
    driver = Driver(engine(target))
    driver.add("a", prompts(40)[0])
    (advance,) = driver.step(Chunk("a", 0, 30))
    assert (advance.computed, advance.new_tokens, driver.engine.outputs) == (30, 0, [])
    (advance,) = driver.step(Chunk("a", 30, 10))
    assert (advance.computed, advance.new_tokens) == (40, 1)


def test_a_request_ends_for_one_reason(target: LoadedModel) -> None:
    """Length, the model's end token, an end token of its own, or the caller's stop test; the token is kept."""
    (prompt,) = prompts(30)
    driver = Driver(engine(target))
    driver.add("length", prompt, SamplingParams(ignore_eos=True), limits=(12,))
    words = driver.run()["length"]
    assert len(words) == 12
    at = next(index for index in range(2, 12) if words[index] not in words[:index])
    driver.add("end id", prompt, SamplingParams(end_id=words[at]), limits=(12,))
    driver.add("stop", prompt, SamplingParams(ignore_eos=True), limits=(12,), stop=lambda token: token == words[at])
    driver.add("later", prompt, SamplingParams(end_id=words[at], min_tokens=at + 1), limits=(12,))
    said = driver.run()
    assert said["end id"] == said["stop"] == words[: at + 1]
    assert said["later"][:at] == words[:at]
    assert len(said["later"]) > at
    assert words[at] not in said["later"][: at + 1]
    assert (driver.ended["length"], driver.ended["end id"], driver.ended["stop"]) == ("length", "stop", "stop")


def test_the_models_end_token_ends_a_request(build: Callable[..., Path]) -> None:
    """The end token of the folder's settings finishes with "stop", unless it is to be ignored."""
    (prompt,) = prompts(30)
    folder = build(FAMILIES["llama"])
    driver = Driver(engine(load_model(folder, device="cpu")))
    driver.add("a", prompt, SamplingParams(ignore_eos=True))
    words = driver.run()["a"]
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": [VOCABULARY - 1, words[3]]}))
    driver = Driver(engine(load_model(folder, device="cpu")))
    driver.add("ends", prompt)
    driver.add("ignores", prompt, SamplingParams(ignore_eos=True))
    said = driver.run()
    assert said["ends"] == words[: words.index(words[3]) + 1]
    assert said["ignores"] == words


@pytest.mark.parametrize("guesses", [0, 3])
def test_thinking_ends_at_its_token_or_its_limit(guesses: int, target: LoadedModel) -> None:
    """The limit forces the end token; without one the limit alone ends the stage; the answer goes on."""
    (prompt,) = prompts(30)
    settings: dict[str, Any] = {"max_draft": guesses}
    plain = Driver(engine(target, target, **settings))
    plain.add("a", prompt, SamplingParams(ignore_eos=True), limits=(6, 5))
    assert len(plain.run(guesses)["a"]) == 11
    words = plain.said["a"]
    unused = next(token for token in range(VOCABULARY) if token not in words)
    forced = Driver(engine(target, target, think_end_id=unused, **settings))
    forced.add("a", prompt, SamplingParams(ignore_eos=True), limits=(6, 5))
    said = forced.run(guesses)["a"]
    assert (said[:6], len(said)) == ([*words[:5], unused], 11)
    at = next(index for index in range(1, 5) if words[index] not in words[:index])
    early = Driver(engine(target, target, think_end_id=words[at], **settings))
    early.add("a", prompt, SamplingParams(ignore_eos=True), limits=(6, 5))
    ends = []
    while "a" not in early.ended:
        (advance,) = early.step(early.next_chunk("a", 100, guesses))
        ends += [len(early.said["a"])] if advance.stage_ended else []
    assert ends == [at + 1]
    assert (early.said["a"][: at + 1], len(early.said["a"])) == (words[: at + 1], at + 1 + 5)


def test_two_requests_share_a_prefix_while_both_run(target: LoadedModel) -> None:
    """A prompt computed by one request is found by the next before the first has ended; counts stay exact."""
    (prompt,) = prompts(100)
    driver = Driver(engine(target))
    driver.add("first", prompt)
    driver.step(Chunk("first", 0, 100))
    assert driver.add("second", prompt) == 96
    assert driver.add("third", np.concatenate([prompt[:50], prompts(20, seed=9)[0]])) == 48
    driver.step(driver.next_chunk("first", 1))
    driver.engine.release("second")
    del driver.known["second"]
    assert driver.run()["first"]


def test_a_session_finds_what_it_said(target: LoadedModel) -> None:
    """The next round of a conversation reuses the KV of the prompt and of the answer."""
    driver = Driver(engine(target))
    driver.add("round 1", prompts(30)[0], SamplingParams(ignore_eos=True), limits=(40,))
    answer = driver.run()["round 1"]
    longer = np.concatenate([prompts(30)[0], answer, prompts(5, seed=2)[0]])
    assert driver.add("round 2", longer) == 64


@pytest.mark.parametrize("seed", range(3))
def test_memory_is_never_lost(seed: int, target: LoadedModel, draft: LoadedModel) -> None:
    """Random requests, evictions, cancellations and guesses in a small pool: in the end every block is free."""
    chance = random.Random(seed)
    driver = Driver(engine(target, draft, blocks=30, max_draft=3), chance)
    shared = prompts(60, seed=seed)[0]
    for number in range(60):
        live = [name for name in driver.known if name not in driver.ended]
        if len(live) < 6:
            prompt = np.concatenate([shared[: chance.randrange(60)], prompts(chance.randrange(1, 60), seed=number)[0]])
            driver.add(str(number), prompt, SamplingParams(temperature=chance.choice((0.0, 1.0)), seed=number))
        if live and chance.random() < 0.2:
            name = chance.choice(live)
            driver.engine.release(name)
            driver.ended[name] = "cancelled"
        try_step(driver)
    for name in driver.known:
        driver.engine.release(name)
    check_memory(driver.engine)
    assert driver.engine.step(Plan(), 0.0).free_blocks == 30


def try_step(driver: Driver) -> None:
    """A random batch that fits; evicts the last request when nothing does."""
    live = [name for name in driver.known if name not in driver.ended]
    free = driver.engine.step(Plan(), 0.0).free_blocks or 0
    chunks = []
    for name in live:
        chunk = driver.next_chunk(name, driver.chance.choice((1, 8, 40)), driver.chance.randrange(4))
        needed = -(-(chunk.start + chunk.length) // 16) - -(-chunk.start // 16)
        if needed <= free:
            free -= needed
            chunks.append(chunk)
    driver.step(*chunks, evicted=() if chunks else tuple(live[-1:]))


def test_bad_logits_fail_one_request(build: Callable[..., Path]) -> None:
    """A token whose embedding is NaN fails its own request, not its neighbours nor later users of its memory."""
    (prompt, other) = prompts(40, 50)
    prompt[prompt == 7] = 8
    other[20] = 7
    other[0] = 2
    folder = build(FAMILIES["llama"])
    sane = Driver(engine(load_model(folder, device="cpu")))
    sane.add("good", prompt)
    expected = sane.run()["good"]
    assert 7 not in expected
    loaded = load_model(folder, device="cpu")
    loaded.model.get_input_embeddings().weight.data[7] = torch.nan
    loaded.model.get_input_embeddings().weight.data[0] = torch.nan  # padding uses token 0
    driver = Driver(engine(loaded, blocks=12))
    for params in (SamplingParams(), SamplingParams(temperature=1.0)):
        driver.add("bad", other, params)
        driver.add("good", prompt)
        assert driver.run_at_random()["good"] == expected
        assert driver.ended.pop("bad") == "error"
        assert driver.said.pop("bad") == []
        assert driver.ended.pop("good") == sane.ended["good"]
        driver.known.clear()


def test_impossible_plans_change_nothing(target: LoadedModel) -> None:
    """A plan that contradicts the engine's state is refused with the numbers, before anything is run."""
    driver = Driver(engine(target, blocks=4, max_draft=2, max_batch_tokens=100, max_batch_requests=2))
    driver.add("a", prompts(30)[0])
    driver.add("b", prompts(30, seed=1)[0])
    driver.step(Chunk("a", 0, 30), Chunk("b", 0, 10))
    free = driver.engine.step(Plan(), 0.0).free_blocks
    cases = [
        (Plan((Chunk("c", 0, 1),)), "not known"),
        (Plan((), ("c",)), "not known"),
        (Plan((Chunk("a", 29, 1),)), "must start at 30"),
        (Plan((Chunk("b", 0, 5),)), "must start at 10"),
        (Plan((Chunk("a", 30, 2),)), "must compute some of the rest"),
        (Plan((Chunk("a", 30, 0),)), "must compute some of the rest"),
        (Plan((Chunk("b", 10, 5, 1),)), "guesses come after all known tokens"),
        (Plan((Chunk("a", 30, 4, 3),)), "max_draft"),
        (Plan((Chunk("b", 10, 5), Chunk("b", 15, 5))), "two chunks"),
        (Plan((Chunk("b", 10, 200),)), "200 tokens of 1 requests in a batch"),
        (Plan((Chunk("a", 0, 30),), ("a", "c")), "not known"),
    ]
    for plan, message in cases:
        with pytest.raises(RuntimeError, match=message):
            driver.engine.step(plan, 0.0)
        check_memory(driver.engine)
        assert driver.engine.step(Plan(), 0.0).free_blocks == free
    driver.add("d", prompts(40, seed=3)[0])
    with pytest.raises(RuntimeError, match="needs 3 more KV blocks, 1 of 4 are free"):
        driver.engine.step(Plan((Chunk("d", 0, 40),)), 0.0)
    driver.step(Chunk("d", 0, 40), evicted=("a",))
    assert len(driver.said["d"]) == 1


@pytest.mark.parametrize(
    ("ids", "limits", "message"),
    [
        ([], (5,), "at least one token id"),
        ([1, VOCABULARY], (5,), f"token ids must be in \\[0, {VOCABULARY}\\), got {VOCABULARY}"),
        ([1, -1], (5,), "got -1"),
        ([1.5], (5,), "token ids must be integers"),
        ([1] * 300, (30,), "330 tokens, more than the 320"),
        ([1], (), "every stage needs a limit"),
        ([1], (5, 0), "every stage needs a limit"),
    ],
)
def test_bad_requests_are_refused(ids: list[Any], limits: tuple[int, ...], message: str, target: LoadedModel) -> None:
    """Bad ids, bad limits and what is longer than the context are refused by name, and leave no trace."""
    served = engine(target)
    with pytest.raises(ValueError, match=message):
        served.add(Generation("a", ids, limits, SamplingParams()))
    served.add(Generation("a", [1], (5,), SamplingParams()))
    with pytest.raises(ValueError, match="the id is in use"):
        served.add(Generation("a", [1], (5,), SamplingParams()))


def test_sizes_that_do_not_fit_are_refused(target: LoadedModel, build: Callable[..., Path]) -> None:
    """Context, window, memory and vocabulary are checked when the engine is built."""
    with pytest.raises(ValueError, match="max_context: must be at most 320"):
        engine(target, max_context=321)
    with pytest.raises(ValueError, match="kv_cache_bytes: must be at least"):
        engine(target, blocks=0)
    window = load_model(build(MistralConfig(**GATED, sliding_window=64)), device="cpu")
    with pytest.raises(ValueError, match="sliding window"):
        engine(window)
    assert engine(window, max_context=64).capabilities.max_context == 64
    other = load_model(build(LlamaConfig(**{**GATED, "vocab_size": 80})), device="cpu")
    with pytest.raises(ModelError, match="vocabulary of 80 tokens"):
        engine(target, other, max_draft=2)


def test_a_folder_that_cannot_be_served_is_explained(build: Callable[..., Path], tmp_path: Path) -> None:
    """Each fault names the file and says what is expected."""
    good = build(FAMILIES["llama"])

    def refused(folder: Path, message: str, **options: Any) -> None:
        with pytest.raises(ModelError, match=message):
            load_model(folder, **options)

    refused(tmp_path / "none", "does not exist")
    refused(tmp_path, "has no config.json")
    refused(good, "has no tokenizer", needs_tokenizer=True)
    refused(good, "dtype: must be one of", dtype="int3")
    weights = good / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    refused(good, "model.safetensors cannot be read")
    weights.unlink()
    refused(good, "has no weights")
    weights.write_bytes(data)
    config = json.loads((good / "config.json").read_text())
    for change, message in (
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported are llama, mistral, opt, qwen2, qwen3"),
        ({"num_hidden_layers": 3}, "has no weights for 9 tensors"),
        ({"hidden_size": 64}, "cannot be loaded"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope' is not supported"),
    ):
        (good / "config.json").write_text(json.dumps({**config, **change}))
        refused(good, message)
    (good / "config.json").write_text("{")
    refused(good, "config.json is not a JSON object")


def test_requests_without_a_seed_differ(target: LoadedModel) -> None:
    """Two sampled requests without a seed say different things; with one they repeat."""
    driver = Driver(engine(target))
    params = SamplingParams(temperature=2.0, ignore_eos=True)
    for name, chosen in (("a", params), ("b", params), ("c", replace(params, seed=3)), ("d", replace(params, seed=3))):
        driver.add(name, prompts(10)[0], chosen)
    said = driver.run()
    assert said["a"] != said["b"]
    assert said["c"] == said["d"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 140), min_size=1, max_size=4),
    shared=st.integers(0, 60),
    manner=st.sampled_from(sorted(MANNERS)),
    drafting=st.sampled_from(["none", "model", "itself", "lookup"]),
    guesses=st.integers(1, 4),
    eviction=st.sampled_from([0.0, 0.1]),
    chance=st.randoms(use_true_random=False),
)
def test_nothing_but_the_request_decides_its_tokens(
    lengths: list[int], shared: int, manner: str, drafting: str, guesses: int, eviction: float, chance: random.Random,
    target: LoadedModel, draft: LoadedModel,
) -> None:  # fmt: skip
    """Any prompts with a common beginning, any chunks and batches, evictions, prefix hits and drafts: the tokens are
    those of the request served alone (a request that samples has its own random numbers only without guesses)."""
    drafting = "none" if manner == "sampled" else drafting
    drafter = {"none": None, "model": draft, "itself": target, "lookup": None}[drafting]
    ids = prompts(*(length + shared for length in lengths))
    for prompt in ids[1:]:
        prompt[:shared] = ids[0][:shared]
    alone = {}
    for index, prompt in enumerate(ids):
        single = Driver(engine(target))
        single.add(str(index), prompt, MANNERS[manner], limits=(9, 5))
        alone |= single.run()
    mix = Driver(engine(target, drafter, max_draft=0 if drafting == "none" else 4), chance)
    for index, prompt in enumerate(ids):
        mix.add(str(index), prompt, MANNERS[manner], limits=(9, 5))
    assert mix.run_at_random(draft=0 if drafting == "none" else guesses, eviction=eviction) == alone
