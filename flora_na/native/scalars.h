/* The solver for one instruction set; FN(name) gives each copy a name of its own. Included by solvers.c. */

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

/* E[i, v] = <B_i A_v, dW>, on which h = E q and h = E' p, <dW, BA> and ||dW||^2 depend. */
INLINE void FN(inner_products)(const struct module *m, const struct space *s) {
    int64_t R = m->R, U = m->U;
    memset(s->E, 0, U * U * sizeof(double));
    for (int64_t y = 0; y < R; y++) {
        const double *g = m->G[1] + y * R;
        for (int64_t x = 0; x < R; x++) s->Z[x] = m->weights[m->member[x]] * g[x];
        for (int64_t i = 0, x = 0; i < U; x += m->ranks[i++])
            if (m->slot[y] < m->ranks[i])
                s->E[i * U + m->member[y]] += FN(dot)(m->G[0] + (x + m->slot[y]) * R, s->Z, R);
    }
}

/* E q, or p' E for the second side. */
INLINE void FN(right_side)(const struct module *m, const struct space *s, int side) {
    int64_t U = m->U;
    memset(s->h, 0, U * sizeof(double));
    for (int64_t i = 0; i < U; i++) {
        if (side == 0) s->h[i] = FN(dot)(s->E + i * U, m->p[1], U);
        else FN(axpy)(m->p[0][i], s->E + i * U, s->h, U);
    }
}

/* The normal equations H p = h of one side, H_ik = tr(G_ik S) with S of the other side's combination. */
INLINE void FN(equations)(const struct module *m, const struct space *s, int side) {
    int64_t r = m->rank, R = m->R, U = m->U;
    const double *G = m->G[side], *S = s->S[!side];
    FN(right_side)(m, s, side);
    memset(s->H, 0, U * U * sizeof(double));
    if (FN(even)(m)) {
        for (int64_t i = 0; i < U; i++)
            for (int64_t k = 0; k <= i; k++) {
                four sum[2] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
                for (int64_t x = 0; x < r; x++)
                    for (int64_t c = 0; c < r; c += 4)
                        sum[x & 1] += *(const four *)(G + (i * r + x) * R + k * r + c) * *(const four *)(S + x * r + c);
                four both = sum[0] + sum[1];
                s->H[i * U + k] = s->H[k * U + i] = (both[0] + both[1]) + (both[2] + both[3]);
            }
        return;
    }
    for (int64_t x = 0; x < R; x++) {
        const double *g = G + x * R, *row = S + m->slot[x] * r;
        double *H = s->H + m->member[x] * U;
        for (int64_t k = 0; k < U; g += m->ranks[k], k++) H[k] += FN(dot)(g, row, m->ranks[k]);
    }
}

/* L L' = H scaled to a unit diagonal; 0 where H is not definite, or a pivot is near rounding. */
INLINE int FN(factor)(int64_t U, const double *H, double *L, double *scale, double safe_pivot) {
    for (int64_t i = 0; i < U; i++) {
        if (!(H[i * U + i] > 0)) return 0;
        scale[i] = 1 / sqrt(H[i * U + i]);
    }
    for (int64_t i = 0; i < U; i++)
        for (int64_t j = 0; j <= i; j++) {
            double sum = H[i * U + j] * scale[i] * scale[j] - FN(dot)(L + i * U, L + j * U, j);
            if (i > j) L[i * U + j] = sum * L[j * U + j];
            else {
                if (!(sum > safe_pivot * safe_pivot)) return 0;
                L[i * U + i] = 1 / sqrt(sum); /* its inverse, which is what the substitutions multiply by */
            }
        }
    return 1;
}

/* x = H^-1 b by the factor; returns b' x. */
INLINE double FN(substitute)(int64_t U, const double *L, const double *scale, const double *b, double *x) {
    double square = 0;
    for (int64_t i = 0; i < U; i++) {
        x[i] = (b[i] * scale[i] - FN(dot)(L + i * U, x, i)) * L[i * U + i];
        square += x[i] * x[i];
    }
    for (int64_t i = U - 1; i >= 0; i--) {
        x[i] *= L[i * U + i];
        FN(axpy)(-x[i], L + i * U, x, i);
    }
    for (int64_t i = 0; i < U; i++) x[i] *= scale[i];
    return square;
}

/* The exact step of one side, not yet taken, and the drop of the error by it; -1 where a pivot is near rounding. */
INLINE double FN(exact_step)(const struct module *m, const struct space *s, int side) {
    int64_t U = m->U;
    FN(combine)(m, m->G[!side], m->p[!side], s->X[!side], s->S[!side]);
    FN(equations)(m, s, side);
    if (!FN(factor)(U, s->H, s->L[side], s->scale[side], m->safe_pivot)) return -1;
    for (int64_t i = 0; i < U; i++) s->rest[i] = s->h[i] - FN(dot)(s->H + i * U, m->p[side], U);
    return FN(substitute)(U, s->L[side], s->scale[side], s->rest, s->step);
}

/* C[i, v], half of the second derivative by p_i and q_v: <B_i A_v, BA - dW> + <B_i A(q), B(p) A_v>. */
INLINE void FN(cross_derivatives)(const struct module *m, const struct space *s) {
    int64_t r = m->rank, U = m->U;
    const double *XA = s->X[1];
    memset(s->Z, 0, U * r * r * sizeof(double));
    for (int64_t y = 0; y < m->R; y++, XA += r) {
        double *Z = s->Z + m->member[y] * r * r;
        for (int64_t a = 0; a < r; a++) Z[a * r + m->slot[y]] += XA[a];
        FN(axpy)(1, XA, Z + m->slot[y] * r, r);
    }
    const double *XB = s->X[0];
    for (int64_t i = 0; i < U; XB += m->ranks[i++] * r)
        for (int64_t v = 0; v < U; v++)
            s->C[i * U + v] = FN(dot)(XB, s->Z + v * r * r, m->ranks[i] * r) - s->E[i * U + v];
}

/* Newton's step in q for the error as a function of q alone (p at its best), after exact_step(.., 1) at such a point;
 * returns the drop of the error that it promises. Where that function is not convex, its second derivative H - W, with
 * W = C' H_p^-1 C for what p gives way, is taken with less of W (with none the step would be the exact one for this p):
 * then, or where even that fails, it returns -1. */
INLINE double FN(newton_step)(const struct module *m, const struct space *s) {
    int64_t U = m->U;
    double along = 0, promised;
    FN(cross_derivatives)(m, s);
    memset(s->W, 0, U * U * sizeof(double));
    for (int64_t i = 0; i < U; i++) { /* row by row of L^-1 C */
        double *row = s->C + i * U;
        for (int64_t v = 0; v < U; v++) row[v] *= s->scale[0][i];
        for (int64_t j = 0; j < i; j++) FN(axpy)(-s->L[0][i * U + j], s->C + j * U, row, U);
        for (int64_t v = 0; v < U; v++) row[v] *= s->L[0][i * U + i];
        for (int64_t v = 0; v < U; v++) FN(axpy)(row[v], row, s->W + v * U, U);
    }
    for (int64_t i = 0; i < U; i++) along += m->p[1][i] * (s->h[i] = FN(dot)(s->H + i * U, m->p[1], U));
    if (!(along > 0)) return -1;
    for (double less = 0; less < 1; less = less ? 2 * less : LEAST_DAMPING) {
        for (int64_t i = 0; i < U; i++) {
            double *row = s->K + i * U;
            memcpy(row, s->H + i * U, U * sizeof(double));
            FN(axpy)(less - 1, s->W + i * U, row, U);
            /* (c p, q / c) is the same product: there is nothing along q, and H's part there takes that freedom away */
            FN(axpy)(s->h[i] / along, s->h, row, U);
        }
        if (!FN(factor)(U, s->K, s->L[1], s->scale[1], m->safe_pivot)) continue;
        promised = FN(substitute)(U, s->L[1], s->scale[1], s->rest, s->step);
        return less ? INFINITY : promised;
    }
    return -1;
}

/* The squared error of (p, q), or -1 where it is not safely above its rounding; energy and mass are those of dW. */
INLINE double FN(error_of)(const struct module *m, const struct space *s, double energy, double mass, double norms[2]) {
    int64_t r = m->rank, R = m->R;
    double inner = 0, pair = 0;
    for (int side = 0; side < 2; side++) FN(combine)(m, m->G[side], m->p[side], s->X[side], s->S[side]);
    FN(right_side)(m, s, 0);
    inner = FN(dot)(s->h, m->p[0], m->U);
    for (int64_t i = 0; i < r; i++) {
        double bound[2] = {0, 0};
        for (int64_t x = 0; x < R; x++)
            if (m->slot[x] == i)
                for (int side = 0; side < 2; side++)
                    bound[side] += sqrt(m->G[side][x * R + x]) * fabs(m->p[side][m->member[x]]);
        pair += bound[0] * bound[1];
    }
    for (int side = 0; side < 2; side++) {
        norms[side] = 0;
        for (int64_t i = 0; i < r; i++) norms[side] += s->S[side][i * r + i];
        norms[side] = sqrt(norms[side] > 0 ? norms[side] : 0);
    }
    double error = energy - 2 * inner + FN(dot)(s->S[0], s->S[1], r * r);
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

/* Minimise over p and q. A sweep is the exact p for q, then for q Newton's step where it serves, else the exact q for p:
 * should Newton's end above the exact one's error, that is taken after all. Done where what is left to gain is less than
 * `tolerance` of the error; MAX_SWEEPS where the last sweep did not even come down to `coarse` of it. */
INLINE int64_t FN(minimise)(const struct module *m, const struct space *s, double energy, int64_t *sweeps) {
    int64_t U = m->U;
    double *q = m->p[1], before = 0, last = INFINITY, safe = INFINITY;
    int trust = 1;
    for (*sweeps = 1; *sweeps <= m->max_sweeps; ++*sweeps) {
        double gain = FN(exact_step)(m, s, 0), part;
        if (gain < 0) return DOUBTFUL;
        FN(axpy)(1, s->step, m->p[0], U);
        if (energy - FN(dot)(s->h, m->p[0], U) > safe) { /* not lower than what was safe: go there */
            memcpy(q, s->safe_q, U * sizeof(double));
            safe = INFINITY, trust = 0;
            --*sweeps; /* the next one takes its place, and cannot come to this */
            continue;
        }
        if ((part = FN(exact_step)(m, s, 1)) < 0) return DOUBTFUL;
        gain += part;
        for (int64_t u = 0; u < U; u++) s->safe_q[u] = q[u] + s->step[u];
        double left = fmax(energy - FN(dot)(s->h, s->safe_q, U), 1e-13 * energy);
        double enough = fmax(m->tolerance * left, 1e-19 * energy);
        /* what is to come, if the drops go on as the last two; the first one, from the averages, is no measure of that */
        double rest = *sweeps > 2 ? gain * fmax(gain / fmax(before - gain, 1e-300), LEAST_RATE) : INFINITY;
        double promised = trust ? FN(newton_step)(m, s) : -1;
        int done = promised >= 0 && promised < INFINITY ? promised <= enough : gain <= enough || rest <= 0.1 * enough;
        safe = INFINITY, trust = 1, before = gain, last = gain / left;
        if (promised > enough && !done) {
            FN(axpy)(1, s->step, q, U);
            safe = left;
        } else memcpy(q, s->safe_q, U * sizeof(double));
        if (done) return CONVERGED;
        if (*sweeps % GAUGE_SWEEPS == 0 && safe == INFINITY) FN(hold_gauge)(m);
    }
    *sweeps = m->max_sweeps;
    if (safe < INFINITY) memcpy(q, s->safe_q, U * sizeof(double));
    return last <= m->coarse ? CONVERGED : MAX_SWEEPS;
}

/* The averages, had every client's two factors one norm; 0 for a client without an update. */
INLINE void FN(balanced_start)(const struct module *m) {
    for (int64_t u = 0, x = 0; u < m->U; u++) {
        double square[2] = {0, 0};
        for (int64_t end = x + m->ranks[u]; x < end; x++)
            for (int side = 0; side < 2; side++) square[side] += m->G[side][x * m->R + x];
        double ratio = square[0] > 0 && square[1] > 0 ? sqrt(sqrt(square[1] / square[0])) : 0;
        m->p[0][u] *= ratio, m->p[1][u] *= ratio > 0 ? 1 / ratio : 0;
    }
}

/* p and q from the weights on, with the squared errors before and after; DOUBTFUL where Grams do not tell. */
static void FN(fit)(const struct module *m, double *work) {
    struct space s = carve(work, m->U, m->R, m->rank);
    int64_t R = m->R, sweeps = 0, status = CONVERGED;
    double energy = 0, mass = 0, norms[2];
    for (int64_t x = 0; x < R; x++)
        mass += m->weights[m->member[x]] * sqrt(m->G[0][x * R + x]) * sqrt(m->G[1][x * R + x]);
    for (int side = 0; side < 2; side++) memcpy(m->p[side], m->weights, m->U * sizeof(double));
    FN(inner_products)(m, &s);
    for (int64_t u = 0; u < m->U; u++) energy += m->weights[u] * s.E[u * m->U + u];
    m->found[STATUS] = DOUBTFUL;
    if (!(energy >= m->doubt * mass * mass) || !(energy > 0)) return;
    double error = m->found[ERROR_START] = FN(error_of)(m, &s, energy, mass, norms);
    if (m->fit) {
        /* averages worse than nothing: clients split their updates unevenly over B and A */
        if (error > energy) FN(balanced_start)(m);
        if ((status = FN(minimise)(m, &s, energy, &sweeps)) == DOUBTFUL) return;
        error = FN(error_of)(m, &s, energy, mass, norms);
        /* norms of B and A within a factor of two: a power of two costs no rounding */
        double ratio = norms[0] > 0 && norms[1] > 0 ? exp2(nearbyint(log2(norms[1] / norms[0]) / 2)) : 1;
        for (int64_t u = 0; u < m->U; u++) m->p[0][u] *= ratio, m->p[1][u] /= ratio;
        norms[0] *= ratio, norms[1] /= ratio;
    }
    if (!(error > 0) || !(error < INFINITY)) return;
    if (!(error <= (1 + SLACK) * m->found[ERROR_START])) return; /* above the averages, or these are not resolved */
    m->found[STATUS] = status, m->found[SWEEPS] = sweeps, m->found[ENERGY] = energy, m->found[ERROR] = error;
    m->found[NORM_B] = norms[0], m->found[NORM_A] = norms[1];
}
