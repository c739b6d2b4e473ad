"""Decode batches as CUDA graphs: one replay instead of hundreds of kernel launches.

A graph is captured for each padded number of requests (powers of two) and number of tokens each has: for
single tokens at the start, for guesses when they are first wanted. Its inputs are one buffer, filled by one copy from
pinned memory. Where nothing can be captured (another device, or a model that synchronises) the same
static buffers are computed eagerly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .attention import Span
from .flash import Columns, FlashBatch, FlashCache, batch_of, fill

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Captured:
    """One graph: the numbers go into `staged`, then to `flat`; `run` computes `logits` from there."""

    columns: Columns
    staged: torch.Tensor
    flat: torch.Tensor
    run: Callable[[], torch.Tensor]


class DecodeGraphs:
    """Runs batches whose requests all have the same small number of tokens."""

    def __init__(
        self, cache: FlashCache, compute: Callable[[FlashBatch], torch.Tensor], max_requests: int, max_context: int
    ) -> None:
        """`compute` gives the logits [tokens, vocabulary] of a batch."""
        self._cache = cache
        self._compute = compute
        self._most = max_requests
        self._context = max_context
        self._width = -(-max_context // cache.block_tokens)
        self._graphs: dict[tuple[int, int], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle() if cache.keys.is_cuda else None
        self._captures = cache.keys.is_cuda

    @property
    def are_captured(self) -> bool:
        """Whether these are CUDA graphs, not the same buffers computed eagerly."""
        return self._captures

    def takes(self, spans: Sequence[Span], rows: Sequence[int]) -> bool:
        """Whether this batch is one: equal short spans, all their logits asked for in order."""
        length = len(spans[0].tokens)
        return (
            length <= 16
            and len(spans) <= self._most
            and all(len(span.tokens) == length for span in spans)
            and max(span.end for span in spans) <= self._context
            and len(rows) == length * len(spans)
        )

    def capture(self) -> None:
        """Capture the graphs of all numbers of requests with one token each, where graphs can be captured."""
        requests = 1
        while self._captures and requests < 2 * self._most:
            with torch.inference_mode():
                self._graphs[requests, 1] = self._make(requests, 1)
            requests *= 2

    def __call__(self, spans: Sequence[Span]) -> torch.Tensor:
        """The logits [tokens, vocabulary], valid until the next call."""
        length = len(spans[0].tokens)
        requests = 1 << (len(spans) - 1).bit_length()
        graph = self._graphs.get((requests, length))
        if graph is None:
            graph = self._graphs[requests, length] = self._make(requests, length)
        fill(spans, self._cache, graph.columns)
        graph.flat.copy_(graph.staged, non_blocking=True)
        return graph.run()[: length * len(spans)]

    def _make(self, requests: int, length: int) -> _Captured:
        sized = Columns.empty(requests * length, requests, self._width)
        staged = torch.zeros(len(sized.numbers), dtype=torch.int64, pin_memory=self._cache.keys.is_cuda)
        columns = Columns.empty(requests * length, requests, self._width, out=staged.numpy())
        dummy = [Span(np.zeros(length, np.int64), 0, [self._cache.scratch])] * requests
        fill(dummy, self._cache, columns)
        flat = staged.to(self._cache.keys.device)

        def compute() -> torch.Tensor:
            return self._compute(batch_of(flat, columns, self._cache, length, self._context))

        run: Callable[[], torch.Tensor] = compute
        if self._captures:
            try:
                run = _captured(compute, self._pool)
            except RuntimeError as error:
                self._captures = False
                log.warning("decode batches run without CUDA graphs: %s", str(error).splitlines()[0])
        return _Captured(columns, staged, flat, run)


def _captured(compute: Callable[[], torch.Tensor], pool: Any) -> Callable[[], torch.Tensor]:
    """`compute` as a graph, after one run that sets everything up (PyTorch's recipe for whole-network capture)."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        logits = compute()

    def run() -> torch.Tensor:
        graph.replay()
        return logits

    return run
