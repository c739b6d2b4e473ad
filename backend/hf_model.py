"""A language model from a local Hugging Face folder, and its forward pass over a paged KV cache.

Nothing is ever downloaded. Whatever is wrong with a folder is told with the name of the file and what to
do. Weights are those of transformers, and model code where the family is not known to ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from . import attention, flash
from .attention import ROWS, Attend, KvCache, Span
from .flash import FlashBatch, FlashCache, Kernel
from .graphs import DecodeGraphs
from .lean import LeanDecoder, is_lean

if TYPE_CHECKING:
    from .cpu_decoder import CpuCache, CpuDecoder

SUPPORTED: Final = ("llama", "mistral", "opt", "qwen2", "qwen3")
_ROPES: Final = ("default", "linear", "dynamic", "yarn", "llama3")
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json")


class ModelError(ValueError):
    """The folder cannot be served; the text names the file and says what to do."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A transformers causal language model in evaluation mode, and the facts the engine needs."""

    folder: Path
    model: Any
    vocab_size: int
    num_layers: int
    num_heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    sliding_window: int | None
    eos_ids: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in all layers."""
        return 2 * self.num_layers * self.kv_heads * self.head_dim * self.dtype.itemsize


class PagedModel:
    """A model with its KV cache. `forward` computes packed tokens; the caller owns the blocks."""

    cache: KvCache | FlashCache | CpuCache
    _lean: LeanDecoder | None = None
    _graphs: DecodeGraphs | None = None

    def __init__(
        self, loaded: LoadedModel, num_blocks: int, block_tokens: int, *,
        max_requests: int = 0, kernel: Kernel | None = None,
    ) -> None:  # fmt: skip
        """`kernel`: attention of one call a layer; None takes PyTorch's on a GPU whose cache it can page, our own on
        a CPU, and else gathers keys. With a kernel, decodes of up to `max_requests` requests run as CUDA graphs.
        """
        self.loaded = loaded
        if kernel is None and _takes_cpu_kernels(loaded, block_tokens):
            self._serve_from_cpu(num_blocks, block_tokens)
            return
        heads = (loaded.num_heads, loaded.kv_heads, loaded.head_dim)
        kernel = kernel or flash.choose_kernel(loaded.dtype, loaded.device, block_tokens, *heads)
        shape = (loaded.num_layers, loaded.kv_heads, loaded.head_dim, num_blocks, block_tokens)
        lean = is_lean(loaded.model)
        self._lean = LeanDecoder(loaded.model, loaded.num_heads, loaded.kv_heads, loaded.head_dim) if lean else None
        if kernel is None:
            self.cache = gathered = KvCache(*shape, loaded.dtype, loaded.device)
            self._compute = partial(self._compute_gathered, gathered)
        else:
            self.cache = paged = FlashCache(*shape, loaded.dtype, loaded.device)
            self._compute = partial(self._compute_paged, paged, kernel)
            if max_requests:
                logits = partial(self._all_logits, kernel)
                self._graphs = DecodeGraphs(
                    paged, logits, max_requests, min(num_blocks * block_tokens, loaded.max_positions)
                )
                self._graphs.capture()

    def _serve_from_cpu(self, num_blocks: int, block_tokens: int) -> None:
        """Compute by `cpu_decoder`: its layers where it knows the family, else its attention and its products."""
        from .cpu_decoder import CpuCache, CpuDecoder, fits
        from .packed import pack_linear

        loaded = self.loaded
        self.cache = cache = CpuCache(
            loaded.num_layers, loaded.kv_heads, loaded.head_dim, num_blocks, block_tokens, loaded.dtype
        )
        decoder = None
        if is_lean(loaded.model) and fits(loaded.model):
            positions = min(loaded.max_positions, num_blocks * block_tokens)
            decoder = CpuDecoder(loaded.model, loaded.num_heads, loaded.kv_heads, loaded.head_dim, positions)
        pack_linear(loaded.model)
        self._compute = partial(self._compute_on_cpu, cache, decoder)
        with torch.inference_mode():  # now, not with the first request, the kernels are compiled or found on disk
            self.forward([Span(np.zeros(1, np.int64), 0, [0])], [0])

    def _compute_on_cpu(
        self, cache: CpuCache, decoder: CpuDecoder | None, spans: Sequence[Span], rows: Sequence[int]
    ) -> torch.Tensor:
        from .cpu_decoder import attend_tensors, pack

        batch = pack(spans, cache, self.loaded.num_heads // self.loaded.kv_heads)
        if decoder is not None:
            return self.loaded.model.lm_head.rows(decoder(batch), rows)  # type: ignore[no-any-return]
        ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.positions)
        hidden = self._hidden(ids, positions, partial(attend_tensors, batch))
        if not rows:
            return hidden.new_empty(0, self.loaded.vocab_size)
        logits: torch.Tensor = self.loaded.model.lm_head(hidden[torch.tensor(rows)])
        return logits

    def forward(self, spans: Sequence[Span], rows: Sequence[int]) -> torch.Tensor:
        """Compute `spans` as one batch; the logits [len(rows), vocabulary] of the packed rows `rows`.

        Valid until the next call.
        """
        if self._graphs is not None and self._graphs.takes(spans, rows):
            return self._graphs(spans)
        return self._compute(spans, rows)

    @property
    def way(self) -> str:
        """How attention and decodes are computed, in words."""
        if isinstance(self.cache, KvCache):
            return "keys are gathered"
        if not isinstance(self.cache, FlashCache):
            return "kernels for CPUs"
        if self._graphs is None or not self._graphs.are_captured:
            return "one paged kernel call a layer"
        return "one paged kernel call a layer, decodes as CUDA graphs"

    def _compute_gathered(self, cache: KvCache, spans: Sequence[Span], rows: Sequence[int]) -> torch.Tensor:
        batch = attention.pack(spans, cache, self.loaded.num_heads // self.loaded.kv_heads)
        hidden = self._hidden(batch.input_ids[0], batch.position_ids[0], partial(attention.attend, batch))
        if not rows:
            return hidden.new_empty(0, self.loaded.vocab_size)
        picked = np.resize(rows, -(-len(rows) // ROWS) * ROWS)  # repeats rows to fill up
        logits: torch.Tensor = self.loaded.model.lm_head(hidden[torch.from_numpy(picked).to(hidden.device)])
        return logits[: len(rows)]

    def _compute_paged(
        self, cache: FlashCache, kernel: Kernel, spans: Sequence[Span], rows: Sequence[int]
    ) -> torch.Tensor:
        batch = flash.pack(spans, cache)
        hidden = self._hidden(batch.input_ids, batch.position_ids, partial(flash.attend, batch, kernel))
        picked = torch.tensor(rows, dtype=torch.int64)
        if hidden.is_cuda:
            picked = picked.pin_memory().to(hidden.device, non_blocking=True)
        logits: torch.Tensor = self.loaded.model.lm_head(hidden[picked])
        return logits

    def _all_logits(self, kernel: Kernel, batch: FlashBatch) -> torch.Tensor:
        hidden = self._hidden(batch.input_ids, batch.position_ids, partial(flash.attend, batch, kernel))
        logits: torch.Tensor = self.loaded.model.lm_head(hidden)
        return logits

    def _hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states [tokens, hidden] of packed tokens."""
        if self._lean is not None:
            return self._lean(input_ids, position_ids, attend)
        hidden: torch.Tensor = self.loaded.model.base_model(
            input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, slos_attend=attend
        ).last_hidden_state[0]
        return hidden


def load_model(
    folder: Path | str, *, dtype: torch.dtype | str = "float32", device: torch.device | str = "auto",
    needs_tokenizer: bool = False,
) -> LoadedModel:  # fmt: skip
    """The model in `folder`, with our attention. Raises ModelError when it cannot be served.

    `device` "auto" is CUDA where there is one, else the CPU. `needs_tokenizer`: a folder without a
    tokenizer is refused as well.
    """
    folder = Path(folder)
    _check_files(folder, needs_tokenizer)
    _check_config(folder)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise ModelError(f"dtype: must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        dtype = _DTYPES[dtype]
    return _facts(folder, _load(folder, dtype, torch.device(device)), dtype, torch.device(device))


def random_model(config: Any, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> LoadedModel:
    """A model of this transformers configuration with random weights, made on the device: nothing is read.

    Its `folder` is the name of the configuration's family and does not exist.
    """
    from transformers import AutoModelForCausalLM

    attention.register()
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    model = model.eval()
    _lay_out_weights(model)
    return _facts(Path(config.model_type), model, dtype, torch.device(device))


def _takes_cpu_kernels(loaded: LoadedModel, block_tokens: int) -> bool:
    """Whether `cpu_decoder` serves it: sixteen keys of a block meet a query at once."""
    return loaded.device.type == "cpu" and loaded.dtype in (torch.float32, torch.bfloat16) and block_tokens % 16 == 0


def check_draft(target: LoadedModel, draft: LoadedModel) -> None:
    """Raise ModelError when `draft` cannot propose tokens for `target`."""
    if draft.vocab_size != target.vocab_size:
        raise ModelError(
            f"draft model {draft.folder} has a vocabulary of {draft.vocab_size} tokens, the target {target.folder} "
            f"one of {target.vocab_size}: they must have the same tokenizer; choose another draft model or none"
        )


def _check_files(folder: Path, needs_tokenizer: bool) -> None:
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} does not exist: give the path of a local Hugging Face folder")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and not any(folder.glob("pytorch_model*.bin")):
        raise ModelError(f"{folder} has no weights: expected *.safetensors (or pytorch_model*.bin) beside config.json")
    if needs_tokenizer and not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelError(f"{folder} has no tokenizer: expected one of {', '.join(_TOKENIZERS)}")
    for path in weights:
        _check_safetensors(path)


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({error}): copy the file again") from error


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        family = config.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{path} is not a JSON object ({error}): copy the file again") from error
    if family not in SUPPORTED:
        raise ModelError(f"{path}: model_type {family!r} is not supported; supported are {', '.join(SUPPORTED)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPES:
        # such as "longrope", which turns all positions of a batch differently when one request in it is long
        raise ModelError(f"{path}: rope type {kind!r} is not supported; supported are {', '.join(_ROPES)}")


def _load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    attention.register()
    try:
        with no_progress_bars():
            model, report = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=dtype, attn_implementation=attention.NAME, local_files_only=True,
                output_loading_info=True,
            )  # fmt: skip
    except Exception as error:
        raise ModelError(f"{folder} cannot be loaded: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"{folder} has no weights for {len(missing)} tensors, {missing[0]} the first: copy it again")
    model = model.to(device).eval()
    _lay_out_weights(model)
    return model


def _lay_out_weights(model: Any) -> None:
    """Store each product's weights transposed, which a BLAS library reads faster when there are few rows.

    Shapes and values stay. A weight that is also the embedding stays as it is, for looking up rows.
    """
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not embedding:
            module.weight.data = module.weight.data.t().contiguous().t()


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """While it lasts, transformers draws no progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _facts(folder: Path, model: Any, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    config = model.config
    heads = config.num_attention_heads
    return LoadedModel(
        folder=folder,
        model=model,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_positions=config.max_position_embeddings,
        sliding_window=_sliding_window(config),
        eos_ids=_end_ids(model),
        dtype=dtype,
        device=device,
    )


def _sliding_window(config: Any) -> int | None:
    """The window of the layers that see only so many tokens back, None when all layers see all."""
    layers = getattr(config, "layer_types", None)
    if layers is not None and "sliding_attention" not in layers:
        return None
    return getattr(config, "sliding_window", None)


def _end_ids(model: Any) -> tuple[int, ...]:
    """The tokens that end a text: those of the generation settings, else those of the model's."""
    for config in (model.generation_config, model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()
