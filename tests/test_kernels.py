"""The kernels for CPUs compute what PyTorch computes, in one order whatever surrounds a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from slos_serve.backend import lanes
from slos_serve.backend.attention import Span
from slos_serve.backend.cpu_decoder import CpuCache, attend_tensors, pack
from slos_serve.backend.packed import PackedLinear


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """PyTorch with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@lanes.compiled
def exponentials(numbers: Any, out: Any) -> None:
    for at in range(0, len(numbers), 16):
        lanes.store(out, at, lanes.exponential(lanes.load(numbers, at)))


@lanes.compiled
def halves(numbers: Any, out: Any) -> None:
    for at in range(0, len(numbers), 16):
        lanes.store(out, at, lanes.load(numbers, at))


def test_the_exponential_is_right_within_two_units_in_the_last_place() -> None:
    """Between its limits; beyond them it stays there, and what is not a number stays none."""
    numbers = np.linspace(-80, 80, 1 << 16, dtype=np.float32)
    out = np.empty_like(numbers)
    exponentials(numbers, out)
    exact = np.exp(numbers.astype(np.float64))
    assert (np.abs(out - exact) / np.spacing(exact.astype(np.float32))).max() < 2
    edges = np.array([-np.inf, -500, 500, np.inf, np.nan] + [0] * 11, np.float32)
    exponentials(edges, edges)
    assert edges[:2] == pytest.approx(np.exp(-80.0), rel=1e-6)
    assert edges[2:4] == pytest.approx(np.exp(80.0), rel=1e-6)
    assert np.isnan(edges[4])
    assert edges[5] == 1


def test_halves_round_as_bfloat16_does() -> None:
    """Stored as halves and read again, numbers are PyTorch's, ties and what is not a number too."""
    torch.manual_seed(0)
    numbers = torch.randn(1024)
    numbers[:8] = torch.tensor([0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, torch.inf, -torch.inf, torch.nan, 3e38])
    kept, again = np.empty(1024, np.int16), np.empty(1024, np.float32)
    halves(numbers.numpy(), kept)
    halves(kept, again)
    torch.testing.assert_close(torch.from_numpy(again), numbers.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(5, 3, True), (600, 400, False), (257, 33, True)])
def test_a_packed_layer_is_the_layer(inputs: int, outputs: int, bias: bool, dtype: torch.dtype, threads: int) -> None:
    """Any sizes, any number of rows; a row has the same bits alone and among others."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    packed = PackedLinear(layer)
    x = torch.randn(70, inputs)
    out = packed(x)
    torch.testing.assert_close(out, layer.float()(x))
    for first, last in ((0, 1), (1, 3), (3, 9), (9, 70)):
        assert torch.equal(packed(x[first:last]), out[first:last])


def test_layers_of_one_input_are_one() -> None:
    """Outputs of the parts stand side by side."""
    parts = [torch.nn.Linear(20, outputs) for outputs in (7, 16, 1)]
    x = torch.randn(4, 20)
    torch.testing.assert_close(PackedLinear(*parts)(x), torch.cat([part(x) for part in parts], dim=1))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 4), (6, 3, 32), (8, 1, 24), (7, 7, 80), (12, 2, 64)]
)
def test_attention_is_softmax_over_the_keys_before(heads: int, kv_heads: int, head_dim: int, threads: int) -> None:
    """A prompt in two chunks and a decode beside it, over blocks of 32 tokens in any order."""
    chance = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(90, count, head_dim, generator=chance) for count in (heads, kv_heads, kv_heads))
    cache = CpuCache(1, kv_heads, head_dim, 6, 32, torch.float32)
    cache.keys[:], cache.values[:] = np.nan, np.nan  # whatever nobody has written
    out = torch.empty(90, heads * head_dim)
    for start, end in ((0, 37), (37, 89), (89, 90)):
        other = Span(np.zeros(1, np.int64), 0, [5])
        batch = pack([Span(np.zeros(end - start, np.int64), start, [3, 0, 2]), other], cache, heads // kv_heads)
        rows = [*range(start, end), 0]
        out[start:end] = attend_tensors(batch, 0, query[rows], key[rows], value[rows], 0.3)[:-1]
    mask = torch.ones(90, 90, dtype=torch.bool).tril()
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(each.transpose(0, 1)[None] for each in (query, key, value)), attn_mask=mask, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(out, wanted[0].transpose(0, 1).flatten(1))
