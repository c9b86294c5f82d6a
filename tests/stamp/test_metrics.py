import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedgram.stamp import metrics

NAN = math.nan
RUN = [[0.9, NAN, NAN], [0.6, 0.8, NAN], [0.7, 0.5, 0.95]]  # task 0 recovers a little at the end


def test_figures_of_a_run_worked_out_by_hand():
    assert metrics.average_accuracy(RUN) == pytest.approx((0.7 + 0.5 + 0.95) / 3)
    assert metrics.average_forgetting(RUN) == pytest.approx(((0.9 - 0.7) + (0.8 - 0.5)) / 2)
    assert metrics.backward_transfer(RUN) == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 2)


def test_the_best_state_may_come_after_a_task_was_learnt():
    run = [[0.5, NAN, NAN], [0.8, 0.9, NAN], [0.6, 0.9, 0.9]]
    assert metrics.average_forgetting(run) == pytest.approx(0.1)  # 0.8 - 0.6 and 0
    assert metrics.backward_transfer(run) == pytest.approx(0.05)  # 0.6 - 0.5 and 0


def test_a_task_that_ends_at_its_best_has_negative_forgetting():
    assert metrics.average_forgetting([[0.5, NAN], [0.7, 0.9]]) == pytest.approx(-0.2)


def test_one_task_forgets_nothing():
    assert metrics.continual_metrics([[0.4]]) == metrics.ContinualMetrics(0.4, 0.0, 0.0)


def test_tensors_of_every_dtype_are_read():
    a = torch.tensor([[0.5, 0.0], [0.25, 0.75]])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert metrics.continual_metrics(a.to(dtype)) == metrics.continual_metrics(a)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6).flatmap(lambda T: arrays(np.float64, (T, T), elements=st.floats(0, 1))))
def test_forgetting_is_at_least_minus_backward_transfer(a):
    figures = metrics.continual_metrics(torch.from_numpy(a))
    assert figures.average_forgetting >= -figures.backward_transfer - 1e-12
    assert figures == metrics.continual_metrics(np.tril(a))  # what stands above the diagonal is not read


@pytest.mark.parametrize(
    ("a", "reason"),
    [
        ([[0.5, 0.5]], r"shape \(T, T\)"),
        (np.zeros((0, 0)), r"T at least 1"),
        ([[0.5], [0.5, 0.6]], r"shape \(T, T\)"),
        ([[0.5, NAN], [NAN, 0.6]], r"entry \[1, 0\] is nan"),
        ([["good"]], r"expected numbers"),
    ],
)
def test_what_is_no_accuracy_matrix_is_refused(a, reason):
    with pytest.raises(ValueError, match=reason):
        metrics.continual_metrics(a)
