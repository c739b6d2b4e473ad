"""The engine's way on a GPU, with the kernel's reference in its place: one call a layer, static decode buffers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig, Qwen3Config

from slos_serve.backend import flash
from slos_serve.backend.attention import Span
from slos_serve.backend.flash import Columns, FlashCache
from slos_serve.backend.generation import Generation, SamplingParams
from slos_serve.backend.hf_model import LoadedModel, PagedModel, load_model
from slos_serve.backend.torch_engine import TorchEngine
from slos_serve.scheduler.core import Chunk, Plan

VOCABULARY = 96
COMMON = {
    "vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32,
    "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON, intermediate_size=48, num_key_value_heads=2),
    "qwen3": Qwen3Config(**COMMON, intermediate_size=48, num_key_value_heads=2, head_dim=16),
    "opt": OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    """A model with weights large enough that attention matters."""

    def loaded(family: str) -> LoadedModel:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family])
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        path: Path = tmp_path_factory.mktemp("model")
        model.save_pretrained(path)
        return load_model(path, device="cpu")

    return loaded


def prompts(*lengths: int) -> list[np.ndarray]:
    chance = np.random.default_rng(0)
    return [chance.integers(2, VOCABULARY, length) for length in lengths]


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_those_of_the_plain_model(family: str, load: Callable[[str], LoadedModel]) -> None:
    """In chunks, mixed batches and decodes through the static buffers, logits equal the plain forward."""
    loaded = load(family)
    paged = PagedModel(loaded, 30, 16, max_requests=4, kernel=flash.reference)
    plain = AutoModelForCausalLM.from_pretrained(loaded.folder, attn_implementation="eager").eval()
    tokens, tables = prompts(40, 70, 33), [list(range(index, 30, 3)) for index in range(3)]
    chance, done = random.Random(1), [0, 0, 0]
    with torch.inference_mode():
        wanted = [plain(torch.from_numpy(ids)[None]).logits[0] for ids in tokens]
        while left := [index for index in range(3) if done[index] < len(tokens[index])]:
            ones = chance.random() < 0.5
            spans = []
            for index in left:
                end = done[index] + (2 if ones and chance.random() < 0.1 else 1 if ones else chance.choice((1, 7, 30)))
                spans.append(Span(tokens[index][done[index] : end], done[index], tables[index]))
            got = paged.forward(spans, range(sum(len(span.tokens) for span in spans)))
            parts = got.split([len(span.tokens) for span in spans])
            for index, span, part in zip(left, spans, parts, strict=True):
                torch.testing.assert_close(part, wanted[index][span.start : span.end], atol=1e-4, rtol=0)
                done[index] = span.end


def test_padding_reads_and_writes_nothing_of_anybodys() -> None:
    """Three requests in columns for eight: the rest have one token each, in the scratch block."""
    cache = FlashCache(1, 1, 8, 10, 16, torch.float32, torch.device("cpu"))
    spans = [Span(np.array([5, 6]), start, [block, block + 1]) for start, block in ((15, 0), (3, 2), (30, 4))]
    columns = Columns.empty(16, 8, 4)
    flash.fill(spans, cache, columns)
    ids, positions, slots, starts, lengths, table = columns.split(columns.numbers)
    assert ids.tolist() == [5, 6] * 3 + [0] * 10
    assert positions.tolist() == [15, 16, 3, 4, 30, 31] + [0] * 10
    assert slots.tolist() == [15, 16, 35, 36, 94, 95] + [160] * 10
    assert starts.tolist() == list(range(0, 17, 2))
    assert lengths.tolist() == [17, 5, 32] + [2] * 5
    assert table[:3].tolist() == [[0, 1, 10, 10], [2, 10, 10, 10], [4, 5, 10, 10]]
    assert (table[3:] == 10).all()


@pytest.mark.parametrize("drafting", [False, True])
def test_tokens_are_those_of_the_kernels_for_cpus(drafting: bool, load: Callable[[str], LoadedModel]) -> None:
    """Greedy decoding of five requests, with and without guesses of a draft model, through both ways."""
    model = load("llama")

    def said(kernel: flash.Kernel | None) -> dict[str, list[int]]:
        size = model.kv_bytes_per_token * 16 * 66 * (2 if drafting else 1)
        engine = TorchEngine(
            model, model if drafting else None, kv_cache_bytes=size, max_batch_tokens=256, max_batch_requests=6,
            max_context=200, max_draft=2 if drafting else 0, kernel=kernel,
        )  # fmt: skip
        known, computed, words = {}, {}, {}
        for index, prompt in enumerate(prompts(10, 33, 64, 5, 90)):
            name = str(index)
            engine.add(Generation(name, prompt, (20,), SamplingParams(ignore_eos=True)))
            known[name], computed[name], words[name] = len(prompt), 0, []
        while known:
            draft = 2 if drafting else 0
            chunks = [Chunk(name, computed[name], known[name] - computed[name] + draft, draft) for name in known]
            for advance in engine.step(Plan(tuple(chunks)), 0.0).advances:
                name = advance.request_id
                known[name] += advance.new_tokens
                computed[name] = advance.computed
                if advance.done:
                    del known[name]
            for output in engine.outputs:
                words[output.request_id] += output.token_ids
            engine._pool.check()
        return words

    assert said(flash.reference) == said(None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_computes_what_the_reference_does() -> None:
    """PyTorch's paged kernel in bfloat16, prefill and decode, against float32 request by request."""
    device = torch.device("cuda")
    kernel = flash.choose_kernel(torch.bfloat16, device, flash.PAGE_TOKENS, 8, 2, 64)
    assert kernel is not None
    cache = FlashCache(1, 2, 64, 8, flash.PAGE_TOKENS, torch.bfloat16, device)
    cache.keys.normal_()
    cache.values.normal_()
    for lengths, starts in (((1, 1, 1), (500, 3, 255)), ((300, 1, 40), (100, 511, 0))):
        spans = [
            Span(np.zeros(length, np.int64), start, [2 * index, 2 * index + 1])
            for index, (length, start) in enumerate(zip(lengths, starts, strict=True))
        ]
        batch = flash.pack(spans, cache)
        query = torch.randn(len(batch.input_ids), 8, 64, dtype=torch.bfloat16, device=device)
        got, wanted = (each(query, batch, 0, 0.125) for each in (kernel, flash.reference))
        torch.testing.assert_close(got.float(), wanted.float(), atol=0.03, rtol=0.03)


def test_running_sums_of_keys_are_right() -> None:
    """What one form of the kernel wants besides the lengths."""
    cache = FlashCache(1, 1, 8, 10, 16, torch.float32, torch.device("cpu"))
    batch = flash.pack([Span(np.array([5]), 15, [0]), Span(np.array([5, 6]), 3, [1])], cache)
    assert batch.lengths.tolist() == [16, 5]
    assert batch.key_starts.tolist() == [0, 16, 21]
    assert batch.key_starts.dtype == torch.int32
    assert flash.choose_kernel(torch.bfloat16, torch.device("cpu"), 256, 8, 2, 64) is None
