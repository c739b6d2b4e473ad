"""The forward pass of the Llama family with as few tensor operations as it needs.

transformers' own code spends about a millisecond a layer in Python and in small operations, whatever the
batch; here a layer is about twenty operations: the products that read the same input are one product, and
norms, rotation and residual sums are fused where PyTorch offers it. The weights are those of the
transformers model, laid out anew in place; its rotary embedding is asked once a batch.

No host synchronisation and no shape that depends on values, so that a CUDA graph can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn import functional

from .attention import Attend

FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class _Product:
    """x @ weight + bias; `weight` [in, out] is contiguous, which BLAS reads faster when there are few rows."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def added_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual + x @ weight + bias"""
        out = torch.addmm(residual, x, self.weight)
        return out if self.bias is None else out.add_(self.bias)


@dataclass(frozen=True, slots=True)
class _Layer:
    before_attention: torch.Tensor  # weights of norms
    qkv: _Product
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: _Product
    before_mlp: torch.Tensor
    gate_up: _Product
    down: _Product


def is_lean(model: Any) -> bool:
    """Whether `LeanDecoder` computes this transformers model."""
    return model.config.model_type in FAMILIES and getattr(model.config, "hidden_act", "silu") == "silu"


class LeanDecoder:
    """The decoder of a transformers model of `FAMILIES`; takes over its weights' memory, so both stay usable."""

    def __init__(self, model: Any, heads: int, kv_heads: int, head_dim: int) -> None:
        decoder = model.base_model
        self._embedding = decoder.embed_tokens.weight
        self._rotary = decoder.rotary_emb
        self._norm = decoder.norm.weight
        self._eps = float(model.config.rms_norm_eps)
        self._heads, self._kv_heads, self._head_dim = heads, kv_heads, head_dim
        self._scaling = head_dim**-0.5
        self._layers = [_layer(layer) for layer in decoder.layers]

    def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states [tokens, hidden] after the last norm; ids and positions are [tokens]."""
        x = functional.embedding(input_ids, self._embedding)
        cos, sin = self._rotary(x[None], position_ids[None])
        half = self._head_dim // 2
        cos = cos[0, :, None]
        # rolled by half, the first half of a head meets minus the sine: the same as rotating by halves
        sin = torch.cat((-sin[0, :, None, :half], sin[0, :, None, half:]), dim=-1)
        for index, layer in enumerate(self._layers):
            x = self._attention(index, layer, x, cos, sin, attend)
            gate, up = layer.gate_up(self._normed(x, layer.before_mlp)).chunk(2, dim=-1)
            x = layer.down.added_to(x, functional.silu(gate).mul_(up))
        return self._normed(x, self._norm)

    def _attention(
        self, index: int, layer: _Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        heads = layer.qkv(self._normed(x, layer.before_attention)).view(len(x), -1, self._head_dim)
        turned, value = heads[:, : -self._kv_heads], heads[:, -self._kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            query, key = torch.split(turned, [self._heads, self._kv_heads], dim=1)
            turned = torch.cat((self._normed(query, layer.q_norm), self._normed(key, layer.k_norm)), dim=1)
        turned = torch.addcmul(turned * cos, turned.roll(self._head_dim // 2, dims=-1), sin)
        out = attend(index, turned[:, : self._heads], turned[:, self._heads :], value, self._scaling)
        return layer.output.added_to(x, out)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, self._eps)


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    q_norm, k_norm = (None if norm is None else norm.weight for norm in norms)
    return _Layer(
        before_attention=layer.input_layernorm.weight,
        qkv=_fused(attention.q_proj, attention.k_proj, attention.v_proj),
        q_norm=q_norm,
        k_norm=k_norm,
        output=_fused(attention.o_proj),
        before_mlp=layer.post_attention_layernorm.weight,
        gate_up=_fused(mlp.gate_proj, mlp.up_proj),
        down=_fused(mlp.down_proj),
    )


def _fused(*products: torch.nn.Linear) -> _Product:
    """Several products of the same input as one; each keeps a view of its part of the weights."""
    weight = torch.cat([product.weight.data.t() for product in products], dim=1).contiguous()
    parts = torch.split(weight, [product.out_features for product in products], dim=1)
    for product, part in zip(products, parts, strict=True):
        product.weight.data = part.t()
    if products[0].bias is None:
        return _Product(weight, None)
    return _Product(weight, torch.cat([product.bias.data for product in products]))
