"""Options of ``estimate``: anchor, alignment, ranks, statuses, both regimes, and every refusal."""

import math

import pytest
import torch

from fedgram import flora_na
from fedgram.flora_na import LoraLayer
from fedgram.flora_na import group as group_module
from fedgram_testing.factors import clients, dense, divergence, optimum


def fit_by_gradient(B, A, anchor=None, steps=3000):
    """The paper's own way: AdamW on p and q with dense products, in float64; returns the rho it reaches."""
    B, A = torch.stack(B).double(), torch.stack(A).double()
    W = torch.einsum("umr,urn->mn", B, A) / len(B)
    B0, A0 = (torch.zeros_like(B[0]), torch.zeros_like(A[0])) if anchor is None else (x.double() for x in anchor)
    p, q = (torch.full((len(B),), 1 / len(B), dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimiser = torch.optim.AdamW([p, q], lr=0.01, weight_decay=0.0)
    for _ in range(steps):
        product = (B0 + torch.einsum("u,umr->mr", p, B - B0)) @ (A0 + torch.einsum("u,urn->rn", q, A - A0))
        loss = (W - product).square().sum() / W.square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return float(loss.detach().sqrt())


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_scalars_are_at_or_below_a_long_gradient_fit(anchored, seed):
    B, A = clients([4] * 6, 24, 30, spread=0.7, seed=seed)
    anchor = (sum(B) / 6 + 0.1, sum(A) / 6 - 0.1) if anchored else None
    e = flora_na.estimate(B, A, method="flora-na", anchor=anchor)
    assert e.status == "converged"
    assert e.rho <= fit_by_gradient(B, A, anchor) * (1 + 1e-4)


def test_an_anchored_estimate_is_the_anchor_plus_deltas():
    B, A = clients([3] * 4, 12, 14)
    anchor = torch.randn(12, 3), torch.randn(3, 14)
    e = flora_na.estimate(B, A, [4, 1, 1, 1], method="flora-na", anchor=anchor)
    for result, base, factors in ((e.B, anchor[0], B), (e.A, anchor[1], A)):
        deltas = torch.stack([(f - base).flatten() for f in factors], 1).double()
        target = (result - base).flatten().double()
        solution = torch.linalg.lstsq(deltas, target.unsqueeze(1)).solution
        assert float((deltas @ solution - target.unsqueeze(1)).norm()) < 1e-5 * float(target.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("clients", "noise"), [(1, 1.0), (3, 0.0), (3, 1.0), (20, 1.0)])
def test_norms_of_scalars_pairs_are_even_however_small_the_error(clients, noise, dtype):
    g = torch.Generator().manual_seed(0)
    b, a = torch.randn(9, 2, generator=g, dtype=dtype), torch.randn(2, 12, generator=g, dtype=dtype)
    B = [1e-3 * (b + noise * torch.randn(b.shape, generator=g, dtype=dtype)) for _ in range(clients)]
    A = [a + noise * torch.randn(a.shape, generator=g, dtype=dtype) for _ in range(clients)]
    e = flora_na.estimate(B, A, method="flora-na")
    assert 0.5 <= float(e.B.norm() / e.A.norm()) <= 2
    assert e.rho <= e.rho_fedavg * (1 + 1e-6) + 1e-15


def test_unequal_weights_use_them_in_the_target():
    B, A = clients([4] * 5, 30, 20)
    e = flora_na.estimate(B, A, [8, 1, 1, 1, 1], method="svd")
    assert divergence(dense(B, A, [8, 1, 1, 1, 1]), e.B, e.A) == pytest.approx(e.rho_optimal, rel=1e-6)


def test_alignment_rotates_and_keeps_the_product():
    B, A = clients([4] * 5, 40, 50)
    plain = flora_na.estimate(B, A, method="svd")
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))[0]
    previous = plain.B @ rotation, rotation.T @ plain.A
    aligned = flora_na.estimate(B, A, method="svd", align_to=previous)
    assert torch.allclose(aligned.B, previous[0], atol=1e-4 * float(previous[0].norm()))
    assert torch.allclose(aligned.A, previous[1], atol=1e-4 * float(previous[1].norm()))
    assert torch.allclose(aligned.B @ aligned.A, plain.B @ plain.A, atol=1e-4)


def test_alignment_to_a_smaller_rank_is_the_nearest_rotation():
    B, A = clients([4] * 5, 40, 50)
    plain = flora_na.estimate(B, A, method="als")
    previous = torch.randn(40, 2), torch.randn(2, 50)
    aligned = flora_na.estimate(B, A, method="als", align_to=previous)

    def distance(e):
        return float((e.B[:, :2] - previous[0]).square().sum() + (e.A[:2] - previous[1]).square().sum())

    assert distance(aligned) < distance(plain)


def test_rank_above_what_the_factors_span_is_padded_with_zeros():
    B, A = clients([2, 1], 10, 12)
    e = flora_na.estimate(B, A, method="svd", rank=6)
    assert e.rank == 6
    assert e.rho_optimal == 0.0
    assert not e.B[:, 3:].any()
    assert not e.A[3:].any()
    assert e.rho < 1e-6


@pytest.mark.parametrize("method", ["fedavg", "flora-na", "als", "svd"])
def test_round_zero_returns_the_averages(method):
    _, A = clients([3] * 4, 8, 9)
    B = [torch.zeros(8, 3) for _ in A]
    e = flora_na.estimate(B, A, method=method)
    assert e.status == "zero-target"
    assert math.isnan(e.rho)
    assert torch.allclose(e.A, sum(A) / 4, atol=1e-6)
    assert not e.B.any()


def test_opposite_clients_are_a_zero_target():
    B, A = clients([3], 20, 30)
    e = flora_na.estimate([B[0], -B[0]], [A[0], A[0]], method="svd")
    assert e.status == "zero-target"
    assert e.norm == 0.0


def test_small_rho_is_true_to_three_digits():
    g = torch.Generator().manual_seed(0)
    for size in (1e-2, 1e-4, 1e-6):
        u, v = torch.linalg.qr(torch.randn(60, 5, generator=g, dtype=torch.float64))[0], torch.randn(5, 70, generator=g)
        v = torch.linalg.qr(v.double().T)[0].T
        sigma = torch.tensor([1.0, 1.0, 1.0, 1.0, 2 * size], dtype=torch.float64)
        e = flora_na.estimate([u * sigma], [v], method="svd", rank=4)
        assert e.rho == pytest.approx(size, rel=5e-4)
        assert e.rho_optimal == pytest.approx(size, rel=5e-4)


def test_residual_completes_the_estimate():
    B, A = clients([4, 2, 3], 30, 40, dtype=torch.bfloat16)
    e = flora_na.estimate(B, A, method="fedavg")
    left, right = e.residual()
    assert left.dtype == torch.float32
    assert left.shape[1] == 4 + 2 + 3 + e.rank
    W = dense(B, A)
    whole = e.B.double() @ e.A.double() + left.double() @ right.double()
    assert float((W - whole).norm()) < 1e-6 * float(W.norm())


def test_mixed_dtypes_are_promoted():
    B, A = clients([2, 2], 8, 9)
    e = flora_na.estimate([B[0], B[1].half()], [A[0], A[1].half()])
    assert e.B.dtype == e.A.dtype == torch.float32


def test_an_overflowing_result_is_refused():
    B = [torch.full((4, 1), 6e4, dtype=torch.float16)] * 2
    A = [torch.full((1, 4), 6e4, dtype=torch.float16)] * 2
    with pytest.raises(ValueError, match=r"overflows torch.float16"):
        flora_na.estimate(B, A, scalings=[4.0, 4.0], method="fedavg")


class TestImplicitRegime:
    """Above GRAM_RANK_LIMIT no Gram is formed; the answers are the same."""

    @pytest.fixture(autouse=True)
    def _no_grams(self, monkeypatch):
        self.formed = {}
        self.problem = clients([4] * 12, 40, 50, spread=0.6, seed=1), [3.0] + [1.0] * 11, [1.0, 2.0] * 6
        (B, A), w, s = self.problem
        for method in ("fedavg", "flora-na", "als", "svd"):
            e = flora_na.estimate(B, A, w, s, method=method)
            self.formed[method] = e.rho, e.rho_fedavg, e.rho_optimal
        monkeypatch.setattr(group_module, "GRAM_RANK_LIMIT", 0)

    @pytest.mark.parametrize("method", ["fedavg", "flora-na", "als", "svd"])
    def test_agrees_with_the_gram_regime(self, method):
        (B, A), w, s = self.problem
        e = flora_na.estimate(B, A, w, s, method=method)
        rho, fedavg, optimal = self.formed[method]
        assert e.rho == pytest.approx(rho, rel=2e-3 if method in ("flora-na", "als") else 1e-6)
        assert e.rho_fedavg == pytest.approx(fedavg, rel=1e-6)
        assert e.rho_optimal == pytest.approx(optimal, rel=1e-6)
        assert e.rho == pytest.approx(divergence(dense(B, A, w, s), e.B, e.A), rel=1e-5)

    def test_anchored(self):
        (B, A), w, s = self.problem
        anchor = B[0] * 0.9, A[0] * 1.1
        assert flora_na.estimate(B, A, w, s, method="flora-na", anchor=anchor).rho < self.formed["fedavg"][0]

    def test_nan_is_found(self):
        (B, A), w, s = self.problem
        A[3][0, 0] = float("nan")
        with pytest.raises(ValueError, match="lora_A of client 3 contains NaN"):
            flora_na.estimate(B, A, w, s)


def test_more_rank_than_dimensions():
    B, A = clients([4] * 10, 12, 9, common=0.0)
    e = flora_na.estimate(B, A, method="svd")
    assert e.rho == pytest.approx(optimum(dense(B, A), 4), rel=1e-5)


GOOD = clients([3, 3], 6, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda B, A: dict(B=[], A=[]), "at least one client"),
        (lambda B, A: dict(B=B, A=A[:1]), "2 factors B but 1 factors A"),
        (lambda B, A: dict(B=[B[0], B[1][:, :2]], A=A), r"client 1 has B \(6, 2\) and A \(3, 7\)"),
        (lambda B, A: dict(B=[B[0], B[1][:5]], A=A), "an update of 5 x 7 where client 0 has 6 x 7"),
        (lambda B, A: dict(B=[B[0], B[1].int()], A=A), "expected floating point"),
        (lambda B, A: dict(B=B, A=[A[0], A[1] * float("inf")]), "lora_A of client 1 contains"),
        (lambda B, A: dict(B=[B[0] * float("nan"), B[1]], A=A), "lora_B of client 0 contains NaN"),
        (lambda B, A: dict(B=B, A=A, weights=[1.0]), "expected 2 .one per client., got 1"),
        (lambda B, A: dict(B=B, A=A, weights=[1.0, -1.0]), "client 1 has -1.0"),
        (lambda B, A: dict(B=B, A=A, weights=[0.0, 0.0]), "all are zero"),
        (lambda B, A: dict(B=B, A=A, weights=[1.0, float("nan")]), "client 1 has nan"),
        (lambda B, A: dict(B=B, A=A, scalings=[1.0]), "expected 2 scalings"),
        (lambda B, A: dict(B=B, A=A, scalings=[1.0, float("inf")]), "the scaling of client 1 is inf"),
        (lambda B, A: dict(B=B, A=A, method="mean"), "expected one of fedavg, flora-na"),
        (lambda B, A: dict(B=B, A=A, rank=0), "an integer from 1 to 16384"),
        (lambda B, A: dict(B=B, A=A, rank=10**6), "an integer from 1 to 16384"),
        (lambda B, A: dict(B=[b.numpy() for b in B], A=A), "a factor is a ndarray"),
        (lambda B, A: dict(B=[b.to(torch.float8_e4m3fn) for b in B], A=A), "client 0 has dtypes torch.float8_e4m3fn"),
        (lambda B, A: dict(B=[b.to("meta") for b in B], A=[a.to("meta") for a in A]), "on the meta device"),
        (lambda B, A: dict(B=[b.to_sparse() for b in B], A=A), "client 0 has factors of layout torch.sparse_coo"),
        (lambda B, A: dict(B=B, A=A, weights=torch.ones(2, dtype=torch.complex64)), "expected real numbers"),
        (lambda B, A: dict(B=B, A=A, scalings=[1.0, 1e308]), "entries of client 1, with its scaling, reach"),
        (lambda B, A: dict(B=[b.double() * 1e160 for b in B], A=A), r"reach .*e\+160 in B .* beyond float64"),
        (lambda B, A: dict(B=B, A=A, rank=4, method="stack"), "the sum of theirs"),
        (lambda B, A: dict(B=B, A=A, method="fedavg", align_to=(B[0], A[0])), "align_to: rotates"),
        (lambda B, A: dict(B=B, A=A, align_to=(B[0][:3], A[0])), "do not fit"),
        (lambda B, A: dict(B=B, A=A, align_to=(B[0][0], A[0])), "do not fit"),
        (lambda B, A: dict(B=B, A=A, align_to=(B[0].int(), A[0])), "lora_B is torch.int32: expected floating point"),
        (lambda B, A: dict(B=B, A=A, align_to=(B[0], A[0] * float("nan"))), "align_to: .*lora_A contains NaN or Inf"),
        (lambda B, A: dict(B=B, A=A, align_to=(B[0],)), "align_to: expected a pair of tensors"),
        (lambda B, A: dict(B=B, A=A, anchor=LoraLayer(A[0], B[0])), "anchor: expected a pair of tensors"),
        (lambda B, A: dict(B=B, A=A, align_to=(B[0].to_sparse(), A[0])), "lora_B is torch.sparse_coo on cpu: expected"),
        (lambda B, A: dict(B=B, A=A, align_to=(B[0], A[0].to("meta"))), "lora_A is torch.strided on meta: expected"),
        (lambda B, A: dict(B=B, A=A, anchor=(None, None)), "anchor: expected a pair of tensors"),
        (lambda B, A: dict(B=B, A=A, rank=1, align_to=(B[1], A[1])), "is above the result's rank 1"),
        (lambda B, A: dict(B=B, A=A, anchor=(B[0][:3], A[0])), "the anchor has B"),
        (lambda B, A: dict(B=B, A=A, backend="cuda"), "expected one of auto, triton, native, torch"),
    ],
)
def test_bad_input_is_refused_in_one_clear_line(change, message):
    with pytest.raises(ValueError, match=message) as raised:
        flora_na.estimate(**change(*GOOD))
    assert "\n" not in str(raised.value)


def test_a_client_of_weight_zero_takes_no_part_in_anything():
    B, A = clients([2, 2], 6, 5)
    expected = flora_na.estimate(B, A, [1, 3], [2.0, 1.0])
    for idle in (torch.zeros(7, 2), B[0].double(), torch.full_like(B[0], math.nan)):
        found = flora_na.estimate([idle, *B], [A[0].double(), *A], [0, 1, 3], [math.nan, 2.0, 1.0])
        assert torch.equal(found.B, expected.B)
        assert found.B.dtype == torch.float32
    with pytest.raises(ValueError, match="lora_B of client 2 contains NaN"):
        flora_na.estimate([B[0], B[0], B[1] * math.nan], [A[0], *A], [0, 1, 3])
    with pytest.raises(ValueError, match="expected 3 scalings"):
        flora_na.estimate([B[0], *B], [A[0], *A], [0, 1, 3], [1.0, 1.0])


@pytest.mark.parametrize("size", [1e-200, 1e39, 1e200])
def test_alignment_to_factors_beyond_float32(size):
    B, A = clients([3, 3], 8, 9)
    expected = flora_na.estimate(B, A, align_to=(B[0].double(), A[0].double()))
    found = flora_na.estimate(B, A, align_to=(B[0].double() * size, A[0].double() * size))
    assert torch.allclose(found.B, expected.B, atol=1e-5)
    assert torch.allclose(found.A, expected.A, atol=1e-5)


@pytest.mark.parametrize("numbers", [["a", "b"], torch.ones(2, dtype=torch.complex64), [1j, 1.0]])
@pytest.mark.parametrize("argument", ["weights", "scalings"])
def test_numbers_that_are_none_are_named(argument, numbers):
    B, A = clients([2, 2], 6, 5)
    with pytest.raises(ValueError, match=f"{argument}: expected real numbers"):
        flora_na.estimate(B, A, **{argument: numbers})
    with pytest.raises(ValueError, match=f"{argument}: expected real numbers"):
        flora_na.estimate_modules([B], [A], **{argument: numbers})
