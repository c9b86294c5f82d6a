/* FLoRA-NA's scalars from Gram matrices: alternating exact least squares for p and q of one module after the other
 * (fedgram.flora_na.scalar says what it minimises). Everything is small and float64; what float64 does not resolve
 * beyond doubt is left to the caller. Plain C, called through ctypes; threads share the modules. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define CLONES __attribute__((target_clones("arch=haswell", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

typedef double four __attribute__((vector_size(32), aligned(8), may_alias));

enum { CONVERGED, MAX_SWEEPS, DOUBTFUL };
enum { GAUGE_SWEEPS = 4 };

/* One module of U clients whose stacked factors have R rows. G[0] = Bs^T Bs and G[1] = As As^T (R x R), `member` and
 * `slot` (R) say whose row it is and which of his, D (R) is its client's weight. */
struct module {
    const double *G[2], *weights;
    const int64_t *ranks, *member, *slot;
    int64_t U, R, rank, fit, max_sweeps;
    double tolerance, safe_pivot, doubt;
    double *p[2];  /* (U) each: p, q */
    double *found; /* what `enum figure` names */
};

enum figure { STATUS, SWEEPS, ENERGY, ERROR, ERROR_START, NORM_B, NORM_A, FIGURES };

struct space {
    double *X, *T, *S, *H, *h, *scale, *step, *other_S;
};

static int64_t space_numbers(int64_t U, int64_t R, int64_t rank) {
    return 2 * R * (rank + 4) + 2 * (rank + 4) * (rank + 4) + 2 * U * U + 4 * U;
}

static struct space carve(double *work, int64_t U, int64_t R, int64_t rank) {
    struct space s;
    s.X = work, work += R * (rank + 4);
    s.T = work, work += R * (rank + 4);
    s.S = work, work += (rank + 4) * (rank + 4);
    s.other_S = work, work += (rank + 4) * (rank + 4);
    s.H = work, work += 2 * U * U;
    s.h = work, work += U;
    s.scale = work, work += U;
    s.step = work, work += U;
    return s;
}

INLINE double dot(const double *x, const double *y, int64_t n) {
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

INLINE void axpy(double a, const double *x, double *y, int64_t n) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) *(four *)(y + i) += a * *(const four *)(x + i);
    for (; i < n; i++) y[i] += a * x[i];
}

/* X (R x rank) = G times the combination of the members by q, and S = its Gram (rank x rank). */
INLINE void combine(const struct module *m, const double *G, const double *q, double *X, double *S) {
    int64_t r = m->rank;
    memset(X, 0, m->R * r * sizeof(double));
    memset(S, 0, r * r * sizeof(double));
    for (int64_t x = 0; x < m->R; x++) {
        const double *g = G + x * m->R;
        for (int64_t k = 0; k < m->U; g += m->ranks[k], k++) axpy(q[k], g, X + x * r, m->ranks[k]);
        axpy(q[m->member[x]], X + x * r, S + m->slot[x] * r, r);
    }
}

/* The normal equations H p = h of one side, whose other side's combination is X with Gram S. */
INLINE void equations(const struct module *m, const double *G, const struct space *s) {
    int64_t r = m->rank, R = m->R, U = m->U;
    for (int64_t y = 0; y < R; y++)
        for (int64_t i = 0; i < r; i++) s->T[i * R + y] = m->weights[m->member[y]] * s->X[y * r + i];
    memset(s->H, 0, U * U * sizeof(double));
    memset(s->h, 0, U * sizeof(double));
    for (int64_t x = 0; x < R; x++) {
        const double *g = G + x * R, *row = s->S + m->slot[x] * r;
        double *H = s->H + m->member[x] * U;
        s->h[m->member[x]] += dot(g, s->T + m->slot[x] * R, R);
        for (int64_t k = 0; k < U; g += m->ranks[k], k++) H[k] += dot(g, row, m->ranks[k]);
    }
}

/* Solve H step = h - H p by Cholesky on the unit-diagonal matrix; 0 where a pivot is near rounding. */
INLINE int solve(const struct module *m, const struct space *s, const double *p, double *gain) {
    int64_t U = m->U;
    double *L = s->H + U * U;
    for (int64_t i = 0; i < U; i++) {
        if (!(s->H[i * U + i] > 0)) return 0;
        s->scale[i] = 1 / sqrt(s->H[i * U + i]);
    }
    for (int64_t i = 0; i < U; i++)
        for (int64_t j = 0; j <= i; j++) {
            double sum = s->H[i * U + j] * s->scale[i] * s->scale[j] - dot(L + i * U, L + j * U, j);
            if (i > j) L[i * U + j] = sum / L[j * U + j];
            else {
                if (!(sum > m->safe_pivot * m->safe_pivot)) return 0;
                L[i * U + i] = sqrt(sum);
            }
        }
    *gain = 0;
    for (int64_t i = 0; i < U; i++) {
        double rest = s->h[i] - dot(s->H + i * U, p, U);
        s->step[i] = (rest * s->scale[i] - dot(L + i * U, s->step, i)) / L[i * U + i];
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
INLINE double error_of(const struct module *m, const struct space *s, double energy, double mass, double norms[2]) {
    int64_t r = m->rank, R = m->R;
    double inner = 0, square, pair = 0;
    combine(m, m->G[0], m->p[0], s->X, s->other_S);
    combine(m, m->G[1], m->p[1], s->T, s->S);
    for (int64_t x = 0; x < R; x++) inner += m->weights[m->member[x]] * dot(s->X + x * r, s->T + x * r, r);
    square = dot(s->S, s->other_S, r * r);
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
INLINE void hold_gauge(const struct module *m) {
    double largest[2] = {1e-300, 1e-300};
    for (int side = 0; side < 2; side++)
        for (int64_t u = 0; u < m->U; u++) largest[side] = fmax(largest[side], fabs(m->p[side][u]));
    double c = exp2(nearbyint((log2(largest[1]) - log2(largest[0])) / 2));
    for (int64_t u = 0; u < m->U; u++) m->p[0][u] *= c, m->p[1][u] /= c;
}

/* Alternate until a sweep gains less than `tolerance` of what is left, or all to come would. */
INLINE int64_t alternate(const struct module *m, const struct space *s, double energy, int64_t *sweeps) {
    double before = 0;
    for (*sweeps = 1; *sweeps <= m->max_sweeps; ++*sweeps) {
        double gain = 0, captured = 0, part;
        for (int side = 0; side < 2; side++) {
            combine(m, m->G[!side], m->p[!side], s->X, s->S);
            equations(m, m->G[side], s);
            if (!solve(m, s, m->p[side], &part)) return DOUBTFUL;
            gain += part, captured = 0;
            for (int64_t u = 0; u < m->U; u++) captured += s->h[u] * (m->p[side][u] += s->step[u]);
        }
        double left = fmax(energy - captured, 1e-13 * energy), rest = gain * gain / fmax(before - gain, 1e-300);
        if (gain <= m->tolerance * left || rest <= 0.1 * m->tolerance * left) return CONVERGED;
        before = gain;
        if (*sweeps % GAUGE_SWEEPS == 0) hold_gauge(m);
    }
    *sweeps = m->max_sweeps;
    return MAX_SWEEPS;
}

/* p and q from the weights on, with the squared errors before and after; DOUBTFUL where Grams do not tell. */
CLONES static void fit(const struct module *m, double *work) {
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
    double error = m->found[ERROR_START] = error_of(m, &s, energy, mass, norms);
    if (m->fit) {
        if ((status = alternate(m, &s, energy, &sweeps)) == DOUBTFUL) return;
        error = error_of(m, &s, energy, mass, norms);
        double ratio = norms[0] > 0 && norms[1] > 0 ? sqrt(norms[1] / norms[0]) : 1; /* equal norms of B and A */
        for (int64_t u = 0; u < m->U; u++) m->p[0][u] *= ratio, m->p[1][u] /= ratio;
        norms[0] *= ratio, norms[1] /= ratio;
    }
    if (!(error > 0) || !(error < INFINITY)) return;
    m->found[STATUS] = status, m->found[SWEEPS] = sweeps, m->found[ENERGY] = energy, m->found[ERROR] = error;
    m->found[NORM_B] = norms[0], m->found[NORM_A] = norms[1];
}

/* Changed with every change of an entry point: Python refuses an extension that was built from other sources. */
int64_t fedgram_abi(void) { return 1; }
int64_t fedgram_figures(void) { return FIGURES; }
int64_t fedgram_scalars_work(int64_t U, int64_t R, int64_t rank) { return space_numbers(U, R, rank); }

void fedgram_scalars(const struct module *modules, int64_t count, int64_t *next, double *work) {
    for (int64_t i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); i < count;
         i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED))
        fit(modules + i, work);
}
