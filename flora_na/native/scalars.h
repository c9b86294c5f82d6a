/* The solver for one instruction set; FN(name) gives each copy a name of its own. Included by scalars.c. */

INLINE double FN(dot)(const double *x, const double *y, int64_t n) {
    four sum = {0, 0, 0, 0}, more = {0, 0, 0, 0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        sum += *(const four *)(x + i) * *(const four *)(y + i);
        more += *(const four *)(x + i + 4) * *(const four *)(y + i + 4);
    }
    for (; i + 4 <= n; i += 4) sum += *(const four *)(x + i) * *(const four *)(y + i);
    sum += more;
    double total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    for (; i < n; i++) total += x[i] * y[i];
    return total;
}

INLINE void FN(axpy)(double a, const double *x, double *y, int64_t n) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) *(four *)(y + i) += a * *(const four *)(x + i);
    for (; i < n; i++) y[i] += a * x[i];
}

/* Whether all clients have one rank, a multiple of four: then nothing is left over beside vectors. */
INLINE int FN(even)(const struct module *m) {
    for (int64_t k = 0; k < m->U; k++)
        if (m->ranks[k] != m->rank) return 0;
    return m->rank % 4 == 0;
}

/* X (R x rank) = G times the combination of the members by q, and S = its Gram (rank x rank). */
INLINE void FN(combine)(const struct module *m, const double *G, const double *q, double *X, double *S) {
    int64_t r = m->rank, U = m->U, aligned = FN(even)(m);
    memset(X, 0, m->R * r * sizeof(double));
    memset(S, 0, r * r * sizeof(double));
    for (int64_t x = 0; x < m->R; x++) {
        const double *g = G + x * m->R;
        for (int64_t c = 0; aligned && c < r; c += 4) {
            four even_sum = {0, 0, 0, 0}, odd_sum = {0, 0, 0, 0};
            int64_t k = 0;
            for (; k + 2 <= U; k += 2) {
                even_sum += q[k] * *(const four *)(g + k * r + c);
                odd_sum += q[k + 1] * *(const four *)(g + (k + 1) * r + c);
            }
            if (k < U) even_sum += q[k] * *(const four *)(g + k * r + c);
            *(four *)(X + x * r + c) = even_sum + odd_sum;
        }
        for (int64_t k = 0; !aligned && k < U; g += m->ranks[k], k++) FN(axpy)(q[k], g, X + x * r, m->ranks[k]);
        FN(axpy)(q[m->member[x]], X + x * r, S + m->slot[x] * r, r);
    }
}

/* The normal equations H p = h of one side, whose other side's combination is X with Gram S. */
INLINE void FN(equations)(const struct module *m, const double *G, const struct space *s) {
    int64_t r = m->rank, R = m->R, U = m->U, aligned = FN(even)(m);
    for (int64_t y = 0; y < R; y++)
        for (int64_t i = 0; i < r; i++) s->T[i * R + y] = m->weights[m->member[y]] * s->X[y * r + i];
    memset(s->H, 0, U * U * sizeof(double));
    memset(s->h, 0, U * sizeof(double));
    for (int64_t x = 0; x < R; x++)
        s->h[m->member[x]] += FN(dot)(G + x * R, s->T + m->slot[x] * R, R);
    if (aligned) {
        for (int64_t i = 0; i < U; i++)
            for (int64_t k = 0; k <= i; k++) {
                four sum[2] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
                for (int64_t x = 0; x < r; x++)
                    for (int64_t c = 0; c < r; c += 4)
                        sum[x & 1] += *(const four *)(G + (i * r + x) * R + k * r + c) * *(const four *)(s->S + x * r + c);
                four both = sum[0] + sum[1];
                s->H[i * U + k] = s->H[k * U + i] = (both[0] + both[1]) + (both[2] + both[3]);
            }
        return;
    }
    for (int64_t x = 0; x < R; x++) {
        const double *g = G + x * R, *row = s->S + m->slot[x] * r;
        double *H = s->H + m->member[x] * U;
        for (int64_t k = 0; k < U; g += m->ranks[k], k++) H[k] += FN(dot)(g, row, m->ranks[k]);
    }
}

/* Solve H step = h - H p by Cholesky on the unit-diagonal matrix; 0 where a pivot is near rounding. */
INLINE int FN(solve)(const struct module *m, const struct space *s, const double *p, double *gain) {
    int64_t U = m->U;
    double *L = s->H + U * U;
    for (int64_t i = 0; i < U; i++) {
        if (!(s->H[i * U + i] > 0)) return 0;
        s->scale[i] = 1 / sqrt(s->H[i * U + i]);
    }
    for (int64_t i = 0; i < U; i++)
        for (int64_t j = 0; j <= i; j++) {
            double sum = s->H[i * U + j] * s->scale[i] * s->scale[j] - FN(dot)(L + i * U, L + j * U, j);
            if (i > j) L[i * U + j] = sum / L[j * U + j];
            else {
                if (!(sum > m->safe_pivot * m->safe_pivot)) return 0;
                L[i * U + i] = sqrt(sum);
            }
        }
    *gain = 0;
    for (int64_t i = 0; i < U; i++) {
        double rest = s->h[i] - FN(dot)(s->H + i * U, p, U);
        s->step[i] = (rest * s->scale[i] - FN(dot)(L + i * U, s->step, i)) / L[i * U + i];
        *gain += s->step[i] * s->step[i];
    }
    for (int64_t i = U - 1; i >= 0; i--) {
        s->step[i] /= L[i * U + i];
        for (int64_t j = 0; j < i; j++) s->step[j] -= L[i * U + j] * s->step[i];
    }
    for (int64_t i = 0; i < U; i++) s->step[i] *= s->scale[i];
    return 1;
}

/* The squared error of (p, q), or -1 where it is not safely above its rounding; energy and mass are those of dW. */
INLINE double FN(error_of)(const struct module *m, const struct space *s, double energy, double mass, double norms[2]) {
    int64_t r = m->rank, R = m->R;
    double inner = 0, square, pair = 0;
    FN(combine)(m, m->G[0], m->p[0], s->X, s->other_S);
    FN(combine)(m, m->G[1], m->p[1], s->T, s->S);
    for (int64_t x = 0; x < R; x++) inner += m->weights[m->member[x]] * FN(dot)(s->X + x * r, s->T + x * r, r);
    square = FN(dot)(s->S, s->other_S, r * r);
    for (int64_t i = 0; i < r; i++) {
        double bound[2] = {0, 0};
        for (int64_t x = 0; x < R; x++)
            if (m->slot[x] == i)
                for (int side = 0; side < 2; side++)
                    bound[side] += sqrt(m->G[side][x * R + x]) * fabs(m->p[side][m->member[x]]);
        pair += bound[0] * bound[1];
    }
    norms[0] = norms[1] = 0;
    for (int64_t i = 0; i < r; i++) norms[0] += s->other_S[i * r + i], norms[1] += s->S[i * r + i];
    for (int side = 0; side < 2; side++) norms[side] = sqrt(norms[side] > 0 ? norms[side] : 0);
    double error = energy - 2 * inner + square;
    return error >= m->doubt * (mass + pair) * (mass + pair) ? error : -1;
}

/* Coefficients of one size, by powers of two: (c p, q / c) would drift off where p or q is all but free. */
INLINE void FN(hold_gauge)(const struct module *m) {
    double largest[2] = {1e-300, 1e-300};
    for (int side = 0; side < 2; side++)
        for (int64_t u = 0; u < m->U; u++) largest[side] = fmax(largest[side], fabs(m->p[side][u]));
    double c = exp2(nearbyint((log2(largest[1]) - log2(largest[0])) / 2));
    for (int64_t u = 0; u < m->U; u++) m->p[0][u] *= c, m->p[1][u] /= c;
}

/* Alternate until a sweep gains less than `tolerance` of what is left, or all to come would; MAX_SWEEPS where not even
 * `coarse` of it is reached. */
INLINE int64_t FN(alternate)(const struct module *m, const struct space *s, double energy, int64_t *sweeps) {
    double before = 0, last = INFINITY;
    for (*sweeps = 1; *sweeps <= m->max_sweeps; ++*sweeps) {
        double gain = 0, captured = 0, part;
        for (int side = 0; side < 2; side++) {
            FN(combine)(m, m->G[!side], m->p[!side], s->X, s->S);
            FN(equations)(m, m->G[side], s);
            if (!FN(solve)(m, s, m->p[side], &part)) return DOUBTFUL;
            gain += part, captured = 0;
            for (int64_t u = 0; u < m->U; u++) captured += s->h[u] * (m->p[side][u] += s->step[u]);
        }
        double left = fmax(energy - captured, 1e-13 * energy), rest = gain * gain / fmax(before - gain, 1e-300);
        double enough = fmax(m->tolerance * left, 1e-19 * energy);
        if (gain <= enough || rest <= 0.1 * enough) return CONVERGED;
        before = gain, last = gain / left;
        if (*sweeps % GAUGE_SWEEPS == 0) FN(hold_gauge)(m);
    }
    *sweeps = m->max_sweeps;
    return last <= m->coarse ? CONVERGED : MAX_SWEEPS;
}

/* p and q from the weights on, with the squared errors before and after; DOUBTFUL where Grams do not tell. */
static void FN(fit)(const struct module *m, double *work) {
    struct space s = carve(work, m->U, m->R, m->rank);
    int64_t R = m->R, sweeps = 0, status = CONVERGED;
    double energy = 0, mass = 0, norms[2];
    for (int64_t x = 0; x < R; x++) {
        double wx = m->weights[m->member[x]], sum = 0;
        for (int64_t y = 0; y < R; y++) sum += m->weights[m->member[y]] * m->G[0][x * R + y] * m->G[1][x * R + y];
        energy += wx * sum;
        mass += wx * sqrt(m->G[0][x * R + x]) * sqrt(m->G[1][x * R + x]);
    }
    for (int side = 0; side < 2; side++) memcpy(m->p[side], m->weights, m->U * sizeof(double));
    m->found[STATUS] = DOUBTFUL;
    if (!(energy >= m->doubt * mass * mass) || !(energy > 0)) return;
    double error = m->found[ERROR_START] = FN(error_of)(m, &s, energy, mass, norms);
    if (m->fit) {
        if ((status = FN(alternate)(m, &s, energy, &sweeps)) == DOUBTFUL) return;
        error = FN(error_of)(m, &s, energy, mass, norms);
        double ratio = norms[0] > 0 && norms[1] > 0 ? sqrt(norms[1] / norms[0]) : 1; /* equal norms of B and A */
        for (int64_t u = 0; u < m->U; u++) m->p[0][u] *= ratio, m->p[1][u] /= ratio;
        norms[0] *= ratio, norms[1] /= ratio;
    }
    if (!(error > 0) || !(error < INFINITY)) return;
    m->found[STATUS] = status, m->found[SWEEPS] = sweeps, m->found[ENERGY] = energy, m->found[ERROR] = error;
    m->found[NORM_B] = norms[0], m->found[NORM_A] = norms[1];
}
