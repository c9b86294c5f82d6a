/* The CPU path of the operations on gradients and factors: tensors read where they lie, widened block by block into a
 * buffer that fits the cache, multiplied there. Plain C, called through ctypes: every job is a range that the shapes
 * decide, and writes where no other does, so results do not depend on which thread takes it. */

#include <stdint.h>
#include <string.h>

#include "jobs.h"

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wunused-function" /* every loop exists in both number types; not all are called */
#endif

enum { F64, F32, BF16, F16 };
static const int64_t bytes_of[] = {8, 4, 2, 2};
/* Columns of a block of gradients at most; rows lie PAD numbers further apart, so that they do not share cache sets. */
enum { BLOCK = 512, PAD = 16 };
/* Columns of a sum of gradients that is kept in a near cache while they are added up: long runs are read faster. */
enum { MIX_BLOCK = 8192, MIX_TAIL = 64 };
/* Up to this many rows the sums of a Gram matrix of gradients are kept lane by lane: they fit the cache beside a block. */
enum { KEPT_ROWS = 66 };
/* Products that a lane of these sums adds up in float, a block of them at least. */
enum { CHAIN = 64 };
/* A block of centred gradients is to fit the first cache, unless it would be too short. */
enum { NEAR_BYTES = 10 << 10, SHORTEST = 128, LINE = 64 };

/* K gradients as P tensors each: parameter p holds columns [start[p], start[p + 1]); address is (P x K). */
struct table {
    const int64_t *address, *start, *type;
    int64_t parameters;
};

/* A matrix, of whose numbers (row i, column c) lies at i * along + c * across: a client's factor, whose columns are its
 * `rank`; of `struct sum` only W and `to` are the other way round. */
struct member {
    int64_t address, rank, type, along, across;
};

/* What a combination that was written, rounded, is to the product: it is X, and the last columns of E; nothing; or only
 * the last columns of E. */
enum { CROSSED, APART, BESIDE };

/* E^T X, or E^T E, over rows [first, last) of stacked factors with R (and k) columns, in blocks; out is rows x columns.
 * With `to`, E P is first written to it: P is (R x lines of `stride` numbers), or one number per member (whole vectors
 * of columns each) where `stride` is 0. */
struct product {
    const struct member *members;
    int64_t count, R;
    const struct member *other;
    int64_t k, first, last, block, rows, columns;
    const struct member *to;
    const double *P;
    int64_t stride, written;
    double *out;
};

/* The centred Gram matrix of columns [first, last), in as many rows and columns as gram_rows says. */
struct centred {
    struct table of;
    int64_t K;
    const double *u;
    int64_t first, last;
    double *out;
};

/* Columns [first, last) of sum_k v_k g_k. */
struct mixture {
    struct table of;
    int64_t K;
    const double *v;
    const int64_t *to, *to_type;
    int64_t first, last;
};

/* The tile at (row, column) of beta W + sum_u c_u B_u A_u (rows x columns); `along` runs over columns of W and `to`, which
 * `stream` says is too large to be of use in a cache. */
struct sum {
    const struct member *B, *A;
    int64_t count, R;
    const double *c;
    const struct member *W, *to;
    int64_t rows, columns, row, column;
    double beta;
    int64_t stream;
};
/* Its size, and the stacked ranks that are multiplied in one go: within them sums have the products' type. */
enum { SUM_ROWS = 96, SUM_COLUMNS = 256, RUN = 64 };

/* Rows [first, last) of S P for stacked factors with R columns; P is (R x columns). */
struct combination {
    const struct member *members;
    int64_t count, R;
    const double *P;
    int64_t columns;
    const struct member *to;
    int64_t first, last, block;
};

static inline float from_bf16(uint16_t x) {
    union { uint32_t i; float f; } u = {(uint32_t)x << 16};
    return u.f;
}

static inline uint16_t to_bf16(float x) {
    union { float f; uint32_t i; } u = {x};
    uint32_t rounded = (u.i + 0x7fff + ((u.i >> 16) & 1)) >> 16, quiet = (u.i >> 16) | 0x40;
    return (uint16_t)(x == x ? rounded : quiet);
}

static inline float from_f16(uint16_t x) {
    union { uint16_t i; _Float16 f; } u = {x};
    return (float)u.f;
}

static inline uint16_t to_f16(float x) {
    union { _Float16 f; uint16_t i; } u = {(_Float16)x};
    return u.i;
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t least3(int64_t a, int64_t b, int64_t c) { return least(least(a, b), c); }

/* Rows of a block of K gradients: their centre with them, in threes. */
static inline int64_t gram_rows(int64_t K) { return (K + 3) / 3 * 3; }
/* Tiles of three by three on and above the diagonal. */
static inline int64_t gram_tiles(int64_t rows) { return rows / 3 * (rows / 3 + 1) / 2; }
static inline int64_t gram_block(int64_t rows, int64_t bytes) {
    int64_t block = NEAR_BYTES / (rows * bytes) / 64 * 64;
    return block < SHORTEST ? SHORTEST : block > BLOCK ? BLOCK : block;
}

/* The parameter that holds a column. */
static inline int64_t find(const struct table *t, int64_t column) {
    int64_t low = 0, high = t->parameters;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (t->start[middle] <= column) low = middle;
        else high = middle;
    }
    return low;
}

/* The next block of K gradients, asked for line by line while one is multiplied: there are more gradients than streams
 * that a processor sees coming, and each would be waited for. */
struct coming {
    const int64_t *row, *end;
    int64_t at, lines, line, share;
};

static inline struct coming coming(const struct table *t, int64_t *p, int64_t K, int64_t first, int64_t n, int64_t steps) {
    while (first >= t->start[*p + 1]) ++*p;
    int64_t size = bytes_of[t->type[*p]], lines = least(n, t->start[*p + 1] - first) * size / LINE + 1;
    const int64_t *row = t->address + *p * K;
    return (struct coming){row, row + K, (first - t->start[*p]) * size, lines, 0, (K * lines + steps - 1) / steps};
}

static inline void ask(struct coming *c) {
    for (int64_t i = 0; i < c->share && c->row < c->end; i++) {
        __builtin_prefetch((const char *)*c->row + c->at + c->line * LINE);
        if (++c->line == c->lines) c->line = 0, c->row++;
    }
}

/* Four numbers of a type. */
typedef double double4 __attribute__((vector_size(32), aligned(8), may_alias));
typedef float float4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t bits4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint16_t short4 __attribute__((vector_size(8), aligned(2), may_alias));

#include "parts.h"

/* What was stored past the caches is there for other threads. */
static inline void stream_ends(void) {
#ifdef __x86_64__
    __asm__ volatile("sfence" ::: "memory");
#endif
}

#define JOIN_(a, b, c) a##_##b##_##c
#define JOIN(a, b, c) JOIN_(a, b, c)
#define FN(name) JOIN(name, TYPE, ISA)
#define WIDE_FN(name) JOIN(name, double, ISA)

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MANY 1
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,f16c,prefer-vector-width=512")
#define ISA avx512
#define BYTES 64
#define REGISTERS 32
#include "types.h"
#undef ISA
#undef BYTES
#undef REGISTERS
#pragma GCC pop_options
#if defined(__linux__) && __GNUC__ >= 12
#define TILES 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,f16c,amx-tile,amx-bf16,prefer-vector-width=512")
#include "tiles.h"
#pragma GCC pop_options
#endif
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define ISA avx2
#define BYTES 32
#define REGISTERS 16
#include "types.h"
#undef ISA
#undef BYTES
#undef REGISTERS
#pragma GCC pop_options
#endif
#define ISA plain
#define BYTES 16
#define REGISTERS 16
#include "types.h"
#undef ISA
#undef BYTES
#undef REGISTERS

/* 2: AVX-512, 1: AVX2, 0: neither. */
int64_t fedgram_level(void) {
#ifdef MANY
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#endif
    return 0;
}

#ifdef MANY
#define CALL(name, type, ...)                                                                                          \
    do {                                                                                                               \
        if (level >= 2) name##_##type##_avx512(__VA_ARGS__);                                                           \
        else if (level == 1) name##_##type##_avx2(__VA_ARGS__);                                                        \
        else name##_##type##_plain(__VA_ARGS__);                                                                       \
    } while (0)
#else
#define CALL(name, type, ...) name##_##type##_plain(__VA_ARGS__)
#endif

/* Changed with every change of an entry point: Python refuses an extension that was built from other sources. */
int64_t fedgram_abi(void) { return 15; }
/* Rows of the Gram matrix of K gradients, and numbers of scratch space that it takes. */
int64_t fedgram_gram_rows(int64_t K) { return gram_rows(K); }
int64_t fedgram_gram_work(int64_t K) {
    int64_t rows = gram_rows(K), tiles = rows <= KEPT_ROWS ? gram_tiles(rows) : 1;
    return rows * (BLOCK + PAD) + tiles * 9 * (16 + 8); /* 16 lanes at most in double, and vectors of 64 bytes */
}
int64_t fedgram_mix_work(void) { return MIX_BLOCK + MIX_TAIL; }
int64_t fedgram_block(void) { return BLOCK; }
int64_t fedgram_pad(void) { return PAD; }
/* Rows and columns of the tiles of a product: its output is padded to multiples of them. */
int64_t fedgram_tile_rows(int64_t level) { return level >= 2 ? 8 : 6; }
int64_t fedgram_tile_columns(int64_t level, int64_t wide) { return 2 * (16 << level) / (wide ? 8 : 4); }
/* Numbers of a part of a product. */
int64_t fedgram_part(int64_t level, int64_t rows, int64_t columns, int64_t triangle) {
    return part_numbers(rows, columns, triangle, fedgram_tile_rows(level), fedgram_tile_columns(level, 1) / 2);
}

JOBS(grad_gram, centred) {
    EACH {
        const struct centred *j = jobs + i;
        if (wide) CALL(grad_gram, double, &j->of, j->K, j->u, j->first, j->last, work, j->out);
        else CALL(grad_gram, float, &j->of, j->K, j->u, j->first, j->last, work, j->out);
    }
}

JOBS(grad_combine, mixture) {
    EACH {
        const struct mixture *j = jobs + i;
        if (wide) CALL(grad_combine, double, &j->of, j->K, j->v, j->to, j->to_type, j->first, j->last, work);
        else CALL(grad_combine, float, &j->of, j->K, j->v, j->to, j->to_type, j->first, j->last, work);
    }
}

JOBS(products, product) {
    EACH CALL(products, double, jobs + i, work);
}

JOBS(combine, combination) {
    EACH CALL(combine, double, jobs + i, work);
}

int64_t fedgram_sum_work(void) { return SUM_ROWS * SUM_COLUMNS + (SUM_ROWS + SUM_COLUMNS) * RUN; }
int64_t fedgram_sum_rows(void) { return SUM_ROWS; }
int64_t fedgram_sum_columns(void) { return SUM_COLUMNS; }

JOBS(lowrank_sum, sum) {
    EACH {
        if (wide) CALL(lowrank_sum, double, jobs + i, work);
        else CALL(lowrank_sum, float, jobs + i, work);
    }
    stream_ends();
}

/* The same on a matrix unit, where there is one that this process may use. */
#ifdef TILES
int64_t fedgram_has_tiles(void) { return fedgram_level() >= 2 && ask_for_tiles(); }
int64_t fedgram_panel(void) { return PANEL; }
int64_t fedgram_panel_group(void) { return GROUP; }
int64_t fedgram_panel_numbers(int64_t R, int64_t terms) { return panel_numbers(R, terms); }
int64_t fedgram_panel_work(void) { return GROUP * PANEL * DEEP / 2; }
int64_t fedgram_tile_work(void) {
    int64_t sums = PANEL * SUMS_APART * 3 / 2; /* in float, and of earlier runs in double */
    return sums > fedgram_sum_work() ? sums : fedgram_sum_work();
}
JOBS(panels, panels) {
    (void)level, (void)wide;
    EACH split_panels(jobs + i, (float *)work);
}
JOBS(tiles, tiles) {
    (void)level, (void)wide;
    multiply_all(jobs, count, next, work);
}
#else
struct nothing;
int64_t fedgram_has_tiles(void) { return 0; }
int64_t fedgram_panel(void) { return 0; }
int64_t fedgram_panel_group(void) { return 0; }
int64_t fedgram_panel_numbers(int64_t R, int64_t terms) { (void)R, (void)terms; return 0; }
int64_t fedgram_panel_work(void) { return 0; }
int64_t fedgram_tile_work(void) { return 0; }
JOBS(panels, nothing) { (void)level, (void)wide, (void)jobs, (void)count, (void)next, (void)work; }
JOBS(tiles, nothing) { (void)level, (void)wide, (void)jobs, (void)count, (void)next, (void)work; }
#endif

JOBS(collect, whole) {
    (void)wide, (void)work;
    int64_t deep = fedgram_tile_rows(level), lanes = fedgram_tile_columns(level, 1) / 2;
    EACH {
        const struct whole *w = jobs + i;
        int64_t numbers = fedgram_part(level, w->rows, w->columns, w->mirror), at = 0;
        for (int64_t r = 0; r < w->R; r++) {
            int64_t start = w->mirror ? first_kept(r / deep * deep, lanes) : 0;
            collect_row(w, r, start, at, numbers);
            at += w->columns - start;
        }
    }
}

#include "spread.h"
