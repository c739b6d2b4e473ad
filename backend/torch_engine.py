"""The engine on PyTorch: runs the batches a plan names, over a paged KV cache, and remembers the tokens.

It decides nothing: not what runs, not when. A request's tokens depend on its prompt, its parameters and its
seed, never on the batches it ran in, on chunking, on eviction or on a prefix hit. Greedy tokens do not
depend on speculation either. One thread only; never touches text.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from slos_serve.scheduler.core import Advance, Capabilities, Chunk, Plan, StepReport

from .attention import Span
from .flash import Kernel
from .generation import Generation, Output
from .hf_model import LoadedModel, PagedModel, check_draft
from .kv_pool import KvPool
from .sampling import Row
from .sequence import Gain, Sequence, as_ids
from .speculation import NO_GUESS, Ask, Drafter, Guess, ModelDrafter, NgramDrafter, verify

_NO_GAIN = Gain(())


@dataclass(slots=True, eq=False)
class _Work:
    """One chunk being run: `length` known tokens from `start`, then at most `draft` guesses."""

    sequence: Sequence
    start: int
    length: int
    draft: int
    guess: Guess = NO_GUESS

    @property
    def end(self) -> int:
        return self.start + self.length + self.draft

    @property
    def samples(self) -> bool:
        return self.start + self.length == self.sequence.known


class TorchEngine:
    """One replica of a model, and of a draft model where there is one."""

    def __init__(
        self,
        model: LoadedModel,
        draft: LoadedModel | None,
        *,
        kv_cache_bytes: int,
        block_tokens: int = 16,
        max_batch_tokens: int,
        max_batch_requests: int,
        max_context: int,
        max_draft: int = 0,
        think_end_id: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        kernel: Kernel | None = None,
    ) -> None:
        """`max_draft` > 0 without a draft model: guesses are looked up in the request's own tokens.

        `think_end_id` is the token that ends the thinking stage. `kernel`: see `PagedModel`. Raises ValueError
        for sizes that do not fit.
        """
        draft = draft if max_draft else None
        for loaded in (model, draft):
            _check_context(loaded, max_context)
        if draft is not None:
            check_draft(model, draft)
        num_blocks = _num_blocks(model, draft, kv_cache_bytes, block_tokens)
        self._capabilities = Capabilities(
            num_blocks, block_tokens, max_batch_tokens, max_batch_requests, max_context, max_draft=max_draft
        )
        self._pool = KvPool(num_blocks, block_tokens)
        paged = partial(PagedModel, num_blocks=num_blocks, block_tokens=block_tokens, max_requests=max_batch_requests)
        self._model = paged(model, kernel=kernel)
        self._drafter = _drafter(None if draft is None else paged(draft, kernel=kernel), num_blocks, max_draft)
        self._think_end_id = think_end_id
        self._clock = clock
        self._sequences: dict[str, Sequence] = {}
        self.outputs: list[Output] = []

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def add(self, generation: Generation) -> int:
        """Take a request; how many leading tokens of its prompt have KV already, now pinned for it.

        At least one token is left to compute. Raises ValueError for bad ids or limits, for what is longer
        than the context or the cache, and for an id in use.
        """
        sequence = self._sequence(generation)
        whole_blocks = (sequence.prompt_tokens - 1) // self._pool.block_tokens
        prompt = sequence.tokens[: sequence.prompt_tokens]
        sequence.keys = self._pool.chain(prompt)
        sequence.blocks = self._pool.match(sequence.keys[:whole_blocks])
        sequence.remembered = len(sequence.blocks)
        sequence.computed = len(sequence.blocks) * self._pool.block_tokens
        if self._drafter is not None:
            self._drafter.adopt(sequence)
        self._sequences[sequence.request_id] = sequence
        return sequence.computed

    def release(self, request_id: str) -> None:
        """Forget a request and free its blocks; their contents stay known as a prefix. Unknown ids are ignored."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._drop(sequence)

    def step(self, plan: Plan, now: float) -> StepReport:
        """Drop the KV of `plan.evicted`, run `plan.chunks` as one batch, sample where they reach the last token.

        Raises RuntimeError with the numbers, changing nothing, for a plan that cannot be run: that is a
        fault of the planner. `now` is not used; the times reported are of the engine's clock.
        """
        started_at = self._clock()
        works = self._works(tuple(plan.chunks), plan.evicted)
        for request_id in plan.evicted:
            self._drop(self._sequences[request_id])
        self._allocate(works)
        self.outputs = []
        advances: tuple[Advance, ...] = ()
        if works:
            with torch.inference_mode():
                self._propose(works)
                gained = self._compute(works)
            advances = tuple(self._finish(work, tokens) for work, tokens in zip(works, gained, strict=True))
        return StepReport(started_at, self._clock(), advances, self._pool.free_blocks, self._pool.shared_blocks)

    def _sequence(self, generation: Generation) -> Sequence:
        request_id, limits, sampling = generation.request_id, generation.stage_limits, generation.sampling
        if request_id in self._sequences:
            raise ValueError(f"request {request_id}: the id is in use")
        if not limits or min(limits) < 1:
            raise ValueError(f"request {request_id}: every stage needs a limit of at least 1, got {limits}")
        vocab_size = self._model.loaded.vocab_size
        prompt = as_ids(request_id, generation.token_ids, vocab_size)
        total, room = len(prompt) + sum(limits), self._room
        if total > room:
            raise ValueError(
                f"request {request_id}: a prompt of {len(prompt)} and at most {sum(limits)} new tokens "
                f"are {total} tokens, more than the {room} that the engine has room for"
            )
        if sampling.end_id is not None and sampling.end_id >= vocab_size:
            raise ValueError(f"request {request_id}: end_id must be in [0, {vocab_size}), got {sampling.end_id}")
        ends = self._model.loaded.eos_ids if sampling.end_id is None else (sampling.end_id,)
        tokens = np.zeros(total, dtype=np.int64)
        tokens[: len(prompt)] = prompt
        return Sequence(
            request_id, tokens, len(prompt), tuple(limits), sampling,
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            end_ids=() if sampling.ignore_eos else ends,
            think_end_id=self._think_end_id,
            stop=generation.stop,
            resumed=generation.resumed,
        )  # fmt: skip

    @property
    def _room(self) -> int:
        """Most tokens of a request: the context, or the cache where it is smaller. The last needs no KV."""
        return min(self._capabilities.max_context, self._pool.num_blocks * self._pool.block_tokens + 1)

    def _works(self, chunks: Many[Chunk], evicted: Many[str]) -> list[_Work]:
        """What there is to run. Raises RuntimeError when the plan contradicts what the engine knows."""
        limits = self._capabilities
        names = [chunk.request_id for chunk in chunks]
        for request_id in (*evicted, *names):
            if request_id not in self._sequences:
                raise _refused(f"request {request_id} is not known")
        if len(set(names)) < len(names):
            raise _refused(f"a request has two chunks: {chunks}")
        tokens = sum([chunk.length for chunk in chunks])
        if len(chunks) > limits.max_batch_requests or tokens > limits.max_batch_tokens:
            raise _refused(f"{tokens} tokens of {len(chunks)} requests in a batch of {limits}")
        gone = set(evicted)
        works, needed = [], 0
        for chunk in chunks:
            sequence = self._sequences[chunk.request_id]
            is_gone = chunk.request_id in gone
            fault = _fault(chunk, 0 if is_gone else sequence.computed, sequence.known, limits.max_draft)
            if fault:
                raise _refused(f"{chunk}: {sequence.computed} of {sequence.known} tokens are computed; {fault}")
            # planned guesses that would pass the end of the stage are not made
            guesses = min(chunk.draft, sequence.useful_guesses) if chunk.draft else 0
            work = _Work(sequence, chunk.start, chunk.length - chunk.draft, max(guesses, 0))
            needed += self._pool.blocks_for(work.end) - (0 if is_gone else len(sequence.blocks))
            works.append(work)
        free = self._pool.free_blocks
        if gone:
            free += self._pool.freed_by(self._sequences[name].blocks for name in gone)
        if needed > free:
            raise _refused(f"the batch needs {needed} more KV blocks, {free} of {limits.num_blocks} are free")
        return works

    def _allocate(self, works: Iterable[_Work]) -> None:
        fresh: list[int] = []
        for work in works:
            blocks = work.sequence.blocks
            missing = self._pool.blocks_for(work.end) - len(blocks)
            if missing > 0:
                blocks += (given := self._pool.allocate(missing))
                fresh += given
        if fresh:
            self._model.cache.clear(fresh)
            if self._drafter is not None:
                self._drafter.clear(fresh)

    def _propose(self, works: Iterable[_Work]) -> None:
        """Let the drafter guess, and compute its KV of the prompt chunks."""
        if self._drafter is None:
            return
        asking = [work for work in works if work.draft or work.length > 1]
        asks = [Ask(work.sequence, work.start + work.length, work.draft) for work in asking]
        for work, guess in zip(asking, self._drafter.propose(asks), strict=True):
            work.guess = guess
            work.sequence.guess(guess.tokens)

    def _compute(self, works: Many[_Work]) -> list[list[int]]:
        """The batch through the model: the tokens each chunk gains, none for one that ends inside the prompt."""
        spans: list[Span] = []
        rows: list[Row] = []
        logit_rows: list[int] = []
        gained: list[list[int]] = [[] for _ in works]
        sampling: list[int] = []
        total = 0
        for index, work in enumerate(works):
            sequence, start = work.sequence, work.start
            guesses = len(work.guess.tokens)
            end = start + work.length + guesses
            spans.append(Span(sequence.tokens[start:end], start, sequence.blocks))
            total += end - start
            if work.samples:
                sampling.append(index)
                rows += [sequence.row(count) for count in range(guesses + 1)]
                logit_rows += range(total - guesses - 1, total)
        logits = self._model.forward(spans, logit_rows)
        if sampling:
            said = verify(logits, rows, [works[index].guess for index in sampling])
            for index, tokens in zip(sampling, said, strict=True):
                gained[index] = tokens
        return gained

    def _finish(self, work: _Work, tokens: list[int]) -> Advance:
        """Book what a chunk achieved. The last new token has no KV yet, the accepted guesses before it have."""
        sequence = work.sequence
        gain = sequence.append(tokens) if tokens else _NO_GAIN
        count = len(gain.token_ids)
        accepted = max(0, count - 1)
        self._settle(sequence, work.start + work.length + accepted)
        if tokens:
            self.outputs.append(
                Output(sequence.request_id, gain.token_ids, gain.finish_reason, len(work.guess.tokens), accepted)
            )
        is_done = gain.finish_reason is not None
        if is_done:
            del self._sequences[sequence.request_id]
            self._pool.free(sequence.blocks, forget=gain.finish_reason == "error")
        computed = sequence.computed
        return Advance(sequence.request_id, computed, count, accepted, gain.stage_ended, is_done)

    def _settle(self, sequence: Sequence, computed: int) -> None:
        """Keep the blocks of `computed` tokens, and let others find those that are full."""
        pool = self._pool
        sequence.computed = computed
        sequence.draft_computed = min(sequence.draft_computed, computed)
        keep = pool.blocks_for(computed)
        if keep < len(sequence.blocks):
            pool.free(sequence.blocks[keep:])
            del sequence.blocks[keep:]
        full = computed // pool.block_tokens
        if full == sequence.remembered:
            return
        hashed = len(sequence.keys)
        if hashed < full:
            tokens = sequence.tokens[hashed * pool.block_tokens : full * pool.block_tokens]
            sequence.keys += pool.chain(tokens, *sequence.keys[-1:])
        for index in range(sequence.remembered, full):
            pool.remember(sequence.blocks[index], sequence.keys[index])
        sequence.remembered = full

    def _drop(self, sequence: Sequence) -> None:
        self._pool.free(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.draft_computed = sequence.remembered = 0


def _fault(chunk: Chunk, computed: int, known: int, max_draft: int) -> str:
    """What is wrong with a chunk of a request that knows so many tokens and has computed some; "" when nothing is."""
    known_end = chunk.start + chunk.length - chunk.draft
    if chunk.start != computed:
        return f"it must start at {computed}"
    if not chunk.start < known_end <= known:
        return "it must compute some of the rest"
    if not 0 <= chunk.draft <= max_draft:
        return f"max_draft is {max_draft}"
    if chunk.draft and known_end != known:
        return "guesses come after all known tokens"
    return ""


def _refused(reason: str) -> RuntimeError:
    return RuntimeError(f"the plan cannot be run: {reason}")


def _check_context(loaded: LoadedModel | None, max_context: int) -> None:
    if loaded is None:
        return
    if max_context > loaded.max_positions:
        raise ValueError(
            f"max_context: must be at most {loaded.max_positions}, the positions that {loaded.folder} has, "
            f"got {max_context}"
        )
    if loaded.sliding_window is not None and max_context > loaded.sliding_window:
        raise ValueError(
            f"max_context: must be at most {loaded.sliding_window}, the sliding window of {loaded.folder} "
            f"(attention beyond a window is not supported), got {max_context}"
        )


def _num_blocks(model: LoadedModel, draft: LoadedModel | None, kv_cache_bytes: int, block_tokens: int) -> int:
    """Blocks that fit into the memory, besides the two that the cache needs for padding."""
    if block_tokens < 1:
        raise ValueError(f"block_tokens: must be at least 1, got {block_tokens}")
    token_bytes = model.kv_bytes_per_token + (draft.kv_bytes_per_token if draft is not None else 0)
    num_blocks = kv_cache_bytes // (token_bytes * block_tokens) - 2
    if num_blocks < 1:
        raise ValueError(
            f"kv_cache_bytes: must be at least {3 * token_bytes * block_tokens}, "
            f"three blocks of {block_tokens} tokens of {token_bytes} bytes, got {kv_cache_bytes}"
        )
    return num_blocks


def _drafter(draft: PagedModel | None, num_blocks: int, max_draft: int) -> Drafter | None:
    if not max_draft:
        return None
    return NgramDrafter() if draft is None else ModelDrafter(draft, num_blocks)
