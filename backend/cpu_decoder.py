"""The forward pass on a CPU by kernels of our own: a paged cache, packed tokens, and the Llama family's layers.

Eight kernel calls a layer. Activations are float32, weights and cache float32 or bfloat16. A token's result is
the same bits in any batch and any chunking, since every kernel works row by row and sums in one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import numpy as np
import torch

from .attention import Ints, Span
from .crew import run
from .lanes import WIDTH
from .packed import Floats, PackedLinear
from .paged_kernel import TILE, attend, lay_out, place
from .product_kernel import add_norm, gate

_FEW: Final = 4  # rows of a tile whose scores of all heads stay in the cache
_NOTHING = np.empty(0, np.float32)
_NO_TURNS = np.empty((0, 2, 0), np.float32)


class CpuCache:
    """Keys and values of all layers, laid out as `paged_kernel` says."""

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, num_blocks: int, block_tokens: int, dtype: torch.dtype
    ) -> None:
        self.kv_heads, self.head_dim, self.block_tokens = kv_heads, head_dim, block_tokens
        size = num_blocks * kv_heads * block_tokens
        kind = np.int16 if dtype == torch.bfloat16 else np.float32
        # not np.zeros: numpy asks for large pages only here, and they are needed to read at the memory's speed
        self.keys = np.empty((layers, size * head_dim), kind)
        self.values = np.empty((layers, size * -(-head_dim // WIDTH) * WIDTH), kind)

    def clear(self, blocks: Sequence[int]) -> None:
        """What a block held before is never read."""


@dataclass(frozen=True, slots=True)
class CpuBatch:
    """Packed tokens and where each finds its keys and values; see `paged_kernel`."""

    cache: CpuCache
    input_ids: Ints  # [tokens]
    positions: Ints  # [tokens]
    slots: Ints  # [tokens]
    tiles: tuple[Ints, Ints]  # [tiles, 4] each: those of a few rows, which take all heads together, and the others
    table: Ints  # [requests, blocks]
    pairs: int  # of queries and keys, about

    def attend(
        self, layer: int, qkv: Floats, row_size: int, heads: int, scaling: float, out: Floats,
        turns: Any = _NO_TURNS, q_norm: Floats = _NOTHING, k_norm: Floats = _NOTHING, eps: float = 0.0,
    ) -> None:  # fmt: skip
        """Store keys and values of the batch, then `out` [tokens, heads * head dim], flat."""
        cache, tokens = self.cache, len(self.input_ids)
        kv = (cache.keys[layer], cache.values[layer])
        shape = (heads, cache.kv_heads, cache.head_dim, cache.block_tokens)
        run(
            place, tokens, tokens * row_size, qkv, row_size, self.positions, self.slots, turns, q_norm, k_norm,
            eps, scaling, *kv, *shape,
        )  # fmt: skip
        work = 2 * self.pairs * heads * cache.head_dim
        few, others = self.tiles
        most = cache.kv_heads if len(few) >= torch.get_num_threads() else 1
        for tiles, together in ((few, most), (others, 1)):
            units = len(tiles) * cache.kv_heads // together
            if units:
                run(attend, units, work, qkv, row_size, tiles, self.table, *kv, out, *shape, together)


def pack(spans: Sequence[Span], cache: CpuCache, heads_per_kv: int) -> CpuBatch:
    """The batch of `spans`, without padding."""
    size = cache.block_tokens
    lengths = np.array([len(span.tokens) for span in spans], np.int64)
    starts = np.array([span.start for span in spans], np.int64)
    used = -(-(starts + lengths) // size)
    blocks = chain.from_iterable(span.blocks[:count] for span, count in zip(spans, used.tolist(), strict=True))
    table = np.zeros((len(spans), int(used.max())), np.int64)
    table[np.arange(table.shape[1]) < used[:, None]] = np.fromiter(blocks, np.int64, int(used.sum()))
    positions, slots, tiles = lay_out(lengths, starts, table, size, max(1, TILE // heads_per_kv))
    ids = np.concatenate([span.tokens for span in spans])
    pairs = int((tiles[:, 3] * (tiles[:, 2] + tiles[:, 3])).sum())
    is_few = tiles[:, 3] <= _FEW
    return CpuBatch(cache, ids, positions, slots, (tiles[is_few], tiles[~is_few]), table, pairs)


def attend_tensors(
    batch: CpuBatch, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """`batch.attend` for model code in PyTorch: [tokens, heads, head dim] each to [tokens, heads * head dim]."""
    tokens, heads, head_dim = query.shape
    row_size = (heads + 2 * key.shape[1]) * head_dim
    qkv = np.zeros(tokens * row_size + WIDTH, np.float32)
    rows = torch.from_numpy(qkv[: tokens * row_size]).view(tokens, -1, head_dim)
    torch.cat((query.float(), key.float(), value.float()), dim=1, out=rows)
    out = np.empty(tokens * heads * head_dim, np.float32)
    batch.attend(layer, qkv, row_size, heads, scaling, out)
    return torch.from_numpy(out).view(tokens, -1).to(query.dtype)


@dataclass(frozen=True, slots=True)
class _Layer:
    before_attention: Floats  # weights of norms
    qkv: PackedLinear
    q_norm: Floats
    k_norm: Floats
    output: PackedLinear
    before_mlp: Floats
    gate_up: PackedLinear
    down: PackedLinear


def fits(model: Any) -> bool:
    """Whether a model of the Llama family has sizes that `CpuDecoder` computes."""
    return model.config.hidden_size % WIDTH == model.config.intermediate_size % WIDTH == 0  # type: ignore[no-any-return]


class CpuDecoder:
    """The decoder of a transformers model of the Llama family. Takes its linear layers out of it."""

    def __init__(self, model: Any, heads: int, kv_heads: int, head_dim: int, positions: int) -> None:
        decoder = model.base_model
        self._embedding = decoder.embed_tokens.weight
        self._norm = _floats(decoder.norm)
        self._eps = float(model.config.rms_norm_eps)
        self._heads, self._head_dim = heads, head_dim
        self._turns = _turns(decoder.rotary_emb, positions, head_dim)
        self._layers = [_layer(layer) for layer in decoder.layers]
        self._scratch: dict[str, Floats] = {}

    def __call__(self, batch: CpuBatch) -> Floats:
        """Hidden states [tokens, hidden] after the last norm, flat; valid until the next call."""
        tokens = len(batch.input_ids)
        hidden = self._embedding.shape[1]
        x = self._embedding[torch.from_numpy(batch.input_ids)].float().numpy().reshape(-1)
        delta, normed = self._room("delta", tokens * hidden), self._room("normed", tokens * hidden)
        delta[: tokens * hidden] = 0
        for index, layer in enumerate(self._layers):
            self._add_norm(tokens, x, delta, layer.before_attention, normed)
            qkv = self._room("qkv", tokens * layer.qkv.columns + WIDTH)
            layer.qkv.multiply(normed, tokens, qkv)
            out = self._room("attention", tokens * layer.output.inputs)
            batch.attend(
                index, qkv, layer.qkv.columns, self._heads, self._head_dim**-0.5, out, self._turns,
                layer.q_norm, layer.k_norm, self._eps,
            )  # fmt: skip
            layer.output.multiply(out, tokens, delta)
            self._add_norm(tokens, x, delta, layer.before_mlp, normed)
            gate_up = self._room("gate up", tokens * layer.gate_up.columns)
            layer.gate_up.multiply(normed, tokens, gate_up)
            size = layer.down.inputs
            opened = self._room("opened", tokens * size)
            run(gate, tokens, 8 * tokens * size, gate_up, size, layer.gate_up.columns, opened)
            layer.down.multiply(opened, tokens, delta)
        self._add_norm(tokens, x, delta, self._norm, normed)
        return normed[: tokens * hidden]

    def _add_norm(self, tokens: int, x: Floats, delta: Floats, weight: Floats, out: Floats) -> None:
        run(add_norm, tokens, 4 * tokens * len(weight), x, delta, weight, self._eps, out)

    def _room(self, name: str, size: int) -> Floats:
        """Memory of at least this size, kept for the next batch."""
        room = self._scratch.get(name, _NOTHING)
        if len(room) < size:
            room = self._scratch[name] = np.zeros(size, np.float32)
        return room


def _floats(norm: Any) -> Floats:
    return _NOTHING if norm is None else norm.weight.detach().float().numpy()


def _turns(rotary: Any, positions: int, head_dim: int) -> Floats:
    """[positions, 2, head dim / 2]: the cosines and sines that the model's own code gives."""
    x = torch.empty(1, device=rotary.inv_freq.device)
    cos, sin = rotary(x, torch.arange(positions)[None])
    half = head_dim // 2
    return torch.stack((cos[0, :, :half], sin[0, :, :half]), dim=1).contiguous().numpy()


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        before_attention=_floats(layer.input_layernorm),
        qkv=_fused(attention, "q_proj", "k_proj", "v_proj"),
        q_norm=_floats(getattr(attention, "q_norm", None)),
        k_norm=_floats(getattr(attention, "k_norm", None)),
        output=_fused(attention, "o_proj"),
        before_mlp=_floats(layer.post_attention_layernorm),
        gate_up=_fused(mlp, "gate_proj", "up_proj"),
        down=_fused(mlp, "down_proj"),
    )


def _fused(module: Any, *names: str) -> PackedLinear:
    """Some linear layers of a module as one, which takes the place of the first: their memory is given back."""
    first = getattr(module, names[0])
    if isinstance(first, PackedLinear):  # a draft model may be the model itself
        return first
    packed = PackedLinear(*(getattr(module, name) for name in names))
    setattr(module, names[0], packed)
    for name in names[1:]:
        delattr(module, name)
    return packed
