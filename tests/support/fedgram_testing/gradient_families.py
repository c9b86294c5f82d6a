"""Families of K gradients that break solvers of the matching dual, and a judge that knows only the gradients."""

import numpy as np

FAMILIES = (
    "random",
    "common part",
    "common part, small spread",
    "eight decades",
    "collinear",
    "rank 3",
    "pareto stationary",
    "opposing pair",
    "duplicates",
    "a zero",
    "many zeros",
)


def gradients(family: str, K: int, seed: int) -> np.ndarray:
    """K gradients as rows, float64."""
    rng = np.random.default_rng([seed, K, FAMILIES.index(family)])
    d = 2 * K + 20
    X = rng.standard_normal((K, d))
    if family.startswith("common part"):
        common = rng.standard_normal(d)
        X -= np.outer(X @ common, common) / (common @ common)  # else one task has the least <g_k, g0> and wins alone
        X *= rng.uniform(0.5, 2, (K, 1))
        return common + (1e-4 if family == "common part" else 1e-6) * X
    if family == "eight decades":
        return X * 10.0 ** rng.uniform(-4, 4, (K, 1))
    if family == "collinear":
        return np.outer(rng.uniform(0.5, 2, K), X[0])
    if family == "rank 3":
        return rng.standard_normal((K, 3)) @ X[:3] if K >= 3 else X
    if family == "pareto stationary":  # zero lies inside the hull, the mean elsewhere
        X = X[:, : max(1, K // 2)]
        shares = rng.dirichlet(np.ones(K))
        X[-1] = -(shares[:-1] @ X[:-1]) / shares[-1] if K > 1 else X[-1]
        return X
    if family == "opposing pair":
        if K > 1:
            X[1] = -2 * X[0]
        return X
    if family == "duplicates":
        return X[rng.integers(0, max(1, K // 2), K)]
    if family == "a zero":
        X[0] = 0
        return X
    if family == "many zeros":
        X[rng.random(K) < 0.3] = 0
        return X
    return X


def duality(X: np.ndarray, u: np.ndarray, c: float, w: np.ndarray, v: np.ndarray) -> tuple[float, float, float]:
    """Dual value at ``w``, primal value at ``v``, and how far ``v`` leaves the ball in units of its radius.

    In extended precision from the gradients themselves, so that no Gram matrix comes between.
    """
    X, u, w, v = (np.asarray(a, np.longdouble) for a in (X, u, w, v))
    g0, gw, d = u @ X, w @ X, v @ X
    radius = c * np.sqrt(g0 @ g0)
    outside = np.sqrt(((d - g0) ** 2).sum()) / radius - 1 if radius > 0 else 0.0
    return float(gw @ g0 + radius * np.sqrt(gw @ gw)), float((X @ d).min()), float(outside)


def size(X: np.ndarray, u: np.ndarray, c: float, active: np.ndarray) -> float:
    """The largest ``|<g_k, g0>| + c ||g0|| ||g_k||`` over the active tasks."""
    g0 = u @ X
    sizes = np.abs(X @ g0) + c * np.linalg.norm(g0) * np.linalg.norm(X, axis=1)
    return float(max(sizes[active].max(initial=0.0), g0 @ g0))
