/* K gradients, parameter by parameter: blocks of columns are centred in a buffer that fits the cache and multiplied there.
 * Row K of a block is the centre, so that one Gram matrix holds <e_k, e_l>, <c, e_k> and <c, c>. */

/* sum (n) = sum_k w_k g_k over a run of columns, four gradients at a time: more streams at once are slower to read. What
 * does not fill a vector is left out; `i` is where it begins. */
#define ADD_UP(S, LOAD, w, sum)                                                                                        \
    memset(sum, 0, n * sizeof(T));                                                                                     \
    for (int64_t k = 0; k < K;) {                                                                                      \
        const S *g = (const S *)row[k] + at;                                                                           \
        T a = (T)(w)[k];                                                                                               \
        if (k + 4 > K) {                                                                                               \
            for (i = 0; i + LANES <= n; i += LANES) *(VEC *)(sum + i) += a * LOAD(g + i);                              \
            k++;                                                                                                       \
            continue;                                                                                                  \
        }                                                                                                              \
        const S *h = (const S *)row[k + 1] + at, *p2 = (const S *)row[k + 2] + at, *p3 = (const S *)row[k + 3] + at;   \
        T b = (T)(w)[k + 1], c2 = (T)(w)[k + 2], c3 = (T)(w)[k + 3];                                                   \
        for (i = 0; i + LANES <= n; i += LANES) {                                                                      \
            VEC x = *(VEC *)(sum + i) + a * LOAD(g + i), y = b * LOAD(h + i);                                          \
            x += c2 * LOAD(p2 + i);                                                                                    \
            y += c3 * LOAD(p3 + i);                                                                                    \
            *(VEC *)(sum + i) = x + y;                                                                                 \
        }                                                                                                              \
        k += 4;                                                                                                        \
    }

/* Columns [at, at + n) of parameter p: c = sum_k u_k g_k becomes row K of E, and the rows before it g_k - c. */
static void FN(centred)(const struct table *t, int64_t p, int64_t K, const double *u, int64_t at, int64_t n, T *restrict E,
                        int64_t ld) {
    const int64_t *row = t->address + p * K;
    T *c = E + K * ld;
    int64_t i = 0;
#define CENTRE(S, LOAD)                                                                                                \
    ADD_UP(S, LOAD, u, c)                                                                                              \
    for (int64_t k = 0; k < K; k++) {                                                                                  \
        const S *g = (const S *)row[k] + at;                                                                           \
        for (i = 0; i + LANES <= n; i += LANES) *(VEC *)(E + k * ld + i) = LOAD(g + i) - *(VEC *)(c + i);              \
    }                                                                                                                  \
    break;
    switch (t->type[p]) {
    case F64: CENTRE(double, LOAD_F64)
    case F32: CENTRE(float, LOAD_F32)
    case BF16: CENTRE(uint16_t, LOAD_BF16)
    case F16: CENTRE(uint16_t, LOAD_F16)
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

/* sums[3 i + j] += the products of three rows a_i with three rows b_j, lane by lane: to add up the lanes of every block
 * would take as long as a short block. Three by three: nine sums are in flight and few fall below the diagonal. */
static __attribute__((noinline)) void FN(lanes)(const T *restrict a, const T *restrict b, int64_t ld,
                                               int64_t n, VEC *restrict sums) {
    VEC c[3][3] = {{{0}}};
    for (int64_t k = 0; k < n; k += LANES) {
        VEC x0 = *(const VEC *)(a + k), x1 = *(const VEC *)(a + ld + k), x2 = *(const VEC *)(a + 2 * ld + k);
        KEEP(x0);
        KEEP(x1);
        KEEP(x2);
#pragma GCC unroll 3
        for (int j = 0; j < 3; j++) {
            VEC y = *(const VEC *)(b + j * ld + k);
            KEEP(y);
            c[0][j] += x0 * y;
            c[1][j] += x1 * y;
            c[2][j] += x2 * y;
        }
    }
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++)
#pragma GCC unroll 3
        for (int j = 0; j < 3; j++) sums[3 * i + j] += c[i][j];
}

/* total += sums, vector by vector in float64; the sums begin anew. */
static void FN(widen_sums)(VEC *restrict sums, int64_t count, FN(wide) *restrict total) {
    for (int64_t i = 0; i < count; i++) {
        ADD_WIDE(total + i, sums[i]);
        sums[i] = (VEC){0};
    }
}

/* out (3 x 3 of ldo) += the sums over the lanes of nine vectors. */
static void FN(add_lanes)(const FN(wide) *sums, double *out, int64_t ldo) {
    for (int i = 0; i < 9; i++) {
        const double *lane = (const double *)(sums + i);
        double sum = 0;
        for (int l = 0; l < LANES; l++) sum += lane[l];
        out[i / 3 * ldo + i % 3] += sum;
    }
}

/* Columns [first, last) of K gradients: out (rows x rows), on and above the diagonal, of the K centred ones and the centre.
 * A lane adds up some CHAIN products in float, and in double beyond. */
static void FN(grad_gram)(const struct table *t, int64_t K, const double *u, int64_t first, int64_t last, double *work,
                          double *out) {
    int64_t rows = gram_rows(K), block = gram_block(rows, sizeof(T)), ld = block + PAD, keep = rows <= KEPT_ROWS;
    int64_t all = gram_tiles(rows), kept = 9 * (keep ? all : 1), blocks = 0;
    FN(wide) *total = (FN(wide) *)work, *sum;
    VEC *sums = DOUBLE ? (VEC *)total : (VEC *)(total + kept), *near;
    T *E = (T *)(sums + kept);
    memset(work, 0, (char *)E - (char *)work);
    memset(E + (K + 1) * ld, 0, (rows - K - 1) * ld * sizeof(T));
    int64_t p = find(t, first);
    while (first < last) {
        int64_t used = 0;
        while (used < block && first < last) {
            while (first >= t->start[p + 1]) p++;
            int64_t n = least3(block - used, last - first, t->start[p + 1] - first);
            FN(centred)(t, p, K, u, first - t->start[p], n, E + used, ld);
            used += n;
            first += n;
        }
        int64_t padded = (used + LANES - 1) / LANES * LANES;
        for (int64_t k = 0; k <= K && padded > used; k++) memset(E + k * ld + used, 0, (padded - used) * sizeof(T));
        struct coming next = {0};
        if (first < last) next = coming(t, &p, K, first, least(block, last - first), all);
        near = sums;
        for (int64_t i = 0; i < rows; i += 3)
            for (int64_t j = i; j < rows; j += 3) {
                ask(&next);
                FN(lanes)(E + i * ld, E + j * ld, ld, padded, near);
                if (keep) near += 9;
                else {
                    if (!DOUBLE) FN(widen_sums)(sums, 9, total);
                    FN(add_lanes)(total, out + i * rows + j, rows);
                    memset(total, 0, 9 * sizeof(FN(wide)));
                }
            }
        if (DOUBLE || !keep || (++blocks * block < CHAIN * LANES && first < last)) continue;
        FN(widen_sums)(sums, kept, total);
        blocks = 0;
    }
    if (!keep) return;
    sum = total;
    for (int64_t i = 0; i < rows; i += 3)
        for (int64_t j = i; j < rows; j += 3, sum += 9) FN(add_lanes)(sum, out + i * rows + j, rows);
}

/* Columns [first, last) of out = sum_k v_k g_k, rounded once; parameter p's output is to[p]. */
static void FN(grad_combine)(const struct table *t, int64_t K, const double *v, const int64_t *to,
                             const int64_t *to_type, int64_t first, int64_t last, double *work) {
    T *sum = (T *)work, *value = sum + MIX_BLOCK;
    for (int64_t p = find(t, first); first < last;) {
        while (first >= t->start[p + 1]) p++;
        int64_t n = least3(MIX_BLOCK, last - first, t->start[p + 1] - first), at = first - t->start[p], i = 0;
        const int64_t *row = t->address + p * K;
#define SUM(S, LOAD) ADD_UP(S, LOAD, v, sum) break;
        switch (t->type[p]) {
        case F64: SUM(double, LOAD_F64)
        case F32: SUM(float, LOAD_F32)
        case BF16: SUM(uint16_t, LOAD_BF16)
        case F16: SUM(uint16_t, LOAD_F16)
        }
#undef SUM
        for (int64_t k = 0; k < K && i < n; k++) {
            FN(widen)(value, (const void *)row[k], t->type[p], at + i, 1, n - i);
            for (int64_t j = i; j < n; j++) sum[j] += (T)v[k] * value[j - i];
        }
        FN(narrow)((void *)to[p], (int)to_type[p], at, 1, n, sum);
        first += n;
    }
}

#undef ADD_UP
