/* Alternating least squares for one instruction set (fedgram.flora_na.als says what it computes). Included by
 * solvers.c after scalars.h. Coefficients are rows of `width` numbers: the rank, and zeros up to a multiple of four. */

/* Up to four rows of out = A B, for 4 * VECTORS columns of B from `column` on, over the inner dimension from `start` on. */
#define ROWS_OF(VECTORS)                                                                                              \
    {                                                                                                                 \
        four sum[4][VECTORS];                                                                                         \
        memset(sum, 0, sizeof sum);                                                                                   \
        for (int64_t y = start; y < inner; y++)                                                                       \
            for (int v = 0; v < VECTORS; v++) {                                                                       \
                four b = *(const four *)(B + y * width + column + 4 * v);                                             \
                for (int k = 0; k < 4; k++) sum[k][v] += row[k][y] * b;                                               \
            }                                                                                                         \
        for (int k = 0; k < 4 && x + k < rows; k++)                                                                   \
            for (int v = 0; v < VECTORS; v++) *(four *)(out + (x + k) * width + column + 4 * v) = sum[k][v];          \
    }

/* out (rows x width) = A (rows x inner, every row `stride` after the one before) times B (inner x width), with what
 * `part` says of them left out. */
INLINE void FN(multiply_part)(const double *A, int64_t stride, int64_t rows, int64_t inner, const double *B, int64_t width,
                              double *out, const int part) {
    for (int64_t x = 0; x < rows; x += 4) {
        const double *row[4];
        for (int k = 0; k < 4; k++) row[k] = A + (x + k < rows ? x + k : rows - 1) * stride;
        int64_t column = 0, start = part == UPPER_LEFT ? x : 0;
        const int64_t last = part == UPPER_LEFT && x + 4 < width ? x + 4 : width;
        for (; column + 8 <= last; column += 8) {
            if (part == LOWER_RIGHT) start = column;
            ROWS_OF(2)
        }
        if (part == LOWER_RIGHT) start = column;
        if (column < last) ROWS_OF(1)
    }
}

INLINE void FN(multiply)(const double *A, int64_t stride, int64_t rows, int64_t inner, const double *B, int64_t width,
                         double *out) {
    FN(multiply_part)(A, stride, rows, inner, B, width, out, WHOLE);
}

/* S (rank x width) = Y' C. */
INLINE void FN(inner)(const struct blocks *m, const double *Y, const double *C, double *S) {
    int64_t width = padded(m->rank);
    memset(S, 0, m->rank * width * sizeof(double));
    for (int64_t x = 0; x < m->R; x++)
        for (int64_t i = 0; i < m->rank; i++) FN(axpy)(Y[x * width + i], C + x * width, S + i * width, width);
}

/* T with T' S T = 1; 0 where a combination in Y has cancelled to rounding, or two are nearly parallel. */
INLINE int FN(orthonormaliser)(const struct blocks *m, const struct room *s, int side, const double *Y) {
    int64_t r = m->rank, width = padded(r);
    memset(s->bound, 0, width * sizeof(double));
    for (int64_t x = 0; x < m->R; x++)
        for (int64_t i = 0; i < r; i++) s->bound[i] += s->norms[side][x] * fabs(Y[x * width + i]);
    for (int64_t i = 0; i < r; i++) {
        double floor = m->cancelled * s->bound[i];
        if (!(s->S[i * width + i] > floor * floor)) return 0;
        for (int64_t j = 0; j < r; j++) s->H[i * r + j] = s->S[i * width + j];
    }
    if (!FN(factor)(r, s->H, s->L, s->scale, m->safe_pivot)) return 0;
    memset(s->H, 0, r * r * sizeof(double)); /* L^-1, row by row */
    memset(s->T, 0, r * width * sizeof(double));
    for (int64_t i = 0; i < r; i++) {
        double *row = s->H + i * r;
        row[i] = 1;
        for (int64_t j = 0; j < i; j++) FN(axpy)(-s->L[i * r + j], s->H + j * r, row, j + 1);
        for (int64_t j = 0; j <= i; j++) s->T[j * width + i] = s->scale[j] * (row[j] *= s->L[i * r + i]);
    }
    return 1;
}

/* From coefficients Y of one side, the best X of the other, and Y itself orthonormal where `own` is given; what Y's
 * combination has of squared norm, or -1 where that is in doubt. */
INLINE double FN(half_step)(const struct blocks *m, const struct room *s, int side, const double *Y, double *X,
                            double *own) {
    int64_t r = m->rank, width = padded(r);
    double square = 0;
    FN(multiply)(m->G[side], m->R, m->R, m->R, Y, width, s->C);
    FN(inner)(m, Y, s->C, s->S);
    for (int64_t i = 0; i < r; i++) square += s->S[i * width + i];
    if (!FN(orthonormaliser)(m, s, side, Y)) return -1;
    if (own) FN(multiply)(Y, width, m->R, r, s->T, width, own);
    FN(multiply)(s->C, width, m->R, r, s->T, width, X);
    for (int64_t x = 0; x < m->R; x++)
        for (int64_t i = 0; i < r; i++) X[x * width + i] *= m->D[x];
    return square;
}

/* Eigenvectors of H (n x n, which ends up diagonal) as the columns of V, by Jacobi's rotations. */
INLINE void FN(jacobi)(int64_t n, double *H, double *V) {
    memset(V, 0, n * n * sizeof(double));
    for (int64_t i = 0; i < n; i++) V[i * n + i] = 1;
    for (int round = 0; round < JACOBI_ROUNDS; round++) {
        int64_t turned = 0;
        for (int64_t p = 0; p < n; p++)
            for (int64_t q = p + 1; q < n; q++) {
                double off = H[p * n + q];
                if (fabs(off) <= 1e-17 * sqrt(fabs(H[p * n + p])) * sqrt(fabs(H[q * n + q]))) continue;
                double theta = (H[q * n + q] - H[p * n + p]) / (2 * off);
                double t = copysign(1, theta) / (fabs(theta) + sqrt(theta * theta + 1)), c = 1 / sqrt(t * t + 1);
                double s = t * c;
                for (int64_t k = 0; k < n; k++) {
                    double hp = H[k * n + p], hq = H[k * n + q], vp = V[k * n + p], vq = V[k * n + q];
                    H[k * n + p] = c * hp - s * hq, H[k * n + q] = s * hp + c * hq;
                    V[k * n + p] = c * vp - s * vq, V[k * n + q] = s * vp + c * vq;
                }
                for (int64_t k = 0; k < n; k++) {
                    double hp = H[p * n + k], hq = H[q * n + k];
                    H[p * n + k] = c * hp - s * hq, H[q * n + k] = s * hp + c * hq;
                }
                turned++;
            }
        if (!turned) return;
    }
}

/* Of B = Bs P and A = Q' As with orthonormal rows: the same product with B'B = AA' diagonal, largest first, in place;
 * 0 where it has not the whole rank. */
INLINE int FN(balance)(const struct blocks *m, const struct room *s, double *P, double *Q) {
    int64_t r = m->rank, width = padded(r);
    FN(multiply)(m->G[0], m->R, m->R, m->R, P, width, s->C);
    FN(inner)(m, P, s->C, s->S);
    for (int64_t i = 0; i < r; i++)
        for (int64_t j = 0; j < r; j++) s->H[i * r + j] = (s->S[i * width + j] + s->S[j * width + i]) / 2;
    FN(jacobi)(r, s->H, s->L);
    double largest = 0;
    for (int64_t i = 0; i < r; i++) largest = fmax(largest, s->bound[i] = s->H[i * r + i]);
    for (int side = 0; side < 2; side++) {
        memset(s->T, 0, r * width * sizeof(double));
        for (int64_t i = 0; i < r; i++) {
            int64_t place = 0;
            double b = s->bound[i];
            if (!(b > LEAST_SQUARE * largest)) return 0;
            for (int64_t j = 0; j < r; j++) place += s->bound[j] > b || (s->bound[j] == b && j < i);
            double root = sqrt(sqrt(b));
            for (int64_t j = 0; j < r; j++) s->T[j * width + place] = side ? s->L[j * r + i] * root : s->L[j * r + i] / root;
        }
        double *X = side ? Q : P;
        FN(multiply)(X, width, m->R, r, s->T, width, s->C);
        memcpy(X, s->C, m->R * width * sizeof(double));
    }
    return 1;
}

/* The squared error of a pair and the norms of its factors; 0 where the error is not safely above its rounding. */
INLINE int FN(evidence)(const struct blocks *m, const struct room *s, const double *P, const double *Q, double energy,
                        double mass) {
    int64_t r = m->rank, width = padded(r);
    const double *X[2] = {P, Q};
    double *C[2] = {s->C, s->other}, inner = 0, square = 0, pair = 0, norms[2] = {0, 0};
    memset(s->bound, 0, width * sizeof(double));
    for (int side = 0; side < 2; side++) FN(multiply)(m->G[side], m->R, m->R, m->R, X[side], width, C[side]);
    for (int64_t x = 0; x < m->R; x++) inner += m->D[x] * FN(dot)(C[0] + x * width, C[1] + x * width, r);
    FN(inner)(m, P, C[0], s->S);
    FN(inner)(m, Q, C[1], s->T);
    for (int64_t i = 0; i < r; i++) {
        double bound[2] = {0, 0};
        square += FN(dot)(s->S + i * width, s->T + i * width, r);
        norms[0] += s->S[i * width + i], norms[1] += s->T[i * width + i];
        for (int64_t x = 0; x < m->R; x++)
            for (int side = 0; side < 2; side++) bound[side] += s->norms[side][x] * fabs(X[side][x * width + i]);
        pair += bound[0] * bound[1];
    }
    double error = energy - 2 * inner + square;
    m->found[BLOCK_ENERGY] = energy, m->found[BLOCK_ERROR] = error;
    for (int side = 0; side < 2; side++) m->found[BLOCK_NORM_B + side] = sqrt(fmax(norms[side], 0));
    return error >= m->doubt * (mass + pair) * (mass + pair) && error > 0 && error < INFINITY;
}

/* P and Q from the rows `start` on, with their error; DOUBTFUL where Grams do not tell. */
static void FN(fit_blocks)(const struct blocks *m, double *work) {
    struct room s = furnish(work, m->R, m->rank);
    int64_t R = m->R, r = m->rank, width = padded(r), sweeps = 0, status = MAX_SWEEPS;
    double energy = 0, mass = 0, captured = 0;
    m->found[STATUS] = DOUBTFUL;
    for (int64_t x = 0; x < R; x++) {
        double sum = 0;
        for (int side = 0; side < 2; side++) s.norms[side][x] = sqrt(fmax(m->G[side][x * R + x], 0));
        for (int64_t y = 0; y < R; y++) sum += m->D[y] * m->G[0][x * R + y] * m->G[1][x * R + y];
        energy += m->D[x] * sum, mass += m->D[x] * s.norms[0][x] * s.norms[1][x];
    }
    if (!(energy >= m->doubt * mass * mass) || !(energy > 0)) return;
    memset(s.Q, 0, R * width * sizeof(double));
    for (int64_t x = 0; x < R; x++) memcpy(s.Q + x * width, m->start + x * r, r * sizeof(double));
    while (status != CONVERGED && sweeps < m->max_sweeps) {
        double before = captured;
        sweeps++;
        if (FN(half_step)(m, &s, 1, s.Q, s.P, NULL) < 0) return;
        if ((captured = FN(half_step)(m, &s, 0, s.P, s.Q, NULL)) < 0) return;
        if (captured - before <= m->tolerance * fmax(energy - captured, 1e-13 * energy)) status = CONVERGED;
    }
    if (FN(half_step)(m, &s, 1, s.Q, s.P, s.other) < 0) return;
    memcpy(s.Q, s.other, R * width * sizeof(double));
    if (!FN(balance)(m, &s, s.P, s.Q) || !FN(evidence)(m, &s, s.P, s.Q, energy, mass)) return;
    for (int64_t x = 0; x < R; x++) {
        memcpy(m->P + x * r, s.P + x * width, r * sizeof(double));
        memcpy(m->Q + x * r, s.Q + x * width, r * sizeof(double));
    }
    m->found[STATUS] = status, m->found[SWEEPS] = sweeps;
}
