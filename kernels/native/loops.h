/* The loops of one number type T on vectors of LANES numbers. Included by native.c once per type and instruction set;
 * FN(name) gives each copy a name of its own. */

typedef T FN(vec) __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias));
typedef double FN(wide) __attribute__((vector_size(LANES * 8), aligned(8), may_alias));
typedef float FN(single) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t FN(short) __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint32_t FN(bits) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
#define VEC FN(vec)
/* LANES values at p as T. */
#define LOAD_F64(p) __builtin_convertvector(*(const FN(wide) *)(p), VEC)
#define LOAD_F32(p) __builtin_convertvector(*(const FN(single) *)(p), VEC)
#define LOAD_BF16(p) __builtin_convertvector((FN(single))(__builtin_convertvector(*(const FN(short) *)(p), FN(bits)) << 16), VEC)

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

/* The sum of a vector's numbers, by halves. */
static inline __attribute__((always_inline)) T FN(sum)(VEC x) {
    T t[LANES];
    *(VEC *)t = x;
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int l = 0; l < half; l++) t[l] += t[l + half];
    return t[0];
}

/* out[i][j] += sum over n columns of a_i b_j, for four rows of each. */
static inline __attribute__((always_inline)) void FN(tile)(const T *restrict a, const T *restrict b, int64_t ld,
                                                           int64_t n, double *restrict out, int64_t ldo) {
    VEC c[4][4] = {{{0}}};
    for (int64_t k = 0; k < n; k += LANES) {
        VEC x0 = *(const VEC *)(a + k), x1 = *(const VEC *)(a + ld + k);
        VEC x2 = *(const VEC *)(a + 2 * ld + k), x3 = *(const VEC *)(a + 3 * ld + k);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            VEC y = *(const VEC *)(b + j * ld + k);
            c[0][j] += x0 * y;
            c[1][j] += x1 * y;
            c[2][j] += x2 * y;
            c[3][j] += x3 * y;
        }
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) out[i * ldo + j] += (double)FN(sum)(c[i][j]);
}

/* out[j] += <a, b_j> for four rows b_j. */
static inline __attribute__((always_inline)) void FN(dots)(const T *restrict a, const T *restrict b, int64_t ld,
                                                           int64_t n, double *restrict out) {
    VEC c[4] = {{0}};
    for (int64_t k = 0; k < n; k += LANES) {
        VEC x = *(const VEC *)(a + k);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) c[j] += x * *(const VEC *)(b + j * ld + k);
    }
    for (int j = 0; j < 4; j++) out[j] += (double)FN(sum)(c[j]);
}

/* out (rows x ldo) += E E^T, tiles on and above the diagonal; rows are a multiple of 4, n of LANES. */
static void FN(gram_block)(const T *E, int64_t rows, int64_t ld, int64_t n, double *out, int64_t ldo) {
    for (int64_t i = 0; i < rows; i += 4)
        for (int64_t j = i; j < rows; j += 4) FN(tile)(E + i * ld, E + j * ld, ld, n, out + i * ldo + j, ldo);
}

/* Columns [at, at + n) of parameter p: c = sum_k u_k g_k, and the K rows of E become g_k - c. */
static void FN(centred)(const struct table *t, int64_t p, int64_t K, const double *u, int64_t at, int64_t n, T *restrict E,
                        int64_t ld, T *restrict c) {
    const int64_t *row = t->address + p * K;
    int64_t i = 0;
#define CENTRE(S, LOAD)                                                                                                \
    for (; i + LANES <= n; i += LANES) {                                                                               \
        VEC sum = {0};                                                                                                 \
        for (int64_t k = 0; k < K; k++) sum += (T)u[k] * LOAD((const S *)row[k] + at + i);                             \
        *(VEC *)(c + i) = sum;                                                                                         \
        for (int64_t k = 0; k < K; k++) *(VEC *)(E + k * ld + i) = LOAD((const S *)row[k] + at + i) - sum;             \
    }                                                                                                                  \
    break;
    switch (t->type[p]) {
    case F64: CENTRE(double, LOAD_F64)
    case F32: CENTRE(float, LOAD_F32)
    case BF16: CENTRE(uint16_t, LOAD_BF16)
    }
#undef CENTRE
    if (i == n) return;
    for (int64_t k = 0; k < K; k++) FN(widen)(E + k * ld + i, (const void *)row[k], t->type[p], at + i, 1, n - i);
    for (; i < n; i++) {
        T sum = 0;
        for (int64_t k = 0; k < K; k++) sum += (T)u[k] * E[k * ld + i];
        c[i] = sum;
        for (int64_t k = 0; k < K; k++) E[k * ld + i] -= sum;
    }
}

/* As `tile`, with one sum per lane kept from block to block: their reduction would take as long as a short block. */
static inline __attribute__((always_inline)) void FN(lanes)(const T *restrict a, const T *restrict b, int64_t ld,
                                                            int64_t n, FN(wide) *restrict sums) {
    VEC c[4][4] = {{{0}}};
    for (int64_t k = 0; k < n; k += LANES) {
        VEC x0 = *(const VEC *)(a + k), x1 = *(const VEC *)(a + ld + k);
        VEC x2 = *(const VEC *)(a + 2 * ld + k), x3 = *(const VEC *)(a + 3 * ld + k);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            VEC y = *(const VEC *)(b + j * ld + k);
            c[0][j] += x0 * y;
            c[1][j] += x1 * y;
            c[2][j] += x2 * y;
            c[3][j] += x3 * y;
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sums[4 * i + j] += __builtin_convertvector(c[i][j], FN(wide));
}

/* Columns [first, last) of K gradients: out (rows x rows) += e_k e_l^T, h[k] += <c, e_k>, *n0 += <c, c>. */
static void FN(grad_gram)(const struct table *t, int64_t K, const double *u, int64_t first, int64_t last,
                          double *work, double *out, double *h, double *n0) {
    int64_t rows = (K + 3) / 4 * 4, ld = BLOCK + PAD, keep = rows <= KEPT_ROWS;
    T *E = (T *)work, *c = E + rows * ld;
    FN(wide) *sums = (FN(wide) *)(work + (rows + 1) * ld), *sum;
    memset(E + K * ld, 0, (rows - K) * ld * sizeof(T));
    if (keep) memset(sums, 0, rows / 4 * (rows / 4 + 1) / 2 * 16 * sizeof(FN(wide)));
    int64_t p = find(t, first);
    while (first < last) {
        int64_t used = 0;
        while (used < BLOCK && first < last) {
            while (first >= t->start[p + 1]) p++;
            int64_t n = least3(BLOCK - used, last - first, t->start[p + 1] - first);
            FN(centred)(t, p, K, u, first - t->start[p], n, E + used, ld, c + used);
            used += n;
            first += n;
        }
        int64_t padded = (used + LANES - 1) / LANES * LANES;
        for (int64_t k = 0; k < K && padded > used; k++) memset(E + k * ld + used, 0, (padded - used) * sizeof(T));
        for (; used < padded; used++) c[used] = 0;
        if (keep) {
            sum = sums;
            for (int64_t i = 0; i < rows; i += 4)
                for (int64_t j = i; j < rows; j += 4, sum += 16) FN(lanes)(E + i * ld, E + j * ld, ld, padded, sum);
        } else
            FN(gram_block)(E, rows, ld, padded, out, rows);
        for (int64_t k = 0; k < rows; k += 4) FN(dots)(c, E + k * ld, ld, padded, h + k);
        double square = 0;
        for (int64_t i = 0; i < padded; i++) square += (double)c[i] * (double)c[i];
        *n0 += square;
    }
    if (!keep) return;
    sum = sums;
    for (int64_t i = 0; i < rows; i += 4)
        for (int64_t j = i; j < rows; j += 4, sum += 16)
            for (int64_t l = 0; l < 16 * LANES; l++)
                out[(i + l / LANES / 4) * rows + j + l / LANES % 4] += ((double *)sum)[l];
}

/* Columns [first, last) of out = sum_k v_k g_k, rounded once; parameter p's output is to[p]. */
static void FN(grad_combine)(const struct table *t, int64_t K, const double *v, const int64_t *to,
                             const int64_t *to_type, int64_t first, int64_t last, double *work) {
    T *sum = (T *)work, *value = sum + BLOCK;
    for (int64_t p = find(t, first); first < last;) {
        while (first >= t->start[p + 1]) p++;
        int64_t n = least3(BLOCK, last - first, t->start[p + 1] - first), at = first - t->start[p], i = 0;
        const int64_t *row = t->address + p * K;
#define SUM(S, LOAD)                                                                                                   \
    for (; i + LANES <= n; i += LANES) {                                                                               \
        VEC x = {0};                                                                                                   \
        for (int64_t k = 0; k < K; k++) x += (T)v[k] * LOAD((const S *)row[k] + at + i);                               \
        *(VEC *)(sum + i) = x;                                                                                         \
    }                                                                                                                  \
    break;
        switch (t->type[p]) {
        case F64: SUM(double, LOAD_F64)
        case F32: SUM(float, LOAD_F32)
        case BF16: SUM(uint16_t, LOAD_BF16)
        }
#undef SUM
        if (i < n) memset(sum + i, 0, (n - i) * sizeof(T));
        for (int64_t k = 0; k < K && i < n; k++) {
            FN(widen)(value, (const void *)row[k], t->type[p], at + i, 1, n - i);
            for (int64_t j = i; j < n; j++) sum[j] += (T)v[k] * value[j - i];
        }
        FN(narrow)((void *)to[p], (int)to_type[p], at, 1, n, sum);
        first += n;
    }
}

/* Rows of E: columns [first, first + n) of the stacked members, each member's rows one after the other. */
static void FN(pack)(T *E, int64_t ld, const struct member *m, int64_t count, int64_t first, int64_t n) {
    for (int64_t u = 0; u < count; u++)
        for (int64_t i = 0; i < m[u].rank; i++, E += ld)
            FN(widen)(E, (const void *)m[u].address, m[u].type, first * m[u].along + i * m[u].across, m[u].along, n);
}

static void FN(zero_tail)(T *E, int64_t rows, int64_t ld, int64_t used, int64_t padded) {
    for (int64_t i = 0; i < rows && padded > used; i++) memset(E + i * ld + used, 0, (padded - used) * sizeof(T));
}

/* out (rows x columns, both padded to multiples of 4) += E X^T over columns [first, last); X is E where `other` is 0. */
static void FN(factor_products)(const struct member *m, int64_t count, int64_t R, const struct member *other, int64_t k,
                                int64_t first, int64_t last, int64_t block, double *work, double *out) {
    int64_t rows = (R + 3) / 4 * 4, columns = other ? (k + 3) / 4 * 4 : rows, ld = block + PAD;
    T *E = (T *)work, *X = E + rows * ld;
    memset(E + R * ld, 0, (rows - R) * ld * sizeof(T));
    if (other) memset(X + k * ld, 0, (columns - k) * ld * sizeof(T));
    for (; first < last; first += block) {
        int64_t n = last - first < block ? last - first : block, padded = (n + LANES - 1) / LANES * LANES;
        FN(pack)(E, ld, m, count, first, n);
        FN(zero_tail)(E, R, ld, n, padded);
        if (!other) {
            FN(gram_block)(E, rows, ld, padded, out, rows);
            continue;
        }
        FN(pack)(X, ld, other, 1, first, n);
        FN(zero_tail)(X, k, ld, n, padded);
        for (int64_t i = 0; i < rows; i += 4)
            for (int64_t j = 0; j < columns; j += 4)
                FN(tile)(E + i * ld, X + j * ld, ld, padded, out + i * columns + j, columns);
    }
}

/* Four rows of Y: y_j = sum_i P_ij e_i. P is (R x ldp). */
static inline __attribute__((always_inline)) void FN(mix)(const T *restrict E, int64_t R, int64_t ld, int64_t n,
                                                          const double *P, int64_t ldp, T *restrict Y) {
    for (int64_t c = 0; c < n; c += 2 * LANES) {
        VEC y[4][2] = {{{0}}};
        for (int64_t i = 0; i < R; i++) {
            VEC x0 = *(const VEC *)(E + i * ld + c), x1 = *(const VEC *)(E + i * ld + c + LANES);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                T p = (T)P[i * ldp + j];
                y[j][0] += p * x0;
                y[j][1] += p * x1;
            }
        }
        for (int j = 0; j < 4; j++) {
            *(VEC *)(Y + j * ld + c) = y[j][0];
            *(VEC *)(Y + j * ld + c + LANES) = y[j][1];
        }
    }
}

/* Columns [first, last) of the output: row j of it is sum_i P_ij e_i; P is (R x columns), columns a multiple of 4. */
static void FN(factor_combine)(const struct member *m, int64_t count, int64_t R, const double *P, int64_t columns,
                               const struct member *to, int64_t first, int64_t last, int64_t block, double *work) {
    int64_t ld = block + PAD;
    T *E = (T *)work, *Y = E + R * ld;
    for (; first < last; first += block) {
        int64_t n = last - first < block ? last - first : block;
        int64_t padded = (n + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
        FN(pack)(E, ld, m, count, first, n);
        FN(zero_tail)(E, R, ld, n, padded);
        for (int64_t j = 0; j < columns; j += 4) {
            FN(mix)(E, R, ld, padded, P + j, columns, Y);
            for (int64_t i = 0; i < 4 && j + i < to->rank; i++)
                FN(narrow)((void *)to->address, to->type, first * to->along + (j + i) * to->across, to->along, n,
                           Y + i * ld);
        }
    }
}

#undef VEC
#undef LOAD_F64
#undef LOAD_F32
#undef LOAD_BF16
