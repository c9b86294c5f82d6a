/* Numbers of the stored types to and from T, on vectors of LANES numbers and on quads of four. Included by types.h once
 * per number type and instruction set; FN(name) gives each copy a name of its own. */

typedef T FN(vec) __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias));
typedef double FN(wide) __attribute__((vector_size(LANES * 8), aligned(8), may_alias));
typedef float FN(single) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t FN(short) __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint32_t FN(bits) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef T FN(quad) __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
typedef INDEX FN(index) __attribute__((vector_size(4 * sizeof(T))));
#define VEC FN(vec)
#define QUAD FN(quad)
/* LANES values at p as T. */
#define LOAD_F64(p) __builtin_convertvector(*(const FN(wide) *)(p), VEC)
#define LOAD_F32(p) __builtin_convertvector(*(const FN(single) *)(p), VEC)
#define LOAD_BF16(p) __builtin_convertvector((FN(single))(__builtin_convertvector(*(const FN(short) *)(p), FN(bits)) << 16), VEC)
/* Four values at p as T. */
#define QUAD_F64(p) __builtin_convertvector(*(const double4 *)(p), QUAD)
#define QUAD_F32(p) __builtin_convertvector(*(const float4 *)(p), QUAD)
#define QUAD_BF16(p) __builtin_convertvector((float4)(__builtin_convertvector(*(const short4 *)(p), bits4) << 16), QUAD)
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (FN(index)){__VA_ARGS__})
#endif
#define QUAD_F16(p) ((QUAD){(T)from_f16((p)[0]), (T)from_f16((p)[1]), (T)from_f16((p)[2]), (T)from_f16((p)[3])})

/* Widen n values of type `code` that lie `step` elements apart. */
static inline __attribute__((always_inline)) void FN(widen)(T *restrict to, const void *from, int code, int64_t at,
                                                            int64_t step, int64_t n) {
#define COPY(S, EXPRESSION)                                                                                            \
    {                                                                                                                  \
        const S *s = (const S *)from + at;                                                                             \
        if (step == 1)                                                                                                 \
            for (int64_t i = 0; i < n; i++) { S x = s[i]; to[i] = (T)(EXPRESSION); }                                   \
        else                                                                                                           \
            for (int64_t i = 0; i < n; i++) { S x = s[i * step]; to[i] = (T)(EXPRESSION); }                            \
        break;                                                                                                         \
    }
    switch (code) {
    case F64: COPY(double, x)
    case F32: COPY(float, x)
    case BF16: COPY(uint16_t, from_bf16(x))
    case F16: COPY(uint16_t, from_f16(x))
    }
#undef COPY
}

/* Round n numbers to type `code`, `step` elements apart. */
static inline __attribute__((always_inline)) void FN(narrow)(void *to, int code, int64_t at, int64_t step, int64_t n,
                                                             const T *restrict from) {
#define COPY(S, EXPRESSION)                                                                                            \
    {                                                                                                                  \
        S *s = (S *)to + at;                                                                                           \
        if (step == 1)                                                                                                 \
            for (int64_t i = 0; i < n; i++) { T x = from[i]; s[i] = (S)(EXPRESSION); }                                 \
        else                                                                                                           \
            for (int64_t i = 0; i < n; i++) { T x = from[i]; s[i * step] = (S)(EXPRESSION); }                          \
        break;                                                                                                         \
    }
    switch (code) {
    case F64: COPY(double, x)
    case F32: COPY(float, x)
    case BF16: COPY(uint16_t, to_bf16((float)x))
    case F16: COPY(uint16_t, to_f16((float)x))
    }
#undef COPY
}
