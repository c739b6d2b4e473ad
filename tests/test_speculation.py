"""Guesses make generation faster, never different."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slos_serve.backend.generation import SamplingParams
from slos_serve.backend.sampling import FAILED, Row, draw, probabilities, uniform
from slos_serve.backend.sequence import Sequence
from slos_serve.backend.speculation import NO_GUESS, Ask, Guess, NgramDrafter, verify

GREEDY = SamplingParams()
VOCABULARY = 5


def rows(count: int, params: SamplingParams = GREEDY, seed: int = 1, output: int = 0) -> list[Row]:
    """The rows that decide on `count` - 1 guesses, and the one after them."""
    return [Row(params, seed, np.zeros(1 + output + index, dtype=np.int64), 1) for index in range(count)]


def guess(*tokens: int) -> Guess:
    return Guess(np.array(tokens, dtype=np.int64))


def sequence(tokens: list[int]) -> Sequence:
    return Sequence("a", np.array(tokens, dtype=np.int64), len(tokens), (8,), GREEDY, 0, (), None, None)


def test_greedy_keeps_the_guesses_that_the_model_would_say() -> None:
    """The longest right beginning of each request's guesses is kept, and one token of the model's follows."""
    says = torch.eye(VOCABULARY)[[1, 2, 3, 4, 0, 1, 2]]
    gained = verify(says, rows(7), [guess(1, 2), guess(1, 0), NO_GUESS])
    assert gained == [[1, 2, 3], [4], [2]]


def test_a_failed_row_ends_the_request_where_it_is_reached() -> None:
    """Guesses before a row that is no number are kept; behind a wrong guess it does not matter."""
    says = torch.eye(VOCABULARY)[[1, 2, 3, 1, 2, 3]]
    says[1] = says[4] = torch.nan
    assert verify(says, rows(6), [guess(1, 2), guess(0, 2)]) == [[1, FAILED], [1]]


def empirical(chances: torch.Tensor, draft: torch.Tensor | None, certain: int, samples: int) -> torch.Tensor:
    """How often each first token comes out when one guess is verified against a fixed target."""
    params = SamplingParams(temperature=1.0)
    if draft is None:
        guesses = [guess(certain)] * samples
    else:
        tokens = draw(draft.repeat(samples, 1), [uniform(seed, 0, 3) for seed in range(samples)]).numpy()
        guesses = [Guess(tokens[seed : seed + 1], draft[None]) for seed in range(samples)]
    all_rows = [row for seed in range(samples) for row in rows(2, params, seed)]
    gained = verify(chances.log().repeat(2 * samples, 1), all_rows, guesses)
    return torch.bincount(torch.tensor([tokens[0] for tokens in gained]), minlength=len(chances))


TARGET = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])


@pytest.mark.parametrize(
    ("draft", "certain"),
    [
        (torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2]), 0),
        (torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5]), 0),
        (TARGET, 0),
        (None, 1),
        (None, 4),
    ],
)
def test_sampled_tokens_have_the_distribution_of_the_target(draft: torch.Tensor | None, certain: int) -> None:
    """Whatever the guesses come from, what comes out is distributed as the model says (chi-square)."""
    samples = 8000
    expected = TARGET * samples
    counts = empirical(TARGET, draft, certain, samples)
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # 4 degrees of freedom, 0.1 %


def test_a_draft_that_agrees_is_accepted_whole() -> None:
    """When draft and target say the same, every guess is kept and the next token is drawn."""
    params = SamplingParams(temperature=1.0, top_p=0.95)
    four = rows(4, params)
    logits = TARGET.log().repeat(4, 1)
    chances = probabilities(logits[:3], four[:3])
    for seed in range(50):
        tokens = draw(chances, [uniform(seed, at, 3) for at in range(3)])
        gained = verify(logits, rows(4, params, seed), [Guess(tokens.numpy(), chances)])
        assert gained[0][:3] == tokens.tolist()
        assert len(gained[0]) == 4


def test_filtered_tokens_never_come_out() -> None:
    """A guess that top-k forbids is refused, and what is drawn instead is allowed."""
    params = SamplingParams(temperature=1.0, top_k=2)
    logits = TARGET.log().repeat(2, 1)
    said = {verify(logits, rows(2, params, seed), [guess(4)])[0][0] for seed in range(100)}
    assert said == {0, 1}


def test_lookup_proposes_what_followed_the_last_time() -> None:
    """The latest earlier occurrence of the last three tokens, else of the last two, is continued."""
    drafter = NgramDrafter()
    history = [5, 6, 7, 1, 1, 5, 6, 7, 2, 3, 9, 5, 6, 7]
    cases = [(history, 3), (history, 20), ([6, 7, 4, 8, 6, 7], 1), ([1, 2, 3], 4), ([7], 4), ([7, 7, 7], 4)]
    proposed = drafter.propose([Ask(sequence(tokens), len(tokens), count) for tokens, count in cases])
    assert [part.tokens.tolist() for part in proposed] == [[2, 3, 9], [2, 3, 9, 5, 6, 7], [4], [], [], [7]]
