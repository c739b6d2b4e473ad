"""Values that several tests build, and one real server for all tests that need one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from slos_serve.backend.launcher import Server
from slos_serve.backend.tokenizer import Tokenizer
from slos_serve.scheduler import Advance, Capabilities, PerfModel, Piece, Request, Scheduler, Slo, Stage, StepReport

END_OF_TEXT = "<|endoftext|>"
SAMPLE_TEXT = "def f(x):\n    return x + 1  # naïve café 😀😃🎉 日本語のテキスト\n" * 20


@pytest.fixture(scope="session", autouse=True)
def compiled_planner() -> None:
    """The planner's machine code is there before any test waits for an answer with a time limit."""
    scheduler = Scheduler(Capabilities(64, 16, 512, 8, 1024), PerfModel((Piece(0.01, 1e-5),)))
    scheduler.add(Request("warm-up", 0.0, 8, (Stage(2, Slo(1.0, 1.0)),)), 0.0)
    scheduler.plan(0.0)
    scheduler.report(StepReport(0.0, 0.01, (Advance("warm-up", 8, 1),)))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer whose tokens often end inside a character."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    fast.train_from_iterator([SAMPLE_TEXT], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=END_OF_TEXT).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def codec(tokenizer_folder: Path) -> Tokenizer:
    """The tokenizer of `tokenizer_folder`."""
    return Tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def tiny_repository(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with a random Llama of two layers, which answers nonsense within milliseconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    repository = tmp_path_factory.mktemp("repository")
    version = repository / "slos_llm" / "1"
    target = version / "target"
    shutil.copytree(tokenizer_folder, target)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=304, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(target)
    (version.parent / "config.pbtxt").write_text(
        'backend: "slos_serve"\ninstance_group [{ kind: KIND_MODEL count: 1 }]\n'
    )
    settings = {
        "max_context": 512,
        "kv_cache_mb": 16,
        "max_requests": 100,
        "num_threads": 1,
        "shutdown_drain_s": 5,
    }
    (version / "engine.json").write_text(json.dumps(settings))
    return repository


@pytest.fixture(scope="session")
def server(tiny_repository: Path) -> Iterator[Server]:
    """A real tritonserver with the tiny model, shared by all tests: they leave nothing running behind."""
    with Server(tiny_repository, models=["slos_llm"]) as running:
        yield running
