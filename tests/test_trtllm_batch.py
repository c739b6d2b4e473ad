"""The rules of a batch, one by one: what breaks one is left out under its name, the rest runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from trtllm_standin import LlmRequest, LlmRequestState

from slos_serve.backend.trtllm_batch import Limits, Wish, legal, output
from slos_serve.backend.trtllm_view import Phase, Seen, look

LIMITS = Limits(max_tokens=16, max_requests=4, max_slots=4, block_tokens=4, chunk_unit=4, reserve=2)


def requests(*kinds: str, prompt: int = 12) -> list[Seen]:
    """Requests of each phase, as the engine would show them."""
    made = []
    for number, kind in enumerate(kinds):
        request = LlmRequest(number, number, range(prompt), 8)
        if kind == "prefill":
            request.context_current_position = 4
        if kind in ("decode", "retiring"):
            request.add_new_token(1, 0)
            request.state = LlmRequestState.GENERATION_IN_PROGRESS
        if kind == "retiring":
            request.state = LlmRequestState.GENERATION_TO_COMPLETE
        request.is_dummy = kind == "dummy"
        made.append(request)
    return look(made, LlmRequestState, ())


def rules(wish: Wish, view: list[Seen], free: int = 100, limits: Limits = LIMITS, elsewhere: Any = ()) -> list[str]:
    return [rule for _, rule in legal(wish, view, limits, free, elsewhere).dropped]


def test_phases_are_told_apart() -> None:
    """What holds memory, what may run, and what is not ours."""
    phases = [seen.phase for seen in requests("new", "prefill", "decode", "retiring", "dummy")]
    assert phases == [Phase.NEW, Phase.PREFILL, Phase.DECODE, Phase.RETIRING, Phase.FOREIGN]


@pytest.mark.parametrize("kind", ["new", "retiring", "dummy"])
def test_l1_only_decodes_decode(kind: str) -> None:
    """In the right phase, of this engine, once, and not in flight elsewhere."""
    view = requests(kind, "decode")
    assert rules(Wish(decodes=view), view) == ["L1"]
    assert rules(Wish(decodes=[view[1], view[1]]), view) == ["L1"]
    assert rules(Wish(decodes=[view[1]]), [view[0]]) == ["L1"]
    assert rules(Wish(decodes=[view[1]]), view, elsewhere={1}) == ["L1"]
    assert rules(Wish(contexts=[(view[1], 4)]), view) == ["L1"]


def test_l2_tokens_with_guesses_fit() -> None:
    """Decodes count with their guesses, prompts without a discount."""
    view = requests("decode", "decode", "decode", "new")
    for seen in view[:3]:
        seen.request.draft_tokens = [0] * 5
    batch = legal(Wish(contexts=[(view[3], 12)], decodes=view[:3]), view, LIMITS, 100)
    assert [rule for _, rule in batch.dropped] == ["L2"]
    assert len(batch.decodes) == 2
    assert [size for _, size in batch.contexts] == [4]  # of 12 wanted and 4 left


def test_l3_requests_and_slots_fit() -> None:
    """A batch holds so many; and who has started, run or not, holds a slot."""
    view = requests(*["decode"] * 4, "new")
    assert rules(Wish(decodes=view[:4], contexts=[(view[4], 4)]), view) == ["L3"]
    assert rules(Wish(contexts=[(view[4], 4)]), view) == ["L3"]
    view = requests(*["decode"] * 5)
    assert rules(Wish(decodes=view), view) == ["L3"]


def test_l4_chunks_end_with_blocks() -> None:
    """Cut down to whole blocks, or left out; the last chunk may be any size; without chunking prompts go whole."""
    view = requests("new")
    assert legal(Wish(contexts=[(view[0], 7)]), view, LIMITS, 100).contexts[0][1] == 4
    assert legal(Wish(contexts=[(view[0], 99)]), view, LIMITS, 100).contexts[0][1] == 12
    assert rules(Wish(contexts=[(view[0], 3)]), view) == ["L4"]
    whole = replace(LIMITS, chunk_unit=None)
    assert rules(Wish(contexts=[(view[0], 8)]), view, limits=whole) == ["L4"]


def test_l6_prompts_that_go_on_come_before_those_that_end() -> None:
    """Sampling takes the last rows of the prompts."""
    view = requests("prefill", "prefill")
    batch = legal(Wish(contexts=[(view[0], 8), (view[1], 4)]), view, LIMITS, 100)
    assert [size for _, size in batch.contexts] == [4, 8]


def test_l8_blocks_for_whole_prompts_and_next_steps() -> None:
    """A new prompt takes all its blocks at once; a decode one where it crosses an edge; a reserve stays."""
    view = requests("new", "decode")
    assert rules(Wish(contexts=[(view[0], 4)], decodes=[view[1]]), view, free=5) == ["L8"]  # 3 + 1 of 3
    assert rules(Wish(contexts=[(view[0], 4)], decodes=[view[1]]), view, free=6) == []


def test_l8_is_broken_into_where_nothing_could_run() -> None:
    """One decode goes on with the reserve; without it the youngest gives way."""
    view = requests("decode", "decode")
    batch = legal(Wish(decodes=view), view, LIMITS, 1)
    assert len(batch.decodes) == 1
    batch = legal(Wish(decodes=view), view, LIMITS, 0)
    assert (batch.decodes, batch.paused) == ([], [view[1]])


def test_l9_only_what_has_started_and_arrived_is_paused() -> None:
    """Not what is new, retiring, or still on the device; inside a prompt only where the cache bears it."""
    view = requests("new", "retiring", "decode", "prefill")
    view[2].is_running = True
    assert rules(Wish(paused=view), view, limits=replace(LIMITS, pauses_mid_prefill=False)) == ["L9"] * 4
    view[2].is_running = False
    assert rules(Wish(paused=view), view) == ["L9"] * 2


def test_the_output_has_all_fields_of_a_release() -> None:
    """Fields of other kinds of serving are empty."""
    view = requests("decode")
    made = output(legal(Wish(decodes=view), view, LIMITS, 100), ["encoder_requests", "generation_requests"], dict)
    assert made["encoder_requests"] == []
    assert made["generation_requests"] == [view[0].request]
