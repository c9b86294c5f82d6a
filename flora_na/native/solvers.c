/* Estimates from Gram matrices, one module after the other: the scalars of FLoRA-NA (scalars.h), the blocks of
 * alternating least squares (blocks.h), the singular values and the optimum (spectrum.h). Everything is small and
 * float64; what float64 does not resolve beyond doubt is left to the caller. Plain C, called through ctypes; threads share the modules. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../../kernels/native/jobs.h"

#define INLINE static inline __attribute__((always_inline))

typedef double four __attribute__((vector_size(32), aligned(8), may_alias));
typedef int64_t whole __attribute__((vector_size(32), aligned(8), may_alias));

enum { CONVERGED, MAX_SWEEPS, DOUBTFUL };
enum { GAUGE_SWEEPS = 4 };
#define LEAST_DAMPING 0.03125
#define LEAST_RATE 1e-4 /* at which sweeps are trusted to converge */
#define SLACK 1e-9      /* of two squared errors: rounding may make them differ by this part */

/* One module of U clients whose stacked factors have R rows. G[0] = Bs^T Bs and G[1] = As As^T (R x R), `member` and
 * `slot` (R) say whose row it is and which of his, D (R) is its client's weight. */
struct module {
    const double *G[2], *weights;
    const int64_t *ranks, *member, *slot;
    int64_t U, R, rank, fit, max_sweeps;
    double tolerance, coarse, safe_pivot, doubt;
    double *p[2];  /* (U) each: p, q */
    double *found; /* what `enum scalar_figure` names */
};

enum scalar_figure { STATUS, SWEEPS, ENERGY, ERROR, ERROR_START, NORM_B, NORM_A, FIGURES };

/* Work space: X and S of either side's combination, L and scale of its normal equations H step = rest, what the second
 * derivatives need, and an estimate to go back to. */
struct space {
    double *X[2], *S[2], *L[2], *scale[2], *E, *C, *W, *K, *H, *Z, *h, *rest, *step, *safe_q;
};

static int64_t space_numbers(int64_t U, int64_t R, int64_t rank) {
    return 2 * (R * rank + rank * rank + U * U + U) + 5 * U * U + (U * rank * rank + R) + 4 * U;
}

static double *take_numbers(double **work, int64_t count) {
    double *taken = *work;
    *work += count;
    return taken;
}

static struct space carve(double *work, int64_t U, int64_t R, int64_t rank) {
    struct space s;
    for (int side = 0; side < 2; side++) {
        s.X[side] = take_numbers(&work, R * rank);
        s.S[side] = take_numbers(&work, rank * rank);
        s.L[side] = take_numbers(&work, U * U);
        s.scale[side] = take_numbers(&work, U);
    }
    double **square[] = {&s.E, &s.C, &s.W, &s.K, &s.H}, **line[] = {&s.h, &s.rest, &s.step, &s.safe_q};
    for (int i = 0; i < 5; i++) *square[i] = take_numbers(&work, U * U);
    for (int i = 0; i < 4; i++) *line[i] = take_numbers(&work, U);
    s.Z = take_numbers(&work, U * rank * rank + R);
    return s;
}

/* Of a product: nothing is known; the right factor is a lower triangle; the left one is an upper triangle, and what lies
 * above the diagonal of a symmetric product is not asked for. */
enum { WHOLE, LOWER_RIGHT, UPPER_LEFT };
enum { JACOBI_ROUNDS = 30 };
#define LEAST_SQUARE 1e-20 /* a squared singular value below this part of the largest is as good as none */

/* One module whose stacked factors have R rows: G and their weights D (R) as above, coefficients of rows of A to start
 * from (R x rank), and room for those found. */
struct blocks {
    const double *G[2], *D, *start;
    int64_t R, rank, max_sweeps;
    double tolerance, safe_pivot, cancelled, doubt;
    double *P, *Q;
    double *found; /* STATUS, SWEEPS, and what `enum block_figure` names */
};

/* One module again: where its `count` largest squared singular values go, descending, coefficients (R x rank, rank at
 * most count) of the rows of A of the best pair of that rank, and what is found: STATUS, and the sum of the other values. */
struct spectrum {
    const double *G[2], *D;
    int64_t R, count, rank;
    double safe_pivot;
    double *values, *rows, *found;
};

enum spectrum_figure { TAIL = 1, SPECTRUM_FIGURES };
enum { BISECTIONS = 64, INVERSE_ROUNDS = 3 };
#define ROUNDING 1.1102230246251565e-16
#define LEAST_BESIDE 1e-280 /* of the squares beside the diagonal: as good as none */

/* A tridiagonal matrix eliminated with row exchanges: the three diagonals that are left, and how. */
struct elimination {
    double *diagonal, *above, *second, *factor, *exchanged;
};

enum block_figure { BLOCK_ENERGY = 2, BLOCK_ERROR, BLOCK_NORM_B, BLOCK_NORM_A, BLOCK_FIGURES };

struct room {
    double *P, *Q, *C, *other, *S, *T, *H, *L, *norms[2], *bound, *scale;
};

INLINE int64_t padded(int64_t rank) { return (rank + 3) / 4 * 4; }

static int64_t room_numbers(int64_t R, int64_t rank) {
    int64_t width = padded(rank);
    return 4 * R * width + 2 * rank * width + 2 * rank * rank + 2 * R + 2 * width;
}

static struct room furnish(double *work, int64_t R, int64_t rank) {
    struct room s;
    int64_t width = padded(rank);
    double **tall[] = {&s.P, &s.Q, &s.C, &s.other}, **wide[] = {&s.S, &s.T}, **square[] = {&s.H, &s.L};
    for (int i = 0; i < 4; i++) *tall[i] = take_numbers(&work, R * width);
    for (int i = 0; i < 2; i++) {
        *wide[i] = take_numbers(&work, rank * width);
        *square[i] = take_numbers(&work, rank * rank);
        s.norms[i] = take_numbers(&work, R);
    }
    s.bound = take_numbers(&work, width);
    s.scale = take_numbers(&work, width);
    return s;
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MANY 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define FN(name) name##_avx2
#include "scalars.h"
#include "blocks.h"
#include "spectrum.h"
#undef FN
#pragma GCC pop_options
#endif
#define FN(name) name##_plain
#include "scalars.h"
#include "blocks.h"
#include "spectrum.h"
#undef FN

#ifdef MANY
#define FASTEST(name) \
    (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? name##_avx2 : name##_plain)
#else
#define FASTEST(name) name##_plain
#endif

/* Changed with every change of an entry point: Python refuses an extension that was built from other sources. */
int64_t fedgram_abi(void) { return 9; }
int64_t fedgram_scalar_figures(void) { return FIGURES; }
int64_t fedgram_block_figures(void) { return BLOCK_FIGURES; }
int64_t fedgram_spectrum_figures(void) { return SPECTRUM_FIGURES; }
int64_t fedgram_blocks_work(int64_t R, int64_t rank) { return room_numbers(R, rank); }
int64_t fedgram_spectrum_work(int64_t R) { return (R + 2 * padded(R) + 8) * padded(R) + 3 * R; }
int64_t fedgram_scalars_work(int64_t U, int64_t R, int64_t rank) { return space_numbers(U, R, rank); }

/* One instruction set, all in double. */
#define UNUSED (void)level, (void)wide

JOBS(scalars, module) {
    UNUSED;
    void (*solve)(const struct module *, double *) = FASTEST(fit);
    EACH solve(jobs + i, work);
}

JOBS(blocks, blocks) {
    UNUSED;
    void (*solve)(const struct blocks *, double *) = FASTEST(fit_blocks);
    EACH solve(jobs + i, work);
}

JOBS(spectrum, spectrum) {
    UNUSED;
    void (*solve)(const struct spectrum *, double *) = FASTEST(find_spectrum);
    EACH solve(jobs + i, work);
}
