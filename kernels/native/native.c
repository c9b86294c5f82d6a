/* The CPU path of the operations on gradients and factors: tensors read where they lie, widened block by block into a
 * buffer that fits the cache, multiplied there. Plain C, called through ctypes; threads are the caller's: every entry
 * point works on a range of columns and writes nothing shared, so results do not depend on how ranges are spread. */

#include <stdint.h>
#include <string.h>

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wunused-function" /* every loop exists in both number types; not all are called */
#endif

enum { F64, F32, BF16, F16 };
/* Columns of a block of gradients; rows lie PAD numbers further apart, so that they do not share cache sets. */
enum { BLOCK = 512, PAD = 16 };
/* Up to this many rows the sums of a Gram matrix are kept lane by lane: they fit the cache beside a block. */
enum { KEPT_ROWS = 64 };

/* K gradients as P tensors each: parameter p holds columns [start[p], start[p + 1]); address is (P x K). */
struct table {
    const int64_t *address, *start, *type;
    int64_t parameters;
};

/* One client's factor: element (row i, column c) lies at i * across + c * along. */
struct member {
    int64_t address, rank, type, along, across;
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

static inline int64_t least3(int64_t a, int64_t b, int64_t c) {
    a = a < b ? a : b;
    return a < c ? a : c;
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

#define JOIN_(a, b, c) a##_##b##_##c
#define JOIN(a, b, c) JOIN_(a, b, c)
#define FN(name) JOIN(name, TYPE, ISA)

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MANY 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,f16c,prefer-vector-width=512")
#define ISA avx512
#define BYTES 64
#include "types.h"
#undef ISA
#undef BYTES
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define ISA avx2
#define BYTES 32
#include "types.h"
#undef ISA
#undef BYTES
#pragma GCC pop_options
#endif
#define ISA plain
#define BYTES 16
#include "types.h"
#undef ISA
#undef BYTES

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

/* `level` is at most fedgram_level(); lower ones are for tests. `wide`: double, else float. */

/* Changed with every change of an entry point: Python refuses an extension that was built from other sources. */
int64_t fedgram_abi(void) { return 2; }
/* Numbers of scratch space that fedgram_grad_gram takes. */
int64_t fedgram_grad_gram_work(int64_t K) {
    int64_t rows = (K + 3) / 4 * 4, tiles = rows <= KEPT_ROWS ? rows / 4 * (rows / 4 + 1) / 2 : 0;
    return (rows + 1) * (BLOCK + PAD) + tiles * 16 * 16; /* 16 lanes at most */
}
int64_t fedgram_block(void) { return BLOCK; }
int64_t fedgram_pad(void) { return PAD; }

void fedgram_grad_gram(int64_t level, int64_t wide, const int64_t *address, const int64_t *start, const int64_t *type,
                       int64_t parameters, int64_t K, const double *u, int64_t first, int64_t last, double *work,
                       double *out, double *h, double *n0) {
    struct table t = {address, start, type, parameters};
    if (wide) CALL(grad_gram, double, &t, K, u, first, last, work, out, h, n0);
    else CALL(grad_gram, float, &t, K, u, first, last, work, out, h, n0);
}

void fedgram_grad_combine(int64_t level, int64_t wide, const int64_t *address, const int64_t *start,
                          const int64_t *type, int64_t parameters, int64_t K, const double *v, const int64_t *to,
                          const int64_t *to_type, int64_t first, int64_t last, double *work) {
    struct table t = {address, start, type, parameters};
    if (wide) CALL(grad_combine, double, &t, K, v, to, to_type, first, last, work);
    else CALL(grad_combine, float, &t, K, v, to, to_type, first, last, work);
}

void fedgram_factor_products(int64_t level, const struct member *m, int64_t count, int64_t R,
                             const struct member *other, int64_t k, int64_t first, int64_t last, int64_t block,
                             double *work, double *out) {
    CALL(factor_products, double, m, count, R, other, k, first, last, block, work, out);
}

/* out (R x k) = the sum of `count` parts (padded, rows x columns each), in order; mirrored if only one triangle is there. */
void fedgram_collect(const double *parts, int64_t count, int64_t rows, int64_t columns, int64_t R, int64_t k,
                     int64_t mirror, double *out) {
    for (int64_t i = 0; i < R; i++)
        for (int64_t j = mirror ? i : 0; j < k; j++) {
            double sum = 0;
            for (int64_t p = 0; p < count; p++) sum += parts[(p * rows + i) * columns + j];
            out[i * k + j] = sum;
            if (mirror) out[j * k + i] = sum;
        }
}

void fedgram_factor_combine(int64_t level, const struct member *m, int64_t count, int64_t R, const double *P,
                            int64_t columns, const struct member *to, int64_t first, int64_t last, int64_t block,
                            double *work) {
    CALL(factor_combine, double, m, count, R, P, columns, to, first, last, block, work);
}
