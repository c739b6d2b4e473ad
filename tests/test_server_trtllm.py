"""The real tritonserver with the engine tensorrt_llm, on the stand-in package in the place of TensorRT-LLM."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from trtllm_standin import next_token

from slos_serve.backend.launcher import Server
from slos_serve.client.client import SlosClient
from slos_serve.client.stream import Result

STANDIN = Path(__file__).parent / "standin"
VOCABULARY = 304


@pytest.fixture(scope="module")
def repository(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose engine is TensorRT-LLM."""
    repository = tmp_path_factory.mktemp("trtllm")
    version = repository / "slos_llm" / "1"
    shutil.copytree(tokenizer_folder, version / "target")
    shape = {"vocab_size": VOCABULARY, "eos_token_id": 0, "hidden_size": 4096, "num_hidden_layers": 32}
    (version / "target" / "config.json").write_text(json.dumps(shape))
    (version.parent / "config.pbtxt").write_text(
        'backend: "slos_serve"\ninstance_group [{ kind: KIND_MODEL count: 1 }]\n'
    )
    settings = {
        "engine": "tensorrt_llm", "dtype": "bfloat16", "max_context": 256, "max_batch_tokens": 64,
        "max_batch_requests": 8, "tensorrt_llm": {"overlap": True},
    }  # fmt: skip
    (version / "engine.json").write_text(json.dumps(settings))
    return repository


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This environment's Python with the stand-in on its path: the embedded stub does not look at PYTHONPATH."""
    folder = tmp_path_factory.mktemp("environment")
    packages = folder / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages"
    packages.mkdir(parents=True)
    (folder / "bin").mkdir()
    python = folder / "bin" / "python3"  # the name that an embedded Python looks for
    python.symlink_to(Path(sys.executable).resolve())
    (folder / "pyvenv.cfg").write_text(f"home = {Path(sys.base_prefix) / 'bin'}\n")
    folders = [path for path in sys.path if path.endswith("site-packages")]
    lines = [f"import site; site.addsitedir({path!r})" for path in folders]
    (packages / "standin.pth").write_text("\n".join([*lines, str(STANDIN)]) + "\n")
    return python


@pytest.fixture(scope="module")
def trtllm_server(repository: Path, interpreter: Path) -> Iterator[Server]:
    """A server whose Python finds the stand-in under the name tensorrt_llm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(interpreter))
        patch.setenv("STANDIN_GPU", "1")
        with Server(repository, models=["slos_llm"]) as running:
            yield running


def test_streams_answer_through_the_whole_server(trtllm_server: Server) -> None:
    """Twelve streams at once: the right tokens, and receipts with promises."""

    async def run() -> list[Result]:
        async with SlosClient(trtllm_server.grpc) as client:
            easy = {"slo_ttft_ms": 60_000.0, "slo_tpot_ms": 5_000.0}
            streams = [client.generate([5 + i] * (4 + 3 * i), max_tokens=24, **easy) for i in range(12)]
            return await asyncio.gather(*(stream.drain() for stream in streams))

    for i, result in enumerate(asyncio.run(run())):
        tokens = [5 + i] * (4 + 3 * i)
        start = len(tokens)
        while len(tokens) < start + 24 and (len(tokens) == start or tokens[-1] != 0):
            tokens.append(next_token(tokens, VOCABULARY))
        assert list(result.token_ids) == tokens[start:]
        assert result.receipt["admitted"] is True


def test_the_mode_and_the_planner_s_events_are_metrics(trtllm_server: Server) -> None:
    """A dashboard sees who decides."""
    with urllib.request.urlopen(f"http://{trtllm_server.metrics}/metrics", timeout=10) as page:
        text = page.read().decode()
    assert 'slos_serve_trtllm_mode{mode="full",model="slos_llm",version="1"} 1' in text
    assert 'slos_serve_trtllm_mode{mode="governor",model="slos_llm",version="1"} 0' in text
    assert "slos_serve_iterations_total" in text
