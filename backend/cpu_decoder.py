"""The forward pass on a CPU by kernels of our own: a paged cache, packed tokens, and the Llama family's layers.

One call for a batch, or nine a layer where threads share the work. Activations are float32, weights and cache
float32 or bfloat16. A token's result is the same bits in any batch and any chunking, since every kernel works row by
row and sums in one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from .attention import Ints, Span
from .crew import is_alone, run
from .decoder_kernel import decode, embed
from .lanes import WIDTH
from .packed import Floats, PackedLinear, kind_of, numbers_of
from .paged_kernel import TILE, attend, lay_out, place
from .product_kernel import add_norm, gate

_FEW: Final = 4  # rows of a tile whose scores of all heads stay in the cache
_NOTHING = np.empty(0, np.float32)
_NO_TURNS = np.empty((0, 2, 0), np.float32)
_PRODUCTS: Final = (  # of a layer, in the order in which they are used
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)


class CpuCache:
    """Keys and values of all layers, laid out as `paged_kernel` says."""

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, num_blocks: int, block_tokens: int, dtype: torch.dtype
    ) -> None:
        self.kv_heads, self.head_dim, self.block_tokens = kv_heads, head_dim, block_tokens
        size = num_blocks * kv_heads * block_tokens
        kind = kind_of(dtype)
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

    @property
    def heads_together(self) -> int:
        """KV heads that a tile of a few rows takes together."""
        return self.cache.kv_heads if len(self.tiles[0]) >= torch.get_num_threads() else 1

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
        for tiles, together in ((few, self.heads_together), (others, 1)):
            units = len(tiles) * cache.kv_heads // together
            if units:
                run(attend, units, work, qkv, row_size, tiles, self.table, *kv, out, *shape, together)


def pack(spans: Sequence[Span], cache: CpuCache, heads_per_kv: int) -> CpuBatch:
    """The batch of `spans`, without padding."""
    size = cache.block_tokens
    lengths, starts = [len(span.tokens) for span in spans], [span.start for span in spans]
    used = [-(-(start + length) // size) for start, length in zip(starts, lengths, strict=True)]
    blocks = chain.from_iterable(span.blocks[:count] for span, count in zip(spans, used, strict=True))
    flat = np.fromiter(blocks, np.int64, sum(used))
    height = max(1, TILE // heads_per_kv)
    positions, slots, few, others, table, pairs = lay_out(np.array([lengths, starts]), flat, size, height, _FEW)
    ids = np.concatenate([span.tokens for span in spans])
    return CpuBatch(cache, ids, positions, slots, (few, others), table, pairs)


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


def fits(model: Any) -> bool:
    """Whether a model of the Llama family has sizes that `CpuDecoder` computes."""
    return model.config.hidden_size % WIDTH == model.config.intermediate_size % WIDTH == 0  # type: ignore[no-any-return]


class CpuDecoder:
    """The decoder of a transformers model of the Llama family. Takes its linear layers out of it."""

    def __init__(self, model: Any, heads: int, kv_heads: int, head_dim: int, positions: int) -> None:
        decoder = model.base_model
        embedding = decoder.embed_tokens.weight.detach()
        if embedding.dtype == torch.bfloat16:
            embedding = embedding.view(torch.int16)
        self._embedding = embedding.numpy().reshape(-1)
        self._norm = _floats(decoder.norm)
        self._eps = float(model.config.rms_norm_eps)
        self._heads, self._kv_heads, self._head_dim = heads, kv_heads, head_dim
        self._turns = _turns(decoder.rotary_emb, positions, head_dim)
        if not hasattr(decoder, "slos_layers"):  # a draft model may be the model itself
            decoder.slos_layers = _layers(decoder.layers)
        self._layers: _Layers = decoder.slos_layers
        self._scratch: dict[str, Floats] = {}

    def __call__(self, batch: CpuBatch) -> Floats:
        """Hidden states [tokens, hidden] after the last norm, flat; valid until the next call."""
        qkv, output, gate_up, down = self._layers.products[0]
        tokens = len(batch.input_ids)
        names = ("x", "delta", "normed", "qkv", "attended", "gate up", "opened")
        widths = (down.columns, down.columns, down.columns, qkv.columns, output.inputs, gate_up.columns, down.inputs)
        rooms = [self._room(name, tokens * width + WIDTH) for name, width in zip(names, widths, strict=True)]
        widest = max(tokens * gate_up.inputs * gate_up.columns, 2 * batch.pairs * output.inputs)
        (self._at_once if is_alone(widest) else self._by_layers)(batch, *rooms)
        return rooms[2][: tokens * down.columns]

    def _at_once(
        self, batch: CpuBatch, x: Floats, delta: Floats, normed: Floats, qkv: Floats, attended: Floats,
        gate_up: Floats, opened: Floats,
    ) -> None:  # fmt: skip
        layers, cache = self._layers, batch.cache
        columns, size = layers.products[0][0].columns, layers.products[0][3].inputs
        decode(
            batch.input_ids, batch.positions, batch.slots, *batch.tiles, batch.table, batch.heads_together,
            self._embedding, layers.weights, layers.biases, layers.biased, layers.attention_norms, layers.mlp_norms,
            self._norm, layers.q_norms, layers.k_norms, self._turns, cache.keys, cache.values,
            x, delta, normed, qkv, attended, gate_up, opened,
            self._heads, self._kv_heads, self._head_dim, cache.block_tokens, columns, size,
            self._eps, self._head_dim**-0.5,
        )  # fmt: skip

    def _by_layers(
        self, batch: CpuBatch, x: Floats, delta: Floats, normed: Floats, qkv: Floats, attended: Floats,
        gate_up: Floats, opened: Floats,
    ) -> None:  # fmt: skip
        """What `decode` does, each step of a layer on as many threads as it is worth."""
        layers, tokens, hidden = self._layers, len(batch.input_ids), len(self._norm)
        run(embed, tokens, tokens * hidden, batch.input_ids, self._embedding, hidden, x, delta)
        for index, (to_qkv, output, to_gate_up, down) in enumerate(layers.products):
            self._add_norm(tokens, x, delta, layers.attention_norms[index], normed)
            to_qkv.multiply(normed, tokens, qkv)
            batch.attend(
                index, qkv, to_qkv.columns, self._heads, self._head_dim**-0.5, attended, self._turns,
                layers.q_norms[index], layers.k_norms[index], self._eps,
            )  # fmt: skip
            output.multiply(attended, tokens, delta)
            self._add_norm(tokens, x, delta, layers.mlp_norms[index], normed)
            to_gate_up.multiply(normed, tokens, gate_up)
            size = down.inputs
            run(gate, tokens, 8 * tokens * size, gate_up, size, to_gate_up.columns, opened)
            down.multiply(opened, tokens, delta)
        self._add_norm(tokens, x, delta, self._norm, normed)

    def _add_norm(self, tokens: int, x: Floats, delta: Floats, weight: Floats, out: Floats) -> None:
        run(add_norm, tokens, 4 * tokens * len(weight), x, delta, weight, self._eps, out)

    def _room(self, name: str, size: int) -> Floats:
        """Memory of at least this size, kept for the next batch."""
        room = self._scratch.get(name, _NOTHING)
        if len(room) < size:
            room = self._scratch[name] = np.zeros(size, np.float32)
        return room


@dataclass(frozen=True, slots=True)
class _Layers:
    """Weights of all layers as `decoder_kernel` reads them, and `products`, which are parts of the same memory."""

    products: Sequence[Sequence[PackedLinear]]  # query, key and value; output; gate and up; down
    weights: npt.NDArray[Any]
    biases: Floats
    biased: npt.NDArray[np.bool_]
    attention_norms: Floats  # [layers, hidden]
    mlp_norms: Floats
    q_norms: Floats  # [layers, head dim], or of no width
    k_norms: Floats


def _floats(norm: Any) -> Floats:
    return _NOTHING if norm is None else norm.weight.detach().float().numpy()


def _turns(rotary: Any, positions: int, head_dim: int) -> Floats:
    """[positions, 2, head dim / 2]: the cosines and sines that the model's own code gives."""
    x = torch.empty(1, device=rotary.inv_freq.device)
    cos, sin = rotary(x, torch.arange(positions)[None])
    half = head_dim // 2
    return torch.stack((cos[0, :, :half], sin[0, :, :half]), dim=1).contiguous().numpy()


def _layers(layers: Sequence[Any]) -> _Layers:
    """Fuses the linear layers that read the same input, and lays all out in one piece, layer after layer."""
    places = [(getattr(layer, name), names) for layer in layers for name, names in _PRODUCTS]
    sizes = [numbers_of([getattr(module, name) for name in names]) for module, names in places]
    weights = np.empty(sum(sizes), kind_of(layers[0].mlp.down_proj.weight.dtype))
    ends = np.cumsum(sizes).tolist()
    fused = [
        _fused(module, names, weights[end - size : end])
        for (module, names), size, end in zip(places, sizes, ends, strict=True)
    ]
    count = len(_PRODUCTS)
    products = [fused[at : at + count] for at in range(0, len(fused), count)]
    biased = np.array([product.bias is not None for product in products[0]])
    biases = [
        [np.zeros(each.columns, np.float32) if each.bias is None else each.bias for each in row] for row in products
    ]
    attentions = [layer.self_attn for layer in layers]
    return _Layers(
        products, weights, np.array([np.concatenate(row) for row in biases]), biased,
        np.array([_floats(layer.input_layernorm) for layer in layers]),
        np.array([_floats(layer.post_attention_layernorm) for layer in layers]),
        np.array([_floats(getattr(attention, "q_norm", None)) for attention in attentions]),
        np.array([_floats(getattr(attention, "k_norm", None)) for attention in attentions]),
    )  # fmt: skip


def _fused(module: Any, names: Sequence[str], room: npt.NDArray[Any]) -> PackedLinear:
    """Some linear layers of a module as one, which takes the place of the first: their memory is given back."""
    packed = PackedLinear(*(getattr(module, name) for name in names), room=room)
    setattr(module, names[0], packed)
    for name in names[1:]:
        delattr(module, name)
    return packed
