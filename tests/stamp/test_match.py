"""Matching over tensors, lists, state dicts and modules."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fedgram import stamp
from fedgram_testing.gradient_families import FAMILIES, gradients


def lists(K=4, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [[torch.randn(5, 3, generator=g).to(dtype), torch.randn(7, generator=g).to(dtype)] for _ in range(K)]


def flat(gradient):
    return torch.cat([t.double().flatten() for t in gradient])


def reference(X, u, c):
    """The direction from float64 gradients and their Gram matrix."""
    return solve(X, u, c).coefficients @ X


def solve(X, u, c):
    return stamp.solve_dual(X @ X.T, c, u)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_direction_of_lists(dtype):
    given, u = lists(dtype=dtype), [1, 2, 3, 4]
    found = stamp.match(given, u, c=0.5)
    X = torch.stack([flat(g) for g in given])
    assert [t.shape for t in found.direction] == [(5, 3), (7,)]
    assert all(t.dtype == dtype for t in found.direction)
    # One rounding to the output type, on top of weights that are right to 1e-6.
    tolerance = max(1e-6, torch.finfo(dtype).eps) * float(X.abs().max()) * 2
    assert torch.allclose(flat(found.direction), reference(X, u, 0.5), atol=tolerance)
    assert found.status == "optimal"
    assert found.relative_gap <= 1e-9
    assert torch.allclose(found.gramian.dense(), X @ X.T, rtol=1e-5, atol=1e-5)


def test_every_structure_gives_the_same():
    given = lists()
    whole = stamp.match(given)
    tensors = stamp.match([flat(g).float() for g in given])
    assert tensors.direction.shape == (22,)
    assert torch.allclose(flat(whole.direction), tensors.direction.double(), atol=1e-6)
    tuples = stamp.match([tuple(g) for g in given])
    assert isinstance(tuples.direction, list)
    dicts = stamp.match([{"w": w, "b": b} for w, b in given])
    assert list(dicts.direction) == ["w", "b"]
    assert torch.equal(dicts.direction["w"], whole.direction[0])
    modules = [nn.Linear(3, 5) for _ in given]
    for module, (w, b) in zip(modules, given, strict=True):
        module.weight.grad, module.bias.grad = w.clone(), b[:5].clone()
    found = stamp.match(modules)
    assert set(found.direction) == {"weight", "bias"}
    expected = stamp.match([[w, b[:5]] for w, b in given])
    assert torch.equal(found.direction["bias"], expected.direction[1])


def test_strided_empty_and_scalar_tensors():
    g = torch.Generator().manual_seed(3)
    given = [
        [
            torch.randn(6, 4, generator=g).T,
            torch.randn(10, generator=g)[::2],
            torch.zeros(0, 3),
            torch.randn((), generator=g),
        ]
        for _ in range(3)
    ]
    found = stamp.match(given)
    X = torch.stack([flat(row) for row in given])
    assert torch.allclose(flat(found.direction), reference(X, None, 0.25), atol=1e-5)
    assert [t.shape for t in found.direction] == [(4, 6), (5,), (0, 3), ()]


def test_state_dicts_average_what_is_no_gradient():
    states = []
    for k in range(3):
        torch.manual_seed(k)
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        net(torch.randn(20, 4))
        state = net.state_dict()
        state["1.num_batches_tracked"] = torch.tensor(10 * k + 1)
        state["flag"] = torch.tensor([k > 0, k > 1])
        states.append(state)
    found = stamp.match(states, [1, 1, 2])
    u = torch.tensor([0.25, 0.25, 0.5])
    assert list(found.direction) == list(states[0])
    assert found.direction["1.num_batches_tracked"] == torch.tensor(14)  # (1 + 11 + 42) / 4 = 13.5, to even
    assert found.direction["1.num_batches_tracked"].dtype == torch.int64
    assert found.direction["flag"].tolist() == [True, False]  # 3/4 and 2/4 of the weight
    mean = sum(w * s["1.running_var"] for w, s in zip(u, states, strict=True))
    assert torch.allclose(found.direction["1.running_var"], mean)
    matched = ["0.weight", "0.bias", "1.weight", "1.bias"]
    X = torch.stack([flat([s[n] for n in matched]) for s in states])
    assert torch.allclose(flat([found.direction[n] for n in matched]), reference(X, [1, 1, 2], 0.25), atol=1e-6)


def test_none_counts_as_zero():
    a, b = torch.randn(3), torch.randn(2)
    found = stamp.match([[a, None, b], [a * 2, None, None]])
    expected = stamp.match([[a, b], [a * 2, torch.zeros(2)]])
    assert found.direction[1] is None
    assert torch.equal(found.direction[2], expected.direction[1])


def test_one_gradient_and_rescaling():
    g = torch.tensor([3.0, -4.0])
    assert torch.allclose(stamp.match([g], c=0.25).direction, 1.25 * g)
    assert torch.allclose(stamp.match([g], c=0.5, rescale=True).direction, 1.5 / 1.25 * g)
    assert torch.equal(stamp.match([g], c=0.25, rescale="mean").direction, g)
    assert torch.equal(stamp.match([g, g, g], [1, 2, 4], c=0.9, rescale="mean").direction, g)


def test_a_mean_within_rounding_of_zero_is_itself_the_direction():
    g, e = torch.tensor([3.0, -4.0], dtype=torch.float64), torch.tensor([1.0, 1.0], dtype=torch.float64)
    found = stamp.match([g + 1e-8 * e, -g + 1e-8 * e], c=0.5)
    assert found.status == "stationary"
    torch.testing.assert_close(found.direction, 1e-8 * e, rtol=1e-6, atol=0)


def test_zero_gradients_are_reported():
    found = stamp.match([torch.zeros(4), torch.zeros(4)])
    assert found.status == "stationary"
    assert torch.equal(found.direction, torch.zeros(4))
    pair = [torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])]
    opposing = stamp.match([*pair, torch.tensor([0.0, 1.0])], c=0.5, precise=True)
    assert opposing.status == "degenerate"
    assert torch.allclose(opposing.direction, torch.tensor([0.0, 1 / 3]))


def test_results_are_detached():
    p = torch.randn(4, requires_grad=True)
    given = [torch.autograd.grad((p**k).sum(), p, create_graph=True)[0] for k in (2, 3)]
    found = stamp.match(given)
    assert not found.direction.requires_grad
    assert not found.gramian.H.requires_grad


# --- bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "gradients: none given"),
        (torch.zeros(3, 4), "expected a sequence with one entry per task, got one Tensor"),
        ([[]], "task 0 has no tensor to match"),
        ([{"n": torch.tensor(3)}], "task 0 has no tensor to match"),
        ([torch.zeros(2), [torch.zeros(2)]], "task 0 is a tensor, task 1 a sequence"),
        ([torch.zeros(2), 3.0], "task 1 is a float; expected a tensor, a list"),
        ([torch.zeros(2), torch.zeros(3)], r"task 1, '' has shape \(3,\); expected \(2,\)"),
        ([[torch.zeros(2)], [torch.zeros(2), torch.zeros(1)]], r"task 1 has '\[1\]', which task 0 lacks"),
        ([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}], "task 1 lacks 'a', which task 0 has"),
        ([{"a": torch.zeros(2)}, {"a": torch.zeros(2).double()}], "task 1, 'a' has dtype torch.float64"),
        ([[torch.zeros(2, dtype=torch.int64)]], r"\[0\] is torch.int64; a gradient is floating point"),
        ([{"a": torch.zeros(2)}, {"a": "x"}], "task 1, 'a' is a str"),
    ],
)
def test_bad_gradients_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        stamp.match(given)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_non_finite_gradients_are_named(value, word):
    states = [{"a": torch.ones(3), "fc.weight": torch.ones(2, 2)} for _ in range(4)]
    states[2]["fc.weight"][0, 1] = value
    with pytest.raises(ValueError, match=f"task 2, 'fc.weight' is not finite.*{word}"):
        stamp.match(states)
    with pytest.raises(ValueError, match=r"task 2, 'fc.weight'"):
        stamp.gramian(states)


def test_overflowing_products_are_told_from_bad_gradients():
    with pytest.raises(ValueError, match=r"overflow.*task 1 reaches 1e\+30"):
        stamp.match([torch.ones(3), torch.full((3,), 1e30)], precise=False)
    assert stamp.match([torch.ones(3), torch.full((3,), 1e30)], precise=True).status in (
        "optimal",
        "inexact",
        "degenerate",
    )


def test_bad_options_are_refused_before_the_data_is_read():
    bad = [torch.full((3,), float("nan"))]
    for options, message in (
        ({"c": 1.0}, "c: expected"),
        ({"rescale": 2}, "rescale"),
        ({"weights": [1, 2]}, "weights"),
    ):
        with pytest.raises(ValueError, match=message):
            stamp.match(bad, **options)


# --- precision


def close_gradients(K, d, spread, seed=0):
    """float32 gradients with a common part. The differences are orthogonal to it, so that no task wins outright."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(d, generator=g)
    double = common.double()
    rows = []
    for scale in torch.rand(K, generator=g) * 0.4 + 0.8:
        noise = torch.randn(d, generator=g)
        noise -= common * float((double @ noise.double()) / (double @ double))
        rows.append(common + spread * scale * noise)
    return rows


@pytest.mark.parametrize(("K", "d"), [(4, 10_000), (20, 100_000), pytest.param(3, 10_000_000, marks=pytest.mark.slow)])
def test_weights_are_right_for_a_spread_of_1e_minus_4(K, d):
    rows = close_gradients(K, d, 1e-4)
    g0 = torch.zeros(d, dtype=torch.float64)
    for row in rows:
        g0 += row.double() / K
    E = [row.double() - g0 for row in rows]
    H = torch.zeros(K, K, dtype=torch.float64)
    for k in range(K):
        for l in range(k + 1):
            H[k, l] = H[l, k] = E[k] @ E[l]
    exact = stamp.solve_dual(stamp.Gramian(g0 @ g0, torch.stack([e @ g0 for e in E]), H), 0.5).weights
    assert int((exact > 0.01).sum()) >= 3
    # The differences of float32 numbers this close are exact; what is left is the rounding of their products' sums.
    assert torch.allclose(stamp.match(rows, c=0.5).weights, exact, atol=1e-5)
    # In float32 it is about 1e-9 of ||g0|| ||e_k||, against <g0, e_k> of 1e-4 / K of that; a plain float32 Gram matrix
    # is off by some 1e-7 of ||g0||^2, where the differences are 1e-8 of it.
    assert torch.allclose(stamp.match(rows, c=0.5, precise=False).weights, exact, atol=1e-3)
    if d == 100_000:
        X = torch.stack(rows)
        assert float((stamp.solve_dual(X @ X.T, 0.5).weights - exact).abs().max()) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_hard_families_end_to_end(family):
    for seed in range(3):
        X = torch.from_numpy(gradients(family, 6, seed))
        found = stamp.match(list(X), c=0.4)
        d, g0 = found.direction, X.mean(0)
        assert found.status in ("optimal", "degenerate", "stationary", "inexact")
        assert bool(d.isfinite().all())
        if found.status in ("optimal", "degenerate"):
            assert float((d - g0).norm()) <= 0.4 * float(g0.norm()) * (1 + 1e-6)
            best = stamp.solve_dual(X @ X.T, 0.4).objective
            assert float((X @ d).min()) >= best - 1e-7 * float(found.dual.scale)


SCRIPT = """
import hashlib, torch
from fedgram import stamp
g = torch.Generator().manual_seed(0)
base = torch.randn(300_001, generator=g)
rows = [[base + 1e-3 * torch.randn(300_001, generator=g), torch.randn(64, 33, generator=g)] for _ in range(20)]
found = stamp.match(rows)
blob = b"".join(t.numpy().tobytes() for t in (*found.direction, found.weights, found.coefficients, found.gramian.H))
print(torch.get_num_threads(), hashlib.sha256(blob).hexdigest())
"""


@pytest.mark.slow
def test_the_same_bits_for_one_and_two_threads():
    lines = []
    for threads in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-P", "-c", SCRIPT],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        lines.append(done.stdout.split())
    assert [line[0] for line in lines] == ["1", "2"]
    assert len({line[1] for line in lines}) == 1


def test_the_same_bits_on_every_run():
    rows = close_gradients(6, 50_000, 1e-2)
    first, second = stamp.match(rows), stamp.match(rows)
    assert torch.equal(first.direction, second.direction)
    assert torch.equal(first.coefficients, second.coefficients)


def test_nothing_of_the_size_of_the_gradients_is_stacked():
    K, d = 24, 200_000
    rows = [torch.randn(d) for _ in range(K)]
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    with Largest():
        stamp.match(rows)
    assert largest < K * d * 4 / 2  # a stack or a float64 copy of it would be 19 or 38 MB; the block is 4


def test_a_task_whose_gradient_is_short_beside_the_mean_counts():
    g = torch.Generator().manual_seed(198)
    a, b, e = (torch.randn(105_000, generator=g) for _ in range(3))
    rows = [a, 1e-4 * b, a + 0.1 * e]
    double = torch.stack(rows).double()
    exact = stamp.solve_dual(double @ double.T, 0.25)
    found = stamp.match(rows)
    assert found.status == "optimal"
    assert torch.allclose(found.coefficients, exact.coefficients, rtol=1e-6)
    # float32 products must not be refused as an impossible Gram matrix, whatever they are worth
    stamp.match(rows, precise=False)


def test_gradients_near_a_mean_of_zero_are_not_refused():
    """What float32 products leave of the square of the mean is then below zero as often as above."""
    for K, D in ((3, 1), (3, 1000), (4, 2)):
        for seed in range(40):
            rows = torch.randn(K, D, generator=torch.Generator().manual_seed(seed))
            stamp.match(list(rows - rows.mean(0)), precise=False)
