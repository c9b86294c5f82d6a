/* The squared singular values of dW for one instruction set (fedgram.flora_na.svd says from which matrix), and the best
 * pair's rows of A. Included by solvers.c after blocks.h. */

/* y -= a v + b w. */
INLINE void FN(subtract_two)(double a, const double *v, double b, const double *w, double *y, int64_t n) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) *(four *)(y + i) -= a * *(const four *)(v + i) + b * *(const four *)(w + i);
    for (; i < n; i++) y[i] -= a * v[i] + b * w[i];
}

/* Householder's tridiagonal form of the symmetric M (n x n, rows `width` apart): diagonal d, beside it e, with
 * e[n - 1] = 0. Of M is left what the reflections are made of: see reflect. */
INLINE void FN(tridiagonal)(int64_t n, int64_t width, double *M, double *d, double *e, double *v, double *w) {
    for (int64_t k = 0; k + 1 < n; k++) {
        const int64_t first = k + 1, length = n - first;
        double *row = M + k * width + first, *rest = M + first * width + first;
        double norm = sqrt(FN(dot)(row, row, length));
        d[k] = M[k * width + k];
        e[k] = row[0] > 0 ? -norm : norm;
        if (length == 1 || norm == 0) {
            if (length == 1) e[k] = row[0];
            continue;
        }
        memcpy(v, row, length * sizeof(double));
        v[0] -= e[k];
        double factor = 1 / (norm * (norm + fabs(row[0]))); /* 2 / v'v */
        for (int64_t i = 0; i < length; i++) w[i] = factor * FN(dot)(rest + i * width, v, length);
        FN(axpy)(-0.5 * factor * FN(dot)(w, v, length), v, w, length);
        for (int64_t i = 0; i < length; i++) FN(subtract_two)(w[i], v, v[i], w, rest + i * width, length);
    }
    d[n - 1] = M[(n - 1) * width + n - 1];
    e[n - 1] = 0;
}

/* Eigenvalues of a tridiagonal matrix in place of its diagonal, by implicit QL steps; 0 where they do not come to rest. */
INLINE int FN(implicit_ql)(int64_t n, double *d, double *e) {
    for (int64_t low = 0; low < n; low++) {
        for (int round = 0;; round++) {
            int64_t high = low;
            while (high + 1 < n && fabs(e[high]) > ROUNDING * (fabs(d[high]) + fabs(d[high + 1]))) high++;
            if (high == low) break;
            if (round == QL_ROUNDS) return 0;
            /* the eigenvalue of the leading 2 x 2 block that is nearer to d[low] */
            double slope = (d[low + 1] - d[low]) / (2 * e[low]);
            double shift = d[low] - e[low] / (slope + copysign(sqrt(slope * slope + 1), slope));
            double g = d[high] - shift, s = 1, c = 1, moved = 0;
            int64_t i = high - 1;
            for (; i >= low; i--) {
                double f = s * e[i], b = c * e[i], length = sqrt(f * f + g * g);
                e[i + 1] = length;
                if (length == 0) {
                    d[i + 1] -= moved;
                    break;
                }
                s = f / length, c = g / length;
                g = d[i + 1] - moved;
                double turn = (d[i] - g) * s + 2 * c * b;
                moved = s * turn;
                d[i + 1] = g + moved;
                g = c * turn - b;
            }
            e[high] = 0;
            if (i >= low) continue;
            d[low] -= moved, e[low] = g;
        }
    }
    return 1;
}

/* Eliminates below the diagonal of T - value for a tridiagonal T (d, e). */
INLINE void FN(eliminate)(int64_t n, const double *d, const double *e, double value, const struct elimination *u) {
    double pivot = d[0] - value, beside = e[0];
    for (int64_t k = 0; k < n; k++) {
        double below = e[k], next = k + 1 < n ? d[k + 1] - value : 0, last = k + 1 < n ? e[k + 1] : 0;
        int exchanged = fabs(below) > fabs(pivot);
        if (!exchanged && fabs(pivot) < ROUNDING) pivot = ROUNDING; /* of a matrix whose largest diagonal is 1 */
        u->exchanged[k] = exchanged;
        u->diagonal[k] = exchanged ? below : pivot;
        u->above[k] = exchanged ? next : beside;
        u->second[k] = exchanged ? last : 0;
        u->factor[k] = exchanged ? pivot / below : below / pivot;
        pivot = exchanged ? beside - u->factor[k] * next : next - u->factor[k] * beside;
        beside = exchanged ? -u->factor[k] * last : last;
    }
}

/* x = (T - value)^-1 x. */
INLINE void FN(solve_tridiagonal)(int64_t n, const struct elimination *u, double *x) {
    for (int64_t k = 0; k + 1 < n; k++) {
        double own = x[k], next = x[k + 1];
        x[k] = u->exchanged[k] ? next : own;
        x[k + 1] = (u->exchanged[k] ? own : next) - u->factor[k] * x[k];
    }
    for (int64_t k = n - 1; k >= 0; k--) {
        double one = k + 1 < n ? u->above[k] * x[k + 1] : 0, two = k + 2 < n ? u->second[k] * x[k + 2] : 0;
        x[k] = (x[k] - one - two) / u->diagonal[k];
    }
}

/* x without its part in `count` orthonormal rows before it, of length 1. */
INLINE void FN(straighten)(int64_t n, int64_t count, const double *rows, double *x) {
    double largest = 0;
    for (int64_t k = 0; k < n; k++) largest = fmax(largest, fabs(x[k])); /* its square may overflow */
    for (int64_t k = 0; k < n; k++) x[k] /= largest;
    for (int again = 0; again < 2; again++)
        for (int64_t i = 0; i < count; i++) FN(axpy)(-FN(dot)(rows + i * n, x, n), rows + i * n, x, n);
    double norm = sqrt(FN(dot)(x, x, n));
    for (int64_t k = 0; k < n; k++) x[k] /= norm;
}

/* Orthonormal eigenvectors of a tridiagonal matrix for the `count` largest of its eigenvalues, `unit` being 1 in them, by
 * inverse iteration from fixed numbers. Rows of Z. */
INLINE void FN(tridiagonal_vectors)(int64_t n, const double *d, const double *e, int64_t count, const double *values,
                                    double unit, double *Z, double *work) {
    struct elimination u = {work, work + n, work + 2 * n, work + 3 * n, work + 4 * n};
    uint32_t number = 1;
    for (int64_t i = 0; i < count; i++) {
        double *z = Z + i * n;
        FN(eliminate)(n, d, e, values[i] / unit, &u);
        for (int64_t k = 0; k < n; k++) z[k] = (double)((number = number * 1664525u + 1013904223u) >> 8) - 0x1p23;
        FN(straighten)(n, i, Z, z);
        for (int round = 0; round < INVERSE_ROUNDS; round++) {
            FN(solve_tridiagonal)(n, &u, z);
            FN(straighten)(n, i, Z, z);
        }
    }
}

/* The same for M, of which `tridiagonal` has made d, e and what is left in M, in place. */
INLINE void FN(reflect)(int64_t n, int64_t width, const double *M, const double *e, int64_t count, double *Z) {
    for (int64_t k = n - 3; k >= 0; k--) {
        const int64_t first = k + 1, length = n - first;
        const double *row = M + k * width + first; /* v, but for v[0] = row[0] - e[k] */
        double norm = fabs(e[k]), factor = 1 / (norm * (norm + fabs(row[0])));
        for (int64_t i = 0; i < count && norm > 0; i++) {
            double *z = Z + i * n + first, along = factor * (FN(dot)(row, z, length) - e[k] * z[0]);
            FN(axpy)(-along, row, z, length);
            z[0] += along * e[k];
        }
    }
}

/* Rows of A = V' dW' dW, which span the best ones, as coefficients (R x rank) of size 1: D G_B V for V = D L Z. `left` is
 * (D L)' and Z the eigenvectors, as rows. */
INLINE void FN(best_rows)(const struct spectrum *m, const double *left, const double *Z, double *V, double *W) {
    const int64_t R = m->R;
    double largest = 0;
    for (int64_t i = 0; i < m->rank; i++) {
        memset(V, 0, R * sizeof(double));
        memset(W, 0, R * sizeof(double));
        for (int64_t j = 0; j < R; j++) FN(axpy)(Z[i * R + j], left + j * R + j, V + j, R - j);
        for (int64_t x = 0; x < R; x++) FN(axpy)(V[x], m->G[0] + x * R, W, R);
        for (int64_t x = 0; x < R; x++) {
            double value = m->D[x] * W[x];
            m->rows[x * m->rank + i] = value;
            largest = fmax(largest, fabs(value));
        }
    }
    for (int64_t x = 0; x < R * m->rank; x++) m->rows[x] /= largest;
}

/* The eigenvalues of L' D G_B D L with L L' = G_A, descending, and of the first `rank` what their vectors make of A;
 * DOUBTFUL where G_A is not safely definite. */
static void FN(find_spectrum)(const struct spectrum *m, double *work) {
    const int64_t R = m->R, width = padded(R);
    double *L = take_numbers(&work, R * R), *N = take_numbers(&work, R * width), *K = take_numbers(&work, R * width);
    double *d = take_numbers(&work, R), *e = take_numbers(&work, R), *v = take_numbers(&work, R);
    double *w = take_numbers(&work, R), *beside = take_numbers(&work, 2 * R), largest = 0;
    *m->found = DOUBTFUL;
    memset(L, 0, R * R * sizeof(double));
    if (!FN(factor)(R, m->G[1], L, d, m->safe_pivot)) return;
    memset(N, 0, R * width * sizeof(double));
    for (int64_t i = 0; i < R; i++) { /* D L, the scales and inverse diagonal undone */
        L[i * R + i] = 1 / L[i * R + i];
        for (int64_t j = 0; j <= i; j++) N[i * width + j] = L[i * R + j] * (m->D[i] / d[i]);
    }
    FN(multiply_part)(m->G[0], R, R, R, N, width, K, LOWER_RIGHT);
    for (int64_t i = 0; i < R; i++)
        for (int64_t j = 0; j < R; j++) L[i * R + j] = N[j * width + i];
    FN(multiply_part)(L, R, R, R, K, width, N, UPPER_LEFT);
    for (int64_t i = 0; i < R; i++) largest = fmax(largest, N[i * width + i]);
    if (!(largest > 0) || !(largest < INFINITY)) return;
    for (int64_t i = 0; i < R; i++) /* symmetric, and so small that no square overflows */
        for (int64_t j = 0; j <= i; j++) N[i * width + j] = N[j * width + i] = N[i * width + j] / largest;
    FN(tridiagonal)(R, width, N, d, e, v, w);
    memcpy(beside, e, R * sizeof(double));
    memcpy(beside + R, d, R * sizeof(double));
    if (!FN(implicit_ql)(R, d, e)) return;
    for (int64_t i = 0; i < R; i++) { /* sorted as they are put down */
        double value = d[i] > 0 ? d[i] * largest : 0;
        int64_t k = i;
        for (; k > 0 && m->values[k - 1] < value; k--) m->values[k] = m->values[k - 1];
        m->values[k] = value;
    }
    if (m->rank) {
        FN(tridiagonal_vectors)(R, beside + R, beside, m->rank, m->values, largest, K, work);
        FN(reflect)(R, width, N, beside, m->rank, K);
        FN(best_rows)(m, L, K, v, w);
    }
    *m->found = CONVERGED;
}
#undef ROWS_OF
