/* The squared singular values of dW for one instruction set (fedgram.flora_na.svd says from which matrix), and the best
 * pair's rows of A. Included by solvers.c after blocks.h. */

/* U (n x n within `width` x `width`) with U'U = H scaled to a unit diagonal, zeros below; 0 where H is not definite, or a pivot
 * is near rounding. Four rows of U are taken from all rows below them at once. */
INLINE int FN(factor_rows)(int64_t n, int64_t width, const double *H, double *U, double *scale, double safe_pivot) {
    for (int64_t i = 0; i < n; i++) {
        if (!(H[i * n + i] > 0)) return 0;
        scale[i] = 1 / sqrt(H[i * n + i]);
    }
    memset(U, 0, width * width * sizeof(double));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = i; j < n; j++) U[i * width + j] = H[i * n + j] * scale[i] * scale[j];
    for (int64_t first = 0; first < n; first += 4) {
        const int64_t end = first + 4 < n ? first + 4 : n;
        double *above = U + first * width;
        for (int64_t i = first; i < end; i++) {
            double *row = U + i * width, inverse = 1 / sqrt(row[i]);
            if (!(row[i] > safe_pivot * safe_pivot)) return 0;
            memset(row + first, 0, (i - first) * sizeof(double));
            for (int64_t j = i; j < n; j++) row[j] *= inverse;
            for (int64_t k = i + 1; k < end; k++) FN(axpy)(-row[k], row + k, U + k * width + k, n - k);
        }
        for (int64_t i = end; i < n; i += 2) /* with whole vectors, some of it before the diagonal */
            for (int64_t j = i / 4 * 4; j < width; j += 4) {
                double *row = U + i * width + j;
                four one = *(four *)row, two = *(four *)(row + width);
                for (int k = 0; k < 4; k++) {
                    const four taken = *(const four *)(above + k * width + j);
                    one -= above[k * width + i] * taken;
                    two -= above[k * width + i + 1] * taken;
                }
                *(four *)row = one, *(four *)(row + width) = two;
            }
    }
    return 1;
}

/* M -= v w' + w v' and y = M p, for the rows and columns of a symmetric M from `first` on (the others of v, w and p are
 * zero), in one pass over its upper half. Everything is `width` long, a multiple of four, and M `width` x `width`. */
INLINE void FN(update_and_multiply)(int64_t width, int64_t first, double *M, const double *v, const double *w,
                                    const double *p, double *y) {
    first = first / 4 * 4;
    memset(y + first, 0, (width - first) * sizeof(double));
    for (int64_t i = first; i < width; i += 4) {
        double *rows = M + i * width;
        four sum[4] = {{0}};
        for (int64_t j = i; j < width; j += 4) {
            const four vs = *(const four *)(v + j), ws = *(const four *)(w + j), ps = *(const four *)(p + j);
            four below = *(const four *)(y + j);
            for (int k = 0; k < 4; k++) {
                four *at = (four *)(rows + k * width + j), m = *at - v[i + k] * ws - w[i + k] * vs;
                *at = m;
                sum[k] += m * ps;
                below += m * p[i + k];
            }
            if (j > i) *(four *)(y + j) = below; /* of the diagonal's blocks both halves are there */
        }
        for (int k = 0; k < 4; k++) y[i + k] += (sum[k][0] + sum[k][1]) + (sum[k][2] + sum[k][3]);
    }
}

/* Householder's tridiagonal form of the symmetric M (n x n, of which the upper half is read, within `width` x `width`):
 * diagonal d, beside it e, with e[n - 1] = 0. Of M is left what the reflections are made of: see reflect. `work` has
 * room for four rows. */
INLINE void FN(tridiagonal)(int64_t n, int64_t width, double *M, double *d, double *e, double *work) {
    double *v = work, *w = v + width, *p = w + width, *y = p + width;
    memset(work, 0, 4 * width * sizeof(double));
    for (int64_t k = 0; k < n; k++) {
        const int64_t length = n - k - 1;
        double *row = M + k * width + k; /* less what the last reflection left to be taken from it: v w' + w v' */
        for (int64_t i = 0; i <= length; i++) row[i] -= v[k] * w[k + i] + w[k] * v[k + i];
        v[k] = w[k] = p[k] = 0;
        d[k] = row[0];
        e[k] = length == 1 ? row[1] : 0;
        double norm = length > 1 ? sqrt(FN(dot)(row + 1, row + 1, length)) : 0, factor = 0;
        memset(p + k + 1, 0, length * sizeof(double));
        if (norm > 0) {
            e[k] = row[1] > 0 ? -norm : norm;
            memcpy(p + k + 1, row + 1, length * sizeof(double));
            p[k + 1] -= e[k];
            factor = 1 / (norm * (norm + fabs(row[1]))); /* 2 / p'p */
        }
        FN(update_and_multiply)(width, k + 1, M, v, w, p, y);
        double half = 0.5 * factor * factor * FN(dot)(y + k + 1, p + k + 1, length);
        for (int64_t i = k + 1; i < n; i++) w[i] = factor * y[i] - half * p[i];
        memcpy(v + k + 1, p + k + 1, length * sizeof(double));
    }
}

/* The `count` largest eigenvalues, descending, of a tridiagonal matrix whose eigenvalues lie between 0 and `bound`, to the
 * rounding of `bound`: by bisection, sixteen at a time because divisions wait for each other. `squares` are those of what
 * is beside the diagonal, each before its row: the first is 0 and none else is, as 0 / 0 would be no sign. */
INLINE void FN(bisect)(int64_t n, const double *d, const double *squares, double bound, int64_t count, double *values) {
    for (int64_t first = 0; first < count; first += 16) {
        four low[4] = {{0}}, high[4];
        whole index[4];
        for (int k = 0; k < 4; k++) high[k] = low[k] + bound, index[k] = (whole){0, 1, 2, 3} + (first + 4 * k);
        for (int round = 0; round < BISECTIONS; round++) {
            four middle[4], pivot[4];
            whole below[4] = {{0}}; /* minus as many as there are negative pivots: eigenvalues below the middle */
            for (int k = 0; k < 4; k++) middle[k] = 0.5 * (low[k] + high[k]), pivot[k] = (four){1, 1, 1, 1};
            for (int64_t i = 0; i < n; i++)
                for (int k = 0; k < 4; k++) {
                    pivot[k] = d[i] - middle[k] - squares[i] / pivot[k];
                    below[k] += (whole)pivot[k] < 0; /* by the sign, which zeros have as well */
                }
            for (int k = 0; k < 4; k++) {
                whole above = below[k] + n > index[k];
                low[k] = (four)(((whole)middle[k] & above) | ((whole)low[k] & ~above));
                high[k] = (four)(((whole)high[k] & above) | ((whole)middle[k] & ~above));
            }
        }
        for (int64_t i = 0; i < 16 && first + i < count; i++) values[first + i] = 0.5 * (low[i / 4][i % 4] + high[i / 4][i % 4]);
    }
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

/* Rows of A = V' dW' dW, which span the best ones, as coefficients (R x rank) of size 1: D G_B V for V = D L Z. U is
 * L' D, its rows padded, and Z the eigenvectors, as rows. */
INLINE void FN(best_rows)(const struct spectrum *m, const double *U, const double *Z, double *V, double *W) {
    const int64_t R = m->R, width = padded(R);
    double largest = 0;
    for (int64_t i = 0; i < m->rank; i++) {
        memset(V, 0, R * sizeof(double));
        memset(W, 0, R * sizeof(double));
        for (int64_t j = 0; j < R; j++) FN(axpy)(Z[i * R + j], U + j * width + j, V + j, R - j);
        for (int64_t x = 0; x < R; x++) FN(axpy)(V[x], m->G[0] + x * R, W, R);
        for (int64_t x = 0; x < R; x++) {
            double value = m->D[x] * W[x];
            m->rows[x * m->rank + i] = value;
            largest = fmax(largest, fabs(value));
        }
    }
    for (int64_t x = 0; x < R * m->rank; x++) m->rows[x] /= largest;
}

/* The largest eigenvalues of L' D G_B D L with L L' = G_A, descending, the sum of the others, and of the first `rank`
 * what their vectors make of A; DOUBTFUL where G_A is not safely definite. */
static void FN(find_spectrum)(const struct spectrum *m, double *work) {
    const int64_t R = m->R, width = padded(R);
    double *U = take_numbers(&work, width * width), *N = take_numbers(&work, width * width), *K = take_numbers(&work, R * width);
    double *d = take_numbers(&work, R), *e = take_numbers(&work, R), *squares = take_numbers(&work, R);
    double largest = 0, bound = 0, beside = 0;
    long double sum = 0; /* hundreds of small numbers beside one that leaves it again */
    m->found[STATUS] = DOUBTFUL;
    if (!FN(factor_rows)(R, width, m->G[1], U, d, m->safe_pivot)) return;
    memset(N, 0, width * width * sizeof(double));
    for (int64_t j = 0; j < R; j++) d[j] = m->D[j] / d[j];
    for (int64_t i = 0; i < R; i++) /* U becomes L' D, the scales undone, and N is D L */
        for (int64_t j = i; j < R; j++) N[j * width + i] = U[i * width + j] *= d[j];
    FN(multiply_part)(m->G[0], R, R, R, N, width, K, LOWER_RIGHT);
    FN(multiply_part)(U, width, R, R, K, width, N, UPPER_LEFT);
    for (int64_t i = 0; i < R; i++) largest = fmax(largest, N[i * width + i]);
    if (!(largest > 0) || !(largest < INFINITY)) return;
    for (int64_t i = 0; i < R; i++) /* symmetric, and so small that no square overflows */
        for (int64_t j = 0; j <= i; j++) N[i * width + j] = N[j * width + i] = N[i * width + j] / largest;
    FN(tridiagonal)(R, width, N, d, e, work);
    for (int64_t i = 0; i < R; i++) { /* Gershgorin's bound */
        squares[i] = i ? fmax(beside * beside, LEAST_BESIDE) : 0;
        bound = fmax(bound, d[i] + fabs(e[i]) + beside);
        beside = fabs(e[i]);
        sum += d[i];
    }
    if (!(sum < INFINITY)) return;
    FN(bisect)(R, d, squares, bound, m->count, m->values);
    for (int64_t i = 0; i < m->count; i++) {
        sum -= m->values[i];
        m->values[i] *= largest;
    }
    m->found[TAIL] = fmax((double)sum, 0) * largest;
    if (m->rank) {
        FN(tridiagonal_vectors)(R, d, e, m->rank, m->values, largest, K, work);
        FN(reflect)(R, width, N, e, m->rank, K);
        FN(best_rows)(m, U, K, work, work + R);
    }
    m->found[STATUS] = CONVERGED;
}
#undef ROWS_OF
