"""Tokens are chosen as the parameters say, row by row, and repeatably."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from slos_serve.backend.generation import SamplingParams
from slos_serve.backend.sampling import (
    FAILED,
    Row,
    draw,
    next_tokens,
    penalised,
    probabilities,
    uniform,
)

VOCABULARY = 40


def row(params: SamplingParams, tokens: list[int] | None = None, prompt: int = 2, ends: tuple[int, ...] = ()) -> Row:
    return Row(params, 11, np.array(tokens or [1, 2], dtype=np.int64), prompt, ends)


def logits(rows: int, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def slow_probabilities(values: list[float], params: SamplingParams) -> list[float]:
    """One row, one filter after the other, without a tensor."""
    scaled = [value / params.temperature for value in values]
    kept = set(range(len(scaled)))
    if params.top_k > 0:
        least = sorted(scaled, reverse=True)[min(params.top_k, len(scaled)) - 1]
        kept = {token for token in kept if scaled[token] >= least}
    mass = {token: math.exp(scaled[token] - max(scaled)) for token in kept}
    total, before, nucleus = math.fsum(mass.values()), 0.0, set()
    for token in sorted(kept, key=lambda token: -scaled[token]):
        if nucleus and before >= params.top_p * total:
            break
        nucleus.add(token)
        before += mass[token]
    likeliest = max(mass[token] for token in nucleus)
    nucleus = {token for token in nucleus if mass[token] >= params.min_p * likeliest}
    total = math.fsum(mass[token] for token in nucleus)
    return [mass[token] / total if token in nucleus else 0.0 for token in range(len(values))]


FILTERS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=2.5, top_k=5),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.0, top_k=1000),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=1.0, top_p=1e-9),
    SamplingParams(temperature=3.0, top_p=0.5, top_k=10),
    SamplingParams(temperature=1.0, min_p=0.2),
    SamplingParams(temperature=4.0, top_k=20, top_p=0.8, min_p=0.1),
]


def test_filters_agree_with_a_slow_reference() -> None:
    """Temperature, top-k, top-p and min-p, mixed in one batch, give each row its own distribution."""
    values = logits(len(FILTERS))
    chances = probabilities(values, [row(params) for params in FILTERS])
    for index, params in enumerate(FILTERS):
        expected = torch.tensor(slow_probabilities(values[index].tolist(), params))
        torch.testing.assert_close(chances[index], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("top_p", [0.3, 0.99])
def test_top_p_over_a_large_vocabulary(top_p: float) -> None:
    """Top-p is right whether a few candidates reach it or the whole vocabulary must be sorted."""
    values = logits(2, vocabulary=3000)
    values[1] /= 10
    params = SamplingParams(temperature=1.0, top_p=top_p)
    chances = probabilities(values, [row(params)] * 2)
    for index in range(2):
        expected = torch.tensor(slow_probabilities(values[index].tolist(), params))
        torch.testing.assert_close(chances[index], expected, atol=1e-5, rtol=1e-3)


def test_penalties_agree_with_a_slow_reference() -> None:
    """Repetition counts prompt and output, presence and frequency only the output."""
    params = SamplingParams(repetition_penalty=1.7, presence_penalty=0.4, frequency_penalty=-0.3)
    tokens = [3, 3, 5, 7, 7, 7, 5]
    values = logits(2)
    changed = penalised(values, [row(SamplingParams(), tokens, 3), row(params, tokens, 3)])
    assert torch.equal(changed[0], values[0])
    for token in range(VOCABULARY):
        expected = values[1, token].item()
        if token in tokens:
            expected = expected / 1.7 if expected > 0 else expected * 1.7
        output = tokens[3:].count(token)
        expected -= 0.4 * (output > 0) - 0.3 * output
        assert changed[1, token].item() == pytest.approx(expected, abs=1e-5)


def test_logits_are_not_changed_in_place() -> None:
    """The caller's logits stay what they were."""
    values = logits(1)
    before = values.clone()
    next_tokens(values, [row(SamplingParams(temperature=1.0, presence_penalty=1.0, min_tokens=5), ends=(0,))])
    assert torch.equal(values, before)


def test_end_tokens_are_masked_until_min_tokens() -> None:
    """An end token that would win is not chosen before its time, and is chosen then."""
    values = torch.zeros(3, VOCABULARY)
    values[:, 9] = 5.0
    values[:, 8] = 4.0
    params = SamplingParams(min_tokens=2)
    rows = [row(params, [1, 2] + [3] * count, 2, ends=(9, 10)) for count in range(3)]
    assert next_tokens(values, rows).tokens.tolist() == [8, 8, 9]


def test_a_row_does_not_depend_on_its_batch() -> None:
    """The same row gives the same token alone and among others, greedy or sampled."""
    params = [*FILTERS, SamplingParams(), SamplingParams(presence_penalty=1.0)]
    values = logits(len(params), seed=3)
    rows = [row(replace(p, seed=1)) for p in params]
    together = next_tokens(values, rows).tokens.tolist()
    alone = [next_tokens(values[i : i + 1], [rows[i]]).tokens.item() for i in range(len(rows))]
    assert together == alone


def test_only_the_row_with_bad_logits_fails() -> None:
    """NaN and infinities make that row FAILED, whatever its parameters; the others are as without it."""
    values = logits(6)
    params = [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9)] * 3
    clean = next_tokens(values, [row(p) for p in params]).tokens.tolist()
    values[0, 3] = torch.nan
    values[1, 3] = torch.nan
    values[2, 3] = torch.inf
    values[3] = -torch.inf
    assert next_tokens(values, [row(p) for p in params]).tokens.tolist() == [FAILED] * 4 + clean[4:]


@pytest.mark.parametrize("temperature", [1e-300, 1e-10, 1e300])
def test_extreme_temperatures_still_choose_a_token(temperature: float) -> None:
    """The coldest temperature is greedy, the hottest is even; neither fails."""
    values = logits(1)
    token = next_tokens(values, [row(SamplingParams(temperature=temperature))]).tokens.item()
    assert 0 <= token < VOCABULARY
    if temperature < 1:
        assert token == values.argmax().item()


def test_draws_follow_the_distribution() -> None:
    """Twenty thousand draws, one for each position, are distributed as they should be (chi-square)."""
    chances = torch.tensor([0.5, 0.0, 0.25, 0.2, 0.05])
    numbers = [uniform(7, position) for position in range(20_000)]
    counts = torch.bincount(draw(chances.repeat(len(numbers), 1), numbers), minlength=5).double()
    assert counts[1] == 0
    kept = chances > 0
    expected = chances[kept].double() * len(numbers)
    assert ((counts[kept] - expected) ** 2 / expected).sum() < 16.3  # 3 degrees of freedom, 0.1 %


def test_uniform_depends_on_all_of_its_arguments() -> None:
    """Seeds, positions and purposes have streams of their own, spread evenly over [0, 1)."""
    numbers = [uniform(seed, at, purpose) for seed in (0, 1, -5, 2**63) for at in range(200) for purpose in range(4)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    assert abs(np.mean(numbers) - 0.5) < 0.02


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", math.nan, "temperature: must be a finite number >= 0, got nan"),
        ("temperature", math.inf, "temperature: must be a finite number >= 0, got inf"),
        ("temperature", -0.1, "temperature: must be a finite number >= 0, got -0.1"),
        ("top_p", 0.0, "top_p: must be a finite number > 0 and <= 1, got 0.0"),
        ("top_p", 1.5, "top_p: must be a finite number > 0 and <= 1, got 1.5"),
        ("top_k", -2, "top_k: must be an integer >= -1, got -2"),
        ("top_k", 1.5, "top_k: must be an integer >= -1, got 1.5"),
        ("min_p", math.nan, "min_p: must be a finite number >= 0 and <= 1, got nan"),
        ("repetition_penalty", 0.0, "repetition_penalty: must be a finite number >= 0.01 and <= 100, got 0.0"),
        ("presence_penalty", 3.0, "presence_penalty: must be a finite number >= -2 and <= 2, got 3.0"),
        ("frequency_penalty", -math.inf, "frequency_penalty: must be a finite number >= -2 and <= 2, got -inf"),
        ("seed", "x", "seed: must be an integer, got 'x'"),
        ("min_tokens", -1, "min_tokens: must be an integer >= 0, got -1"),
        ("end_id", True, "end_id: must be an integer >= 0, got True"),
    ],
)
def test_bad_values_are_named(field: str, value: object, message: str) -> None:
    """Every field out of range is refused with its name, its range and what was got."""
    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.") + "$"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]
