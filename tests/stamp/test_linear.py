"""The small symmetric solves under the dual."""

import numpy as np

from fedgram.stamp._linear import solve_gram


def test_a_gram_matrix_singular_to_lu_alone_is_singular():
    for seed in (17, 1652, 2045, 2989, 3318):  # six vectors of five entries, whose last Cholesky pivot is above 3e-8
        X = np.random.default_rng(seed).standard_normal((6, 5))
        X /= np.linalg.norm(X, axis=1)[:, None]
        found = solve_gram(X @ X.T, np.ones((6, 2)))
        assert found is None or np.isfinite(found).all()
