"""The iteration-time model: inverse, fit, and what it learns while running."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slos_serve.scheduler import BatchShape, PerfModel, Piece, fit, quality, timemodel

ROOFLINE = PerfModel((Piece(0.011, 2e-5, 1e-3), Piece(0.003, 6e-5, 2e-3)), per_context=3e-8, per_area=4e-9)


@given(st.floats(0.0, 0.5), st.integers(0, 200_000), st.integers(0, 8))
def test_tokens_within_is_the_inverse_of_seconds(seconds: float, context: int, steps: int) -> None:
    """The most tokens within a time fit into it, and one more does not."""
    tokens = ROOFLINE.tokens_within(seconds, context, steps)
    if tokens > 0:
        assert ROOFLINE.seconds(BatchShape(tokens, context, 0.0, steps)) <= seconds + 1e-9
    assert ROOFLINE.seconds(BatchShape(tokens + 1, context, 0.0, steps)) > seconds - 1e-9


@given(st.integers(1, 8192), st.integers(0, 100), st.integers(0, 10**6))
def test_more_work_never_takes_less_time(tokens: int, more: int, context: int) -> None:
    """Seconds grow with tokens and with context."""
    before = ROOFLINE.seconds(BatchShape(tokens, context))
    assert ROOFLINE.seconds(BatchShape(tokens + more, context)) >= before
    assert ROOFLINE.seconds(BatchShape(tokens, context + more)) >= before


def test_json_round_trip() -> None:
    """A model written to JSON and read back is equal."""
    assert PerfModel.from_json(ROOFLINE.to_json()) == ROOFLINE


@pytest.mark.parametrize("data", [{}, {"pieces": []}, {"pieces": [["a", 0, 1]]}, {"pieces": [[0, 0, 1.0]]}])
def test_malformed_json_is_refused(data: dict[str, object]) -> None:
    """A profile that cannot be a time model raises ValueError."""
    with pytest.raises(ValueError, match="time model"):
        PerfModel.from_json(data)


def test_fit_recovers_a_noisy_roofline() -> None:
    """From 300 batches with 3 % noise the fit predicts 100 others with R2 > 0.98 and MAPE < 5 %."""
    rng = np.random.default_rng(7)
    shapes = [
        BatchShape(
            int(rng.integers(1, 4096)),
            int(rng.integers(0, 300_000)),
            float(rng.uniform(0, 4e6)),
            int(rng.integers(0, 5)),
        )
        for _ in range(400)
    ]
    times = [ROOFLINE.seconds(s) * float(rng.normal(1, 0.03)) for s in shapes]
    model = fit(shapes[:300], times[:300])
    score = quality(model, shapes[300:], times[300:])
    assert score.r2 > 0.98
    assert score.mape < 5


def test_fit_of_a_noisy_machine_is_its_mean() -> None:
    """Where times vary by a third the model is in the middle of them, neither fast nor slow."""
    rng = np.random.default_rng(1)
    shapes = [BatchShape(int(rng.integers(1, 512)), int(rng.integers(0, 9000))) for _ in range(2000)]
    times = [ROOFLINE.seconds(s) * float(np.exp(0.33 * rng.standard_normal() - 0.33**2 / 2)) for s in shapes]
    model = fit(shapes, times)
    assert np.mean([model.seconds(s) / ROOFLINE.seconds(s) for s in shapes]) == pytest.approx(1.0, abs=0.03)


def test_fit_refuses_too_little() -> None:
    """Three samples do not make a model."""
    with pytest.raises(ValueError, match="at least 4"):
        fit([BatchShape(1)] * 3, [0.1] * 3)


def test_correction_learns_scale_and_offset() -> None:
    """A machine that is 30 % slower plus 2 ms is predicted within 3 % after 400 iterations."""
    rng = np.random.default_rng(3)
    learnt = timemodel.pack(PerfModel((Piece(0.0, 1e-5),)))
    for _ in range(400):
        predicted = float(rng.uniform(0.01, 0.08))
        timemodel.observe(learnt, predicted, 0.002 + 1.3 * predicted)
    assert timemodel.apply(learnt, 0.05) == pytest.approx(0.067, rel=0.03)


def test_correction_shrugs_off_an_outlier() -> None:
    """One iteration that took twenty times as long moves the prediction by less than 5 %."""
    learnt = timemodel.pack(PerfModel((Piece(0.0, 1e-5),)))
    for _ in range(300):
        timemodel.observe(learnt, 0.02, 0.02)
    timemodel.observe(learnt, 0.02, 0.4)
    assert timemodel.apply(learnt, 0.02) == pytest.approx(0.02, rel=0.05)


def test_margin_follows_the_noise() -> None:
    """The planning margin is near the noise's upper tail: small for 1 %, larger for 8 %."""
    margins = []
    for noise in (0.01, 0.08):
        rng = np.random.default_rng(1)
        learnt = timemodel.pack(PerfModel((Piece(0.0, 1e-5),)))
        for _ in range(1000):
            timemodel.observe(learnt, 0.02, 0.02 * float(np.exp(rng.normal(0, noise))))
        margins.append(float(learnt[timemodel.MARGIN]))
    assert margins[0] < 0.05 < margins[1] < 0.3
