/* The squared singular values of dW for one instruction set (fedgram.flora_na.svd says from which matrix). Included by
 * solvers.c after blocks.h. */

/* y -= a v + b w. */
INLINE void FN(subtract_two)(double a, const double *v, double b, const double *w, double *y, int64_t n) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) *(four *)(y + i) -= a * *(const four *)(v + i) + b * *(const four *)(w + i);
    for (; i < n; i++) y[i] -= a * v[i] + b * w[i];
}

/* Householder's tridiagonal form of the symmetric M (n x n, rows `width` apart, which is spoilt): diagonal d, beside it
 * e, with e[n - 1] = 0. */
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

/* The eigenvalues of L' D G_B D L with L L' = G_A, descending; DOUBTFUL where G_A is not safely definite. */
static void FN(find_spectrum)(const struct spectrum *m, double *work) {
    const int64_t R = m->R, width = padded(R);
    double *L = take_numbers(&work, R * R), *N = take_numbers(&work, R * width), *K = take_numbers(&work, R * width);
    double *d = take_numbers(&work, R), *e = take_numbers(&work, R), *v = take_numbers(&work, R);
    double *w = take_numbers(&work, R), largest = 0;
    *m->found = DOUBTFUL;
    memset(L, 0, R * R * sizeof(double));
    if (!FN(factor)(R, m->G[1], L, d, m->safe_pivot)) return;
    memset(N, 0, R * width * sizeof(double));
    for (int64_t i = 0; i < R; i++) { /* D L, the scales and inverse diagonal undone */
        L[i * R + i] = 1 / L[i * R + i];
        for (int64_t j = 0; j <= i; j++) N[i * width + j] = L[i * R + j] * (m->D[i] / d[i]);
    }
    FN(multiply)(m->G[0], R, R, R, N, width, K);
    for (int64_t i = 0; i < R; i++)
        for (int64_t j = 0; j < R; j++) L[i * R + j] = N[j * width + i];
    FN(multiply)(L, R, R, R, K, width, N);
    for (int64_t i = 0; i < R; i++) largest = fmax(largest, N[i * width + i]);
    if (!(largest > 0) || !(largest < INFINITY)) return;
    for (int64_t i = 0; i < R; i++) /* symmetric, and so small that no square overflows */
        for (int64_t j = 0; j <= i; j++)
            N[i * width + j] = N[j * width + i] = (N[i * width + j] + N[j * width + i]) / (2 * largest);
    FN(tridiagonal)(R, width, N, d, e, v, w);
    if (!FN(implicit_ql)(R, d, e)) return;
    for (int64_t i = 0; i < R; i++) { /* sorted as they are put down */
        double value = d[i] > 0 ? d[i] * largest : 0;
        int64_t k = i;
        for (; k > 0 && m->values[k - 1] < value; k--) m->values[k] = m->values[k - 1];
        m->values[k] = value;
    }
    *m->found = CONVERGED;
}
