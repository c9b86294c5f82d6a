/* The clients' factors of one side: tall matrices (length, rank) side by side, R columns in all. A block of rows is
 * packed in panels of WIDTH columns, row after row, so that a product of two panels loads vectors and broadcasts. */

#define WIDTH (2 * LANES) /* columns of a panel: two vectors */

/* Two panels are multiplied DEEP rows of the left by one or two vectors of the right: sums that registers hold. */
#define DEEP (REGISTERS == 32 ? 8 : 6)
#define INLINE inline __attribute__((always_inline))

/* out (DEEP x vectors) += sum over n rows k of a[i][k] b[k][j]; a[i] and b advance by WIDTH numbers a row. */
static INLINE void FN(panels)(const T *const *a, const T *restrict b, int64_t n, double *restrict out, int64_t ldo,
                              const int vectors) {
    VEC c[DEEP][2] = {{{0}}};
    for (int64_t k = 0; k < n * WIDTH; k += WIDTH) {
        VEC b0 = *(const VEC *)(b + k), b1 = *(const VEC *)(b + k + (vectors - 1) * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < DEEP; i++) {
            T x = a[i][k];
            c[i][0] += x * b0;
            if (vectors == 2) c[i][1] += x * b1;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < DEEP; i++)
#pragma GCC unroll 2
        for (int h = 0; h < vectors; h++) ADD_WIDE(out + i * ldo + h * LANES, c[i][h]);
}

/* Column i of a packed block of n rows; columns past the last panel stand for nothing and repeat the last. */
static inline const T *FN(column)(const T *E, int64_t i, int64_t columns, int64_t n) {
    i = i < columns ? i : columns - 1;
    return E + i / WIDTH * WIDTH * n + i % WIDTH;
}

/* out (rows x ldo) += E^T X for packed blocks of n rows; with `triangle`, of E = X, what lies on or above the diagonal,
 * and out is then a `part` of it. */
static void FN(multiply)(const T *E, int64_t R, const T *X, int64_t k, int64_t n, int triangle, double *out, int64_t ldo) {
    const T *a[DEEP];
    int64_t columns = (R + WIDTH - 1) / WIDTH * WIDTH;
    for (int64_t i = 0; i < R; i += DEEP) {
        for (int d = 0; d < DEEP; d++) a[d] = FN(column)(E, i + d, columns, n);
        int64_t start = triangle ? first_kept(i, LANES) : 0, ld = ldo - start, j = start;
        double *row = out - start;
        if (j % WIDTH) { /* the second vector of a panel */
            FN(panels)(a, X + (j - LANES) * n + LANES, n, row + j, ld, 1);
            j += LANES;
        }
        for (; j + LANES < k; j += WIDTH) FN(panels)(a, X + j * n, n, row + j, ld, 2);
        if (j < k) FN(panels)(a, X + j * n, n, row + j, ld, 1);
        out += DEEP * ld;
    }
}

static INLINE void FN(transpose)(QUAD x[4]) {
    QUAD a = SHUFFLE(x[0], x[1], 0, 4, 1, 5), b = SHUFFLE(x[2], x[3], 0, 4, 1, 5);
    QUAD c = SHUFFLE(x[0], x[1], 2, 6, 3, 7), d = SHUFFLE(x[2], x[3], 2, 6, 3, 7);
    x[0] = SHUFFLE(a, b, 0, 1, 4, 5);
    x[1] = SHUFFLE(a, b, 2, 3, 6, 7);
    x[2] = SHUFFLE(c, d, 0, 1, 4, 5);
    x[3] = SHUFFLE(c, d, 2, 3, 6, 7);
}

/* `count` columns of a member from column i on, rows [first, first + n), to one panel whose column is at `to`. */
static void FN(pack_columns)(T *restrict to, const struct member *m, int64_t i, int64_t count, int64_t first, int64_t n) {
    int64_t step = m->along, k, wide;
#define PACK(S, QUAD_OF, EXPRESSION)                                                                                   \
    {                                                                                                                  \
        const S *from = (const S *)m->address + first * step + i * m->across;                                          \
        for (; count >= 8 && m->across == 1; from += 8, to += 8, count -= 8) /* whole lines are stored faster */       \
            for (k = 0; k < n; k++) {                                                                                  \
                *(QUAD *)(to + k * WIDTH) = QUAD_OF(from + k * step);                                                  \
                *(QUAD *)(to + k * WIDTH + 4) = QUAD_OF(from + k * step + 4);                                          \
            }                                                                                                          \
        for (; count >= 4 && m->across == 1; from += 4, to += 4, count -= 4)                                           \
            for (k = 0; k < n; k++) *(QUAD *)(to + k * WIDTH) = QUAD_OF(from + k * step);                              \
        for (; count >= 4 && step == 1; from += wide * m->across, to += wide, count -= wide) {                         \
            wide = count >= 8 ? 8 : 4;                                                                                 \
            for (k = 0; k + 4 <= n; k += 4) {                                                                          \
                QUAD x[4], y[4];                                                                                       \
                for (int j = 0; j < 4; j++) x[j] = QUAD_OF(from + j * m->across + k);                                  \
                FN(transpose)(x);                                                                                      \
                if (wide == 8) {                                                                                       \
                    for (int j = 0; j < 4; j++) y[j] = QUAD_OF(from + (j + 4) * m->across + k);                        \
                    FN(transpose)(y);                                                                                  \
                }                                                                                                      \
                for (int j = 0; j < 4; j++) {                                                                          \
                    *(QUAD *)(to + (k + j) * WIDTH) = x[j];                                                            \
                    if (wide == 8) *(QUAD *)(to + (k + j) * WIDTH + 4) = y[j];                                         \
                }                                                                                                      \
            }                                                                                                          \
            for (; k < n; k++)                                                                                         \
                for (int64_t j = 0; j < wide; j++) { S x = from[j * m->across + k]; to[k * WIDTH + j] = (T)(EXPRESSION); } \
        }                                                                                                              \
        for (; count > 0; from += m->across, to++, count--)                                                            \
            for (k = 0; k < n; k++) { S x = from[k * step]; to[k * WIDTH] = (T)(EXPRESSION); }                         \
        break;                                                                                                         \
    }
    switch (m->type) {
    case F64: PACK(double, QUAD_F64, x)
    case F32: PACK(float, QUAD_F32, x)
    case BF16: PACK(uint16_t, QUAD_BF16, from_bf16(x))
    case F16: PACK(uint16_t, QUAD_F16, from_f16(x))
    }
#undef PACK
}

/* Rows [first, first + n) of the stacked members, packed from column `column` on; the column behind them. */
static int64_t FN(pack_at)(T *restrict E, int64_t column, const struct member *m, int64_t count, int64_t first, int64_t n) {
    for (int64_t u = 0; u < count; u++)
        for (int64_t i = 0, part; i < m[u].rank; i += part, column += part) {
            part = least(WIDTH - column % WIDTH, m[u].rank - i);
            FN(pack_columns)(E + column / WIDTH * WIDTH * n + column % WIDTH, m + u, i, part, first, n);
        }
    return column;
}

/* The last panel filled up with zeros. */
static void FN(fill)(T *restrict E, int64_t column, int64_t n) {
    for (; column % WIDTH; column++)
        for (int64_t k = 0; k < n; k++) E[column / WIDTH * WIDTH * n + column % WIDTH + k * WIDTH] = 0;
}

static void FN(pack)(T *restrict E, const struct member *m, int64_t count, int64_t first, int64_t n) {
    FN(fill)(E, FN(pack_at)(E, 0, m, count, first, n), n);
}

/* Rows [k, k + deep) of Y (n x WIDTH) = E P for a packed block and one or two vectors of columns of P (R x ldp). */
static INLINE void FN(mix_rows)(const T *restrict E, int64_t R, int64_t n, const T *restrict P, int64_t ldp,
                                T *restrict Y, int64_t k, const int deep, const int vectors) {
    VEC y[8][2] = {{{0}}};
    int64_t step[8];
    for (int d = 0; d < deep; d++) step[d] = least(k + d, n - 1) * WIDTH;
    for (int64_t i = 0; i < R; i += WIDTH) {
        const T *e = E + i * n, *p = P + i * ldp;
        for (int64_t lane = 0, lanes = least(WIDTH, R - i); lane < lanes; lane++, e++, p += ldp) {
            VEC p0 = *(const VEC *)p, p1 = *(const VEC *)(p + (vectors - 1) * LANES);
#pragma GCC unroll 8
            for (int d = 0; d < deep; d++) {
                T x = e[step[d]];
                y[d][0] += x * p0;
                if (vectors == 2) y[d][1] += x * p1;
            }
        }
    }
    for (int d = 0; d < deep && k + d < n; d++)
        for (int h = 0; h < vectors; h++) *(VEC *)(Y + (k + d) * WIDTH + h * LANES) = y[d][h];
}

/* The first `columns` (WIDTH at most, rounded up to whole vectors) of Y = E P. */
static void FN(mix_packed)(const T *restrict E, int64_t R, int64_t n, const T *restrict P, int64_t ldp, int64_t columns,
                           T *restrict Y) {
    if (columns > LANES)
        for (int64_t k = 0; k < n; k += 4) FN(mix_rows)(E, R, n, P, ldp, Y, k, 4, 2);
    else
        for (int64_t k = 0; k < n; k += 8) FN(mix_rows)(E, R, n, P, ldp, Y, k, 8, 1);
}

/* One vector of columns of Y (n x WIDTH) = sum over members u of v_u times their columns from `column` on, for members
 * of `rank` columns each, a multiple of LANES. */
static void FN(mix_members)(const T *restrict E, int64_t count, int64_t rank, int64_t column, int64_t n, const double *v,
                            T *restrict Y) {
    for (int64_t k = 0; k < n * WIDTH; k += WIDTH) {
        VEC y = {0};
        for (int64_t u = 0, i = column; u < count; u++, i += rank)
            y += (T)v[u] * *(const VEC *)(E + i / WIDTH * WIDTH * n + i % WIDTH + k);
        *(VEC *)(Y + k) = y;
    }
}

/* `columns` of Y (n x WIDTH), rounded to rows [first, first + n) of a factor from column `column` on. */
static void FN(write_packed)(const struct member *to, int64_t column, int64_t columns, int64_t first, int64_t n,
                             const T *Y, T *line) {
    int64_t at = first * to->along + column * to->across;
    if (to->across == 1) {
        for (int64_t k = 0; k < n; k++, at += to->along)
            FN(narrow)((void *)to->address, (int)to->type, at, 1, columns, Y + k * WIDTH);
        return;
    }
    for (int64_t i = 0; i < columns; i++, at += to->across) {
        for (int64_t k = 0; k < n; k++) line[k] = Y[k * WIDTH + i];
        FN(narrow)((void *)to->address, (int)to->type, at, to->along, n, line);
    }
}

/* Rows [first, first + n) of the combination of a job, from its packed block. */
static void FN(combine_block)(const struct product *p, const T *E, int64_t first, int64_t n, T *Y) {
    for (int64_t j = 0; j < p->to->rank; j += WIDTH) {
        int64_t columns = least(WIDTH, p->to->rank - j);
        if (p->stride) FN(mix_packed)(E, p->R, n, (const T *)p->P + j, p->stride, columns, Y);
        else
            for (int64_t i = 0; i < columns; i += LANES)
                FN(mix_members)(E, p->count, p->to->rank, j + i, n, p->P, Y + i);
        FN(write_packed)(p->to, j, columns, first, n, Y, Y + n * WIDTH);
    }
}

/* The product of a job. */
static void FN(products)(const struct product *p, double *work) {
    const struct member *joined = p->written == APART ? 0 : p->to;
    const struct member *other = joined && p->written == CROSSED ? joined : p->other;
    int64_t R = p->R + (joined ? joined->rank : 0);
    T *E = (T *)work, *X = E + (R + WIDTH - 1) / WIDTH * WIDTH * p->block;
    T *Y = X + (other ? (p->k + WIDTH - 1) / WIDTH * WIDTH * p->block : 0);
    memset(p->out, 0, part_numbers(p->rows, p->columns, !other, DEEP, LANES) * sizeof(double));
    for (int64_t first = p->first; first < p->last; first += p->block) {
        int64_t n = least(p->last - first, p->block), columns = FN(pack_at)(E, 0, p->members, p->count, first, n);
        if (p->to) FN(combine_block)(p, E, first, n, Y);
        if (joined) columns = FN(pack_at)(E, columns, joined, 1, first, n);
        FN(fill)(E, columns, n);
        if (other) FN(pack)(X, other, 1, first, n);
        FN(multiply)(E, R, other ? X : E, other ? p->k : R, n, !other, p->out, p->columns);
    }
}

/* Four rows of Y: y_j = sum_i P_ij e_i, for E whose rows (one per column of the stack) lie ld apart. P is (R x ldp). */
static INLINE void FN(mix)(const T *restrict E, int64_t R, int64_t ld, int64_t n, const T *P, int64_t ldp,
                           T *restrict Y) {
    for (int64_t c = 0; c < n; c += 2 * LANES) {
        VEC y[4][2] = {{{0}}};
        for (int64_t i = 0; i < R; i++) {
            VEC x0 = *(const VEC *)(E + i * ld + c), x1 = *(const VEC *)(E + i * ld + c + LANES);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                T p = P[i * ldp + j];
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

/* Rows [first, first + n) of the output of a job whose output is contiguous along its rows. */
static void FN(combine_packed)(const struct combination *c, int64_t first, int64_t n, T *E, T *Y) {
    const struct member *to = c->to;
    FN(pack)(E, c->members, c->count, first, n);
    for (int64_t j = 0; j < to->rank; j += WIDTH) {
        int64_t columns = least(WIDTH, to->rank - j);
        FN(mix_packed)(E, c->R, n, (const T *)c->P + j, c->columns, columns, Y);
        for (int64_t k = 0; k < n; k++)
            FN(narrow)((void *)to->address, to->type, (first + k) * to->along + j * to->across, to->across, columns,
                       Y + k * WIDTH);
    }
}

/* The same for an output that is contiguous along its columns. */
static void FN(combine_rows)(const struct combination *c, int64_t first, int64_t n, T *E, T *Y) {
    const struct member *to = c->to;
    int64_t ld = c->block + PAD, padded = (n + WIDTH - 1) / WIDTH * WIDTH, row = 0;
    for (const struct member *m = c->members; m < c->members + c->count; m++)
        for (int64_t i = 0; i < m->rank; i++, row++) {
            FN(widen)(E + row * ld, (const void *)m->address, m->type, first * m->along + i * m->across, m->along, n);
            memset(E + row * ld + n, 0, (padded - n) * sizeof(T));
        }
    for (int64_t j = 0; j < to->rank; j += 4) {
        FN(mix)(E, c->R, ld, padded, (const T *)c->P + j, c->columns, Y);
        for (int64_t i = 0; i < 4 && j + i < to->rank; i++)
            FN(narrow)((void *)to->address, to->type, first * to->along + (j + i) * to->across, to->along, n, Y + i * ld);
    }
}

/* The combination of a job: S P, for P (R x columns) of a multiple of WIDTH columns. */
static void FN(combine)(const struct combination *c, double *work) {
    T *E = (T *)work, *Y = E + (c->R + WIDTH) * (c->block + PAD);
    for (int64_t first = c->first; first < c->last; first += c->block)
        (c->to->across == 1 ? FN(combine_packed) : FN(combine_rows))(c, first, least(c->last - first, c->block), E, Y);
}

#undef WIDTH
#undef DEEP
#undef INLINE
