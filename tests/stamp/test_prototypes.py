"""Prototypes: what is chosen, its evidence, and what is refused."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from fedgram import stamp


def errors_by_hand(X, y, found):
    """Per class, the distance of the chosen samples' mean from the class mean, in float64."""
    X = torch.as_tensor(X).double().reshape(len(X), -1)
    y = torch.as_tensor(y)
    return torch.stack([(X[found.of(c)].mean(0) - X[y == c].mean(0)).norm() for c in found.classes.tolist()])


def normal(n, p, seed=0, dtype=torch.float64):
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_optimum_of_small_classes_is_found_or_nearly():
    X, y = normal(60, 5), torch.arange(60) % 5  # five classes of 12
    found = stamp.select_prototypes(X, y, 4, restarts=8)
    for c, error, optimal in zip(found.classes.tolist(), found.error.tolist(), found.swap_optimal, strict=True):
        rows = X[y == c]
        subsets = torch.tensor(list(itertools.combinations(range(12), 4)))
        best = (rows[subsets].mean(1) - rows.mean(0)).norm(dim=1).min().item()
        assert best * (1 - 1e-12) <= error <= 1.5 * best
        assert optimal


def test_no_swap_improves_what_is_called_swap_optimal():
    X, y = normal(90, 4, seed=1), torch.tensor([0] * 50 + [7] * 40)
    found = stamp.select_prototypes(X, y, {0: 6, 7: 3})
    for c, error in zip((0, 7), found.error.tolist(), strict=True):
        members = found.of(c).tolist()
        others = [i for i in torch.nonzero(y == c)[:, 0].tolist() if i not in members]
        mean = X[y == c].mean(0)
        for i, j in itertools.product(members, others):
            assert (X[[k for k in members if k != i] + [j]].mean(0) - mean).norm() >= error * (1 - 1e-12)


def test_real_digits_beat_random_subsets_by_far():
    X, y = load_digits(return_X_y=True)
    found = stamp.select_prototypes(X, y, 10)
    assert found.classes.tolist() == list(range(10))
    assert found.counts.tolist() == [10] * 10
    torch.testing.assert_close(found.error, errors_by_hand(X, y, found), rtol=1e-9, atol=0)
    assert float((found.error / found.random_error).mean()) < 0.32  # random: 1; herding: 0.75; greedy alone: 0.35


def test_the_yardstick_is_the_error_of_random_subsets():
    X, y = normal(40, 6, seed=2), torch.zeros(40, dtype=torch.int64)
    yardstick = float(stamp.select_prototypes(X, y, 8).random_error)
    draw = torch.Generator().manual_seed(0)
    subsets = torch.stack([torch.randperm(40, generator=draw)[:8] for _ in range(4000)])
    seen = (X[subsets].mean(1) - X.mean(0)).square().sum(1)
    # The mean of 4,000 squares, each spread over about its own size / sqrt(3) (6 dimensions): five standard errors.
    assert seen.mean().sqrt().item() == pytest.approx(yardstick, rel=5 / (2 * (3 * 4000) ** 0.5))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.data())
def test_rows_belong_to_their_class_once_and_the_error_is_theirs(n, p, data):
    X = normal(n, p, seed=data.draw(st.integers(0, 99)))
    y = torch.tensor(data.draw(st.lists(st.integers(-2, 3), min_size=n, max_size=n)))
    wanted = {c: data.draw(st.integers(0, int((y == c).sum()))) for c in y.unique().tolist()}
    if not any(wanted.values()):
        return
    found = stamp.select_prototypes(X, y, wanted, restarts=1)
    assert found.counts.tolist() == [m for m in wanted.values() if m]
    for c in found.classes.tolist():
        rows = found.of(c).tolist()
        assert rows == sorted(set(rows))
        assert len(rows) == wanted[c]
        assert (y[rows] == c).all()
    # Error and reference are both sums of at most 30 float64 numbers of size 1.
    torch.testing.assert_close(found.error, errors_by_hand(X, y, found), rtol=1e-9, atol=1e-14)


def test_a_whole_class_has_no_error_and_identical_samples_are_all_as_good():
    X, y = normal(6, 3), torch.zeros(6, dtype=torch.int64)
    whole = stamp.select_prototypes(X, y, 6)
    assert whole.indices.tolist() == list(range(6))
    assert float(whole.error) < 1e-15
    assert float(whole.random_error) == 0
    same = stamp.select_prototypes(torch.ones(5, 4), torch.zeros(5, dtype=torch.int64), 2)
    assert float(same.error) == 0


def test_the_same_seed_gives_the_same_choice_whatever_the_order_of_classes():
    X, y = normal(80, 7, seed=3), torch.arange(80) % 4
    first, again = (stamp.select_prototypes(X, y, 5, seed=9) for _ in range(2))
    assert torch.equal(first.indices, again.indices)
    assert torch.equal(first.error, again.error)


def test_arrays_images_bytes_and_half_precision_are_taken():
    X, y = normal(30, 48, seed=4, dtype=torch.float32), torch.arange(30) % 3
    flat = stamp.select_prototypes(X, y, 4)
    images = stamp.select_prototypes(X.reshape(30, 3, 4, 4).numpy(), y.numpy(), 4)
    assert torch.equal(flat.indices, images.indices)
    digits, labels = load_digits(return_X_y=True)
    as_bytes = stamp.select_prototypes(digits.astype(np.uint8), labels.tolist(), 3)
    assert torch.equal(as_bytes.indices, stamp.select_prototypes(digits.astype(np.float32), labels, 3).indices)
    assert len(stamp.select_prototypes(X.to(torch.bfloat16), y, 4).indices) == 12


def test_an_embedding_decides_where_means_are_matched():
    X, y = normal(40, 6, seed=5), torch.arange(40) % 2
    project = normal(6, 2, seed=6)
    given_shapes = []

    def embedding(samples):
        given_shapes.append(samples.shape)
        return samples.reshape(40, 6) @ project

    found = stamp.select_prototypes(X.reshape(40, 2, 3), y, 5, embedding=embedding)
    assert given_shapes == [(40, 2, 3)]
    assert torch.equal(found.indices, stamp.select_prototypes(X @ project, y, 5).indices)
    torch.testing.assert_close(found.error, errors_by_hand(X @ project, y, found), rtol=1e-9, atol=1e-14)


Y4 = torch.tensor([0, 0, 0, 7])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"per_class": 2}, "per_class: class 7 has 1 samples, 2 were asked for"),
        ({"per_class": {0: 1, 7: 1, 9: 1}}, "per_class: class 9 has 0 samples, 1 were asked for"),
        ({"per_class": {0: 1}}, "per_class: no number given for class 7"),
        ({"per_class": {0: -1, 7: 1}}, "per_class: class 0 has 3 samples, -1 were asked for"),
        ({"per_class": {0: 0, 7: 0}}, "per_class: no prototype is asked of any class"),
        ({"per_class": 2.5}, "per_class: expected a whole number, got 2.5"),
        ({"per_class": {0: 1.5, 7: 1}}, "per_class: class 0: expected a whole number, got 1.5"),
        ({"per_class": 0}, "per_class: expected at least 1, got 0"),
        ({"y": Y4[:3]}, r"y: shape \(3,\) does not belong to X with 4 samples"),
        ({"y": Y4.double()}, "y: expected integer labels, got torch.float64"),
        ({"X": torch.tensor([1.0, 2.0, torch.inf, 3.0])}, "X: sample 2 is not finite"),
        ({"X": torch.zeros(4, 0)}, "X: expected real samples"),
        ({"X": torch.zeros(4, 2, dtype=torch.complex64)}, "X: expected real samples"),
        ({"embedding": lambda X: X[:2]}, r"embedding: expected a tensor of 4 rows, got \(2, 3\)"),
        ({"embedding": lambda X: None}, "embedding: expected a tensor of 4 rows, got NoneType"),
        ({"embedding": lambda X: X / 0}, "embedding: sample 0 is not finite"),
        ({"restarts": -1}, "restarts"),
        ({"backend": "numpy"}, "backend"),
        ({"y": list("abca")}, r"y: expected integer labels \("),
        ({"y": np.array([0, None, 7, 7])}, r"y: expected integer labels \("),
        ({"y": None}, r"y: expected integer labels \("),
        ({"y": np.full(4, 2**63, dtype=np.uint64)}, "y: a label of 2"),
        ({"X": np.array([["a"]] * 4)}, r"X: expected real samples of shape \(N, ...\) \("),
        ({"X": None}, "X: expected real samples"),
        ({"X": [[1.0], [2.0], [3.0, 4.0], [5.0]]}, "X: expected real samples"),
        ({"restarts": 1.5}, "restarts: expected a whole number, got 1.5"),
        ({"restarts": None}, "restarts: expected a whole number, got None"),
        ({"seed": None}, "seed: expected a whole number, got None"),
        ({"seed": 2**64}, "seed: expected a whole number of 64 bits"),
        ({"embedding": lambda X: X.to(torch.complex64)}, "embedding: expected real features, got torch.complex64"),
        ({"embedding": 3}, "embedding: expected a function, got int"),
        ({"X": torch.eye(4).to_sparse()}, "X: expected a dense tensor, got torch.sparse_coo"),
    ],
)
def test_bad_input_is_refused_by_name(change, reason):
    arguments = {"X": normal(4, 3), "y": Y4, "per_class": 1} | change
    with pytest.raises(ValueError, match=reason):
        stamp.select_prototypes(arguments.pop("X"), arguments.pop("y"), arguments.pop("per_class"), **arguments)
