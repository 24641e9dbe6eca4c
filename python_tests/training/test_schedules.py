import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapkernels.training.config import Method, Ramp, load_config
from gapkernels.training.schedules import LossWeights, cosine_with_warmup, loss_weights, ramp_value

fractions = st.floats(0, 1)


def test_learning_rate_warms_up_linearly_then_follows_a_cosine_to_zero() -> None:
    factors = [cosine_with_warmup(step, total_steps=100, warmup=0.2) for step in range(101)]
    assert factors[:3] == [0.0, 0.05, 0.1]
    assert factors[20] == 1.0
    assert factors[60] == pytest.approx(0.5)
    assert factors[40] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert factors[100] == pytest.approx(0.0, abs=1e-12)
    assert factors[20:] == sorted(factors[20:], reverse=True)


def test_learning_rate_without_warmup_starts_at_its_peak() -> None:
    assert cosine_with_warmup(0, total_steps=10, warmup=0.0) == 1.0


@pytest.mark.parametrize(
    ("progress", "atp", "cu"),
    [(0.0, 1, 1), (0.2, 1, 1), (0.45, 1, 0.5), (0.5, 1, 0.4), (0.7, 1.4, 0), (0.75, 1.5, 0), (1.0, 2, 0)],
)
def test_the_gap_method_follows_the_papers_schedule(progress: float, atp: float, cu: float) -> None:
    weights = loss_weights(load_config("digits").methods["gap"], progress)
    assert weights.nce == 1.0
    assert weights.atp == pytest.approx(atp)
    assert weights.cu == pytest.approx(cu)


def test_a_finished_ramp_is_exactly_its_final_value() -> None:
    # A weight of exactly 0 is what lets the loss skip the term.
    assert ramp_value(Ramp(initial=1, final=0, start=0.2, stop=0.7), 0.7) == 0.0


@given(fractions, fractions, fractions, fractions, fractions)
def test_a_ramp_stays_between_its_ends(initial: float, final: float, one: float, other: float, progress: float) -> None:
    ramp = Ramp(initial=initial, final=final, start=min(one, other), stop=max(one, other))
    slack = 1e-12
    assert min(initial, final) - slack <= ramp_value(ramp, progress) <= max(initial, final) + slack


def test_the_opening_phase_is_centroid_uniformity_alone() -> None:
    method = Method(opening=0.1, atp=Ramp(initial=1, final=1), cu=Ramp(initial=0.5, final=0.5))
    assert loss_weights(method, 0.05) == LossWeights(nce=0, atp=0, cu=1)
    assert loss_weights(method, 0.1) == LossWeights(nce=1, atp=1, cu=0.5)
