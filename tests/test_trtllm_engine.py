"""A replica on TensorRT-LLM: settings, loading, serving and stepping down, on the stand-in engine."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from callers import PATIENCE, Caller
from trtllm_standin import next_token

from slos_serve.backend.build import build_engine
from slos_serve.backend.config import parse_config
from slos_serve.backend.metrics import Metrics, Numbers
from slos_serve.backend.responder import Reply, Responder
from slos_serve.backend.roster import Roster
from slos_serve.backend.sessions import Sessions
from slos_serve.backend.translate import Limits, Translator
from slos_serve.backend.trtllm_engine import TrtllmBuilt
from slos_serve.client import wire

VOCABULARY = 304
SETTINGS: dict[str, Any] = {
    "engine": "tensorrt_llm", "dtype": "bfloat16", "max_context": 128, "max_batch_tokens": 64, "max_batch_requests": 8,
    "block_tokens": 8, "max_requests": 64,
}  # fmt: skip


@pytest.fixture
def version(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A version folder with a model folder in it: a tokenizer and a configuration."""
    folder = tmp_path / "1" / "target"
    shutil.copytree(tokenizer_folder, folder)
    shape = {"vocab_size": VOCABULARY, "eos_token_id": 0, "hidden_size": 4096, "num_hidden_layers": 32}
    (folder / "config.json").write_text(json.dumps(shape))
    return tmp_path / "1"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this machine had one A100."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100-SXM4-80GB")


class Replica:
    """A built replica with everything around it but Triton."""

    def __init__(self, version: Path, own: dict[str, Any], settings: dict[str, Any]) -> None:
        config = parse_config(json.dumps({**SETTINGS, **settings, "tensorrt_llm": own}))
        built = build_engine(config, version)
        assert isinstance(built, TrtllmBuilt)
        self.built = built
        self.failure: BaseException | None = None
        self.numbers: list[Numbers] = []
        self.metrics = Metrics(self.numbers.append)
        self.responder = Responder(2)
        self.sessions = Sessions(built.codec, 10_000)
        roster = Roster(64, 100_000, built.prefill_seconds)
        limits = Limits(built.max_context, built.vocab_size, 16)
        self.translator = Translator(
            built.codec, limits, config.classes, "chatbot", built.prefill_seconds, self.sessions
        )
        self.worker = built.worker(self.responder, self.metrics, roster, self.sessions, self._failed)
        self.metrics.start()
        self.responder.start(gone=self.worker.cancel)
        self.worker.start()

    def _failed(self, error: BaseException) -> None:
        self.failure = error

    def send(self, request_id: str, **fields: Any) -> Caller:
        caller = Caller()
        submission = self.translator.submission(request_id, wire.encode(fields), {}, time.monotonic())
        self.worker.submit(Reply(submission, caller))
        return caller

    def close(self, drain: float = 0.0) -> None:
        self.worker.close(drain)
        self.responder.close(PATIENCE)
        self.metrics.close()

    def counted(self, name: str) -> dict[tuple[tuple[str, str], ...], float]:
        """The sums of a counter by label, after `close`."""
        sums: dict[tuple[tuple[str, str], ...], float] = {}
        for numbers in self.numbers:
            for (family, labels), value in numbers.counters.items():
                if family == name:
                    sums[labels] = sums.get(labels, 0.0) + value
        return sums


@pytest.fixture
def replica(version: Path, gpu: None) -> Iterator[Callable[..., Replica]]:
    """Makes a running replica; all are closed at the end."""
    made: list[Replica] = []

    def make(settings: dict[str, Any] | None = None, **own: Any) -> Replica:
        made.append(Replica(version, own, settings or {}))
        return made[-1]

    yield make
    for each in made:
        each.close()


def answer(prompt: list[int], new: int) -> list[int]:
    """What the stand-in model says after a prompt."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + new:
        tokens.append(next_token(tokens, VOCABULARY))
        if tokens[-1] == 0:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@pytest.mark.parametrize("mode", ["full", "trim", "governor", "shadow"])
def test_requests_are_answered_with_a_receipt(
    replica: Callable[..., Replica], version: Path, mode: str, overlap: bool
) -> None:
    """Sixteen requests of all classes: the right tokens, once, and a receipt that says what was promised."""
    running = replica(mode=mode, overlap=overlap)
    classes = ["chatbot", "coding", "best_effort", "summarization"]
    prompts = [[5 + i] * (3 + 5 * i) for i in range(16)]
    callers = [
        running.send(f"r{i}", input_ids=prompt, max_tokens=12, slo_class=classes[i % 4], return_token_ids=True)
        for i, prompt in enumerate(prompts)
    ]
    for prompt, caller in zip(prompts, callers, strict=True):
        caller.wait()
        assert caller.refusal is None
        ids = [token for response in caller.responses for token in response.get("output_ids", [])]
        assert ids == answer(prompt, 12)
        assert caller.receipt["tokens"] == len(ids)
        assert caller.receipt["ttft_ms"] > 0
    admitted = [caller.receipt["admitted"] for caller in callers]
    assert any(admitted)
    assert not any(admitted[2::4])
    running.close()
    gauges = {
        labels: value
        for numbers in running.numbers
        for (name, labels), value in numbers.gauges.items()
        if name == "slos_serve_trtllm_mode"
    }
    assert [dict(labels)["mode"] for labels, value in gauges.items() if value] == [mode]
