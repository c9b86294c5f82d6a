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
/* A vector stays in a register: compilers would load it again for every product, and loads are what limits them then. */
#if BYTES >= 32
#define KEEP(x) __asm__("" : "+v"(x))
#else
#define KEEP(x) (void)(x)
#endif
#define QUAD FN(quad)
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (FN(index)){__VA_ARGS__})
#endif

/* LANES values of a stored type at p as T, and four of them. Spelt out for AVX, where compilers convert by halves. */
#if BYTES == 64
#define SINGLES_BF16(p) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(p))), 16))
#define SINGLES_F16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(p)))
#endif
#if BYTES >= 32
#define HALF_BF16(p) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)(p))), 16))
#define HALF_F16(p) _mm256_cvtph_ps(_mm_loadu_si128((const void *)(p)))
#define FOUR_BF16(p) _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const void *)(p))), 16))
#define FOUR_F16(p) _mm_cvtph_ps(_mm_loadl_epi64((const void *)(p)))
#endif
#if BYTES == 64 && DOUBLE
#define LOAD_F64(p) ((VEC)_mm512_loadu_pd(p))
#define LOAD_F32(p) ((VEC)_mm512_cvtps_pd(_mm256_loadu_ps(p)))
#define LOAD_BF16(p) ((VEC)_mm512_cvtps_pd(HALF_BF16(p)))
#define LOAD_F16(p) ((VEC)_mm512_cvtps_pd(HALF_F16(p)))
#elif BYTES == 64
#define LOAD_F64(p) __builtin_convertvector(*(const FN(wide) *)(p), VEC)
#define LOAD_F32(p) ((VEC)_mm512_loadu_ps(p))
#define LOAD_BF16(p) ((VEC)SINGLES_BF16(p))
#define LOAD_F16(p) ((VEC)SINGLES_F16(p))
#elif BYTES == 32 && DOUBLE
#define LOAD_F64(p) ((VEC)_mm256_loadu_pd(p))
#define LOAD_F32(p) ((VEC)_mm256_cvtps_pd(_mm_loadu_ps(p)))
#define LOAD_BF16(p) ((VEC)_mm256_cvtps_pd(FOUR_BF16(p)))
#define LOAD_F16(p) ((VEC)_mm256_cvtps_pd(FOUR_F16(p)))
#elif BYTES == 32
#define LOAD_F64(p) __builtin_convertvector(*(const FN(wide) *)(p), VEC)
#define LOAD_F32(p) ((VEC)_mm256_loadu_ps(p))
#define LOAD_BF16(p) ((VEC)HALF_BF16(p))
#define LOAD_F16(p) ((VEC)HALF_F16(p))
#else
#define LOAD_F64(p) __builtin_convertvector(*(const FN(wide) *)(p), VEC)
#define LOAD_F32(p) __builtin_convertvector(*(const FN(single) *)(p), VEC)
#define LOAD_BF16(p) __builtin_convertvector((FN(single))(__builtin_convertvector(*(const FN(short) *)(p), FN(bits)) << 16), VEC)
#define LOAD_F16(p) FN(load_f16)(p)
static inline VEC FN(load_f16)(const uint16_t *p) {
    VEC x;
    for (int i = 0; i < LANES; i++) x[i] = (T)from_f16(p[i]);
    return x;
}
#endif
/* *(double *)sum += x, lane by lane: LANES of them. */
#if BYTES == 64 && !DOUBLE
#define ADD_WIDE(sum, x)                                                                                               \
    do {                                                                                                               \
        double *at_ = (double *)(sum);                                                                                 \
        __m512 x_ = (__m512)(x);                                                                                       \
        __m256 low_ = _mm512_castps512_ps256(x_), high_ = _mm512_extractf32x8_ps(x_, 1);                               \
        _mm512_storeu_pd(at_, _mm512_add_pd(_mm512_loadu_pd(at_), _mm512_cvtps_pd(low_)));                             \
        _mm512_storeu_pd(at_ + 8, _mm512_add_pd(_mm512_loadu_pd(at_ + 8), _mm512_cvtps_pd(high_)));                    \
    } while (0)
#elif BYTES == 32 && !DOUBLE
#define ADD_WIDE(sum, x)                                                                                               \
    do {                                                                                                               \
        double *at_ = (double *)(sum);                                                                                 \
        __m256 x_ = (__m256)(x);                                                                                       \
        __m128 low_ = _mm256_castps256_ps128(x_), high_ = _mm256_extractf128_ps(x_, 1);                                \
        _mm256_storeu_pd(at_, _mm256_add_pd(_mm256_loadu_pd(at_), _mm256_cvtps_pd(low_)));                             \
        _mm256_storeu_pd(at_ + 4, _mm256_add_pd(_mm256_loadu_pd(at_ + 4), _mm256_cvtps_pd(high_)));                    \
    } while (0)
#else
#define ADD_WIDE(sum, x) *(FN(wide) *)(sum) += __builtin_convertvector(x, FN(wide))
#endif
#if BYTES >= 32 && DOUBLE
#define QUAD_F64(p) ((QUAD)_mm256_loadu_pd(p))
#define QUAD_F32(p) ((QUAD)_mm256_cvtps_pd(_mm_loadu_ps(p)))
#define QUAD_BF16(p) ((QUAD)_mm256_cvtps_pd(FOUR_BF16(p)))
#define QUAD_F16(p) ((QUAD)_mm256_cvtps_pd(FOUR_F16(p)))
#elif BYTES >= 32
#define QUAD_F64(p) ((QUAD)_mm256_cvtpd_ps(_mm256_loadu_pd(p)))
#define QUAD_F32(p) ((QUAD)_mm_loadu_ps(p))
#define QUAD_BF16(p) ((QUAD)FOUR_BF16(p))
#define QUAD_F16(p) ((QUAD)FOUR_F16(p))
#else
#define QUAD_F64(p) __builtin_convertvector(*(const double4 *)(p), QUAD)
#define QUAD_F32(p) __builtin_convertvector(*(const float4 *)(p), QUAD)
#define QUAD_BF16(p) __builtin_convertvector((float4)(__builtin_convertvector(*(const short4 *)(p), bits4) << 16), QUAD)
#define QUAD_F16(p) ((QUAD){(T)from_f16((p)[0]), (T)from_f16((p)[1]), (T)from_f16((p)[2]), (T)from_f16((p)[3])})
#endif

/* Widen n values of type `code` that lie `step` elements apart. */
static inline __attribute__((always_inline)) void FN(widen)(T *restrict to, const void *from, int code, int64_t at,
                                                            int64_t step, int64_t n) {
    int64_t i = 0;
#define COPY(S, LOAD, EXPRESSION)                                                                                      \
    {                                                                                                                  \
        const S *s = (const S *)from + at;                                                                             \
        if (step == 1)                                                                                                 \
            for (; i + LANES <= n; i += LANES) *(VEC *)(to + i) = LOAD(s + i);                                         \
        for (; i < n; i++) { S x = s[i * step]; to[i] = (T)(EXPRESSION); }                                             \
        break;                                                                                                         \
    }
    switch (code) {
    case F64: COPY(double, LOAD_F64, x)
    case F32: COPY(float, LOAD_F32, x)
    case BF16: COPY(uint16_t, LOAD_BF16, from_bf16(x))
    case F16: COPY(uint16_t, LOAD_F16, from_f16(x))
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
