"""A prototype memory: its budget, its shares, its determinism and its errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from fedgram import stamp
from fedgram.stamp.memory import fair_shares


def digits(*classes):
    X, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    rows = torch.isin(y, torch.tensor(classes))
    return X[rows].to(torch.float32).reshape(-1, 1, 8, 8) / 16, y[rows]


def filled(capacity, tasks=((0, 1), (2, 3), (4, 5)), **options):
    memory = stamp.PrototypeMemory(capacity, **options)
    for t, classes in enumerate(tasks):
        memory.update(*digits(*classes), t)
    return memory


def test_the_budget_is_used_up_and_shared_again_as_tasks_arrive():
    memory = stamp.PrototypeMemory(50)
    for t, sizes in enumerate([[50], [25, 25], [17, 17, 16], [13, 13, 12, 12]]):
        memory.update(*digits(2 * t, 2 * t + 1), f"task {t}")
        assert [len(memory.task(name)[0]) for name in memory.tasks] == sizes
        assert len(memory) == 50
    X, y = memory.task("task 0")
    assert X.shape == (13, 1, 8, 8)
    assert y.tolist() == [0] * 7 + [1] * 6
    assert memory.nbytes == 50 * 64 * 4 + 8 * 64 * 8  # float32 samples, one float64 mean per class


def test_means_need_not_be_kept():
    plain, tracked = filled(50, track_errors=False), filled(50)
    assert plain.nbytes == 50 * 64 * 4
    assert all(torch.equal(plain.task(t)[0], tracked.task(t)[0]) for t in plain.tasks)
    plain.update(*digits(0, 1), 0)
    with pytest.raises(ValueError, match="track_errors=False"):
        plain.errors(0)


def test_earlier_tasks_are_chosen_among_those_kept():
    memory = filled(40, tasks=((0, 1),))
    before = {row.numpy().tobytes() for row in memory.task(0)[0]}
    memory.update(*digits(2, 3), 1)
    after = [row.numpy().tobytes() for row in memory.task(0)[0]]
    assert len(after) == 20
    assert set(after) <= before
    everything = {row.numpy().tobytes() for row in digits(2, 3)[0]}
    assert {row.numpy().tobytes() for row in memory.task(1)[0]} <= everything


def test_the_first_choice_is_that_of_select_prototypes():
    X, y = digits(0, 1)
    memory = stamp.PrototypeMemory(20, seed=4, restarts=2)
    memory.update(X, y, "a")
    chosen = stamp.select_prototypes(X, y, 10, seed=4, restarts=2)
    assert torch.equal(memory.task("a")[0], X[chosen.indices])
    errors = memory.errors("a")
    # A mean of float32 pixels between 0 and 1, taken in float64 on both sides.
    assert list(errors.values()) == pytest.approx(chosen.error.tolist(), rel=1e-6)


def test_errors_are_measured_against_all_samples_ever_seen():
    memory = filled(36)
    for t, classes in enumerate(((0, 1), (2, 3), (4, 5))):
        X, y = digits(*classes)
        kept, labels = memory.task(t)
        for label, error in memory.errors(t).items():
            gap = (kept[labels == label].double().mean(0) - X[y == label].double().mean(0)).norm()
            assert error == pytest.approx(float(gap), rel=1e-6)


def test_prototypes_stay_nearer_the_class_mean_than_random_samples_even_after_re_selection():
    memory = filled(30)
    for t, classes in enumerate(((0, 1), (2, 3))):
        yardstick = stamp.select_prototypes(*digits(*classes), 5).random_error
        for error, random in zip(memory.errors(t).values(), yardstick.tolist(), strict=True):
            assert error < 0.7 * random


def test_the_same_updates_give_the_same_memory():
    first, again = filled(31, seed=3), filled(31, seed=3)
    for t in first.tasks:
        assert all(torch.equal(a, b) for a, b in zip(first.task(t), again.task(t), strict=True))


def test_a_task_may_arrive_in_pieces():
    X, y = digits(0, 1)
    memory = stamp.PrototypeMemory(20)
    for part in (slice(0, 150), slice(150, 300), slice(300, None)):
        memory.update(X[part], y[part], 0)
    assert memory.tasks == (0,)
    assert len(memory) == 20
    kept, labels = memory.task(0)
    gap = (kept[labels == 0].double().mean(0) - X[y == 0].double().mean(0)).norm()
    assert memory.errors(0)[0] == pytest.approx(float(gap), rel=1e-6)


def test_small_classes_leave_their_places_to_others():
    X, y = digits(0, 1)
    few = torch.cat([torch.nonzero(y == 0)[:3, 0], torch.nonzero(y == 1)[:100, 0]])
    memory = stamp.PrototypeMemory(20)
    memory.update(X[few], y[few], 0)
    assert memory.task(0)[1].tolist() == [0] * 3 + [1] * 17


def test_samples_keep_their_dtype_and_are_no_view_of_the_callers():
    X = torch.arange(20, dtype=torch.uint8).reshape(10, 2)
    memory = stamp.PrototypeMemory(10)
    memory.update(X, [0] * 10, 0)
    X.zero_()
    assert memory.task(0)[0].dtype == torch.uint8
    assert memory.task(0)[0].tolist() == torch.arange(20).reshape(10, 2).tolist()


def test_an_embedding_is_used_for_choice_and_errors():
    memory = filled(20, tasks=((0, 1),), embedding=lambda X: X.flatten(1)[:, :20])
    X, y = digits(0, 1)
    chosen = stamp.select_prototypes(X.flatten(1)[:, :20], y, 10)
    assert torch.equal(memory.task(0)[0], X[chosen.indices])
    assert list(memory.errors(0).values()) == pytest.approx(chosen.error.tolist(), rel=1e-6)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    memory = filled(5, tasks=((0, 1),))
    kept = memory.task(0)[0]
    X, y = digits(2, 3)
    for arguments, reason in [
        (digits(2, 3, 4), r"capacity: 5 samples leave task 1 2 places, fewer than its 3 classes"),
        ((X.double(), y), "X: samples are torch.float64"),
        ((X[:, :, :4], y), r"X: samples are torch.float32 \(1, 4, 8\), the memory holds torch.float32 \(1, 8, 8\)"),
        ((X, y[:3]), "y: shape"),
        ((X * torch.nan, y), "X: sample 0 is not finite"),
    ]:
        with pytest.raises(ValueError, match=reason):
            memory.update(*arguments, 1)
    assert memory.tasks == (0,)
    assert torch.equal(memory.task(0)[0], kept)
    with pytest.raises(KeyError):
        memory.task(1)
    with pytest.raises(ValueError, match=r"restarts: expected a whole number, got 1\.5"):
        stamp.PrototypeMemory(5, restarts=1.5)
    with pytest.raises(ValueError, match="seed: expected a whole number, got None"):
        stamp.PrototypeMemory(5, seed=None)
    with pytest.raises(ValueError, match="capacity: expected at least 1, got 0"):
        stamp.PrototypeMemory(0)
    with pytest.raises(ValueError, match=r"capacity: expected a whole number, got 7\.5"):
        stamp.PrototypeMemory(7.5)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60), st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_shares_are_fair(total, available):
    shares = fair_shares(total, available)
    assert sum(shares) == min(total, sum(available))
    assert all(0 <= share <= most for share, most in zip(shares, available, strict=True))
    unfilled = [share for share, most in zip(shares, available, strict=True) if share < most]
    if unfilled:  # nobody has more than one place more than one who could have taken it
        assert max(shares) <= min(unfilled) + 1
        assert unfilled == sorted(unfilled, reverse=True)
