/* beta W + sum_u c_u B_u A_u, tile by tile of W: products in T over RUN stacked ranks, and float64 beyond. */

#define WIDTH (2 * LANES)

/* Rows [from, from + n) of the stacked ranks (row k of client u's factor is one of its components), `columns` of the long
 * dimension from `column` on, times the client's number where there are any: packed in panels. */
static void FN(pack_ranks)(T *E, const struct member *m, int64_t count, const double *scale, int64_t from, int64_t n,
                           int64_t column, int64_t columns) {
    int64_t start = 0;
    for (int64_t u = 0; u < count; start += m[u++].rank) {
        int64_t first = from > start ? from - start : 0, last = least(from + n - start, m[u].rank);
        if (first >= last) continue;
        for (int64_t at = 0; at < columns; at += WIDTH) {
            T *to = E + at * n + (start + first - from) * WIDTH;
            int64_t part = least(WIDTH, columns - at), numbers = (last - first) * WIDTH;
            if (part < WIDTH) memset(to, 0, numbers * sizeof(T));
            FN(pack_columns)(to, m + u, column + at, part, first, last - first);
            if (scale)
                for (int64_t i = 0; i < numbers; i++) to[i] *= (T)scale[u];
        }
    }
}

/* The tile of W is asked for, to be there when its sums begin. */
static void FN(ask_tile)(const struct sum *s, int64_t rows, int64_t columns) {
    const struct member *W = s->W;
    int64_t size = bytes_of[W->type];
    if (s->beta == 0 || W->along != 1) return;
    for (int64_t i = 0; i < rows; i++) {
        const char *line = (const char *)W->address + ((s->row + i) * W->across + s->column) * size;
        for (int64_t at = 0; at < columns * size; at += LINE) __builtin_prefetch(line + at, 0, 2);
    }
}

/* Sums begin with beta W. */
static void FN(begin_sums)(const struct sum *s, int64_t rows, int64_t columns, double *total) {
    const struct member *W = s->W;
    if (s->beta == 0 || rows < SUM_ROWS || columns < SUM_COLUMNS)
        memset(total, 0, SUM_ROWS * SUM_COLUMNS * sizeof(double));
    if (s->beta == 0) return;
    for (int64_t i = 0; i < rows; i++) {
        double *y = total + i * SUM_COLUMNS;
        WIDE_FN(widen)(y, (const void *)W->address, (int)W->type, (s->row + i) * W->across + s->column * W->along,
                       W->along, columns);
        if (s->beta != 1)
            for (int64_t j = 0; j < columns; j++) y[j] *= s->beta;
    }
}

/* A row of the tile, rounded. With `stream`, past the caches, which would first read what is written over. */
static void FN(put_row)(const struct sum *s, int64_t row, int64_t columns, const T *y) {
    const struct member *to = s->to;
    int64_t at = row * to->across + s->column * to->along;
#if BYTES >= 32
    int64_t bytes = columns * bytes_of[to->type];
    char *place = (char *)to->address + at * bytes_of[to->type];
    if (s->stream && to->along == 1 && (uintptr_t)place % LINE == 0 && bytes % LINE == 0) {
        char lines[SUM_COLUMNS * 8] __attribute__((aligned(LINE)));
        FN(narrow)(lines, (int)to->type, 0, 1, columns, y);
        for (int64_t i = 0; i < bytes; i += 32) _mm256_stream_si256((void *)(place + i), *(const __m256i *)(lines + i));
        return;
    }
#endif
    FN(narrow)((void *)to->address, (int)to->type, at, to->along, columns, y);
}

static void FN(lowrank_sum)(const struct sum *s, double *work) {
    double *total = work;
    T *B = (T *)(total + SUM_ROWS * SUM_COLUMNS), *A = B + SUM_ROWS * RUN;
    int64_t rows = least(SUM_ROWS, s->rows - s->row), columns = least(SUM_COLUMNS, s->columns - s->column);
    FN(ask_tile)(s, rows, columns);
    for (int64_t k = 0; k < s->R || k == 0; k += RUN) {
        int64_t n = least(RUN, s->R - k);
        FN(pack_ranks)(B, s->B, s->count, s->c, k, n, s->row, rows);
        FN(pack_ranks)(A, s->A, s->count, 0, k, n, s->column, columns);
        if (k == 0) FN(begin_sums)(s, rows, columns, total);
        FN(multiply)(B, rows, A, columns, n, 0, total, SUM_COLUMNS);
    }
    for (int64_t i = 0; i < rows; i++) WIDE_FN(put_row)(s, s->row + i, columns, total + i * SUM_COLUMNS);
}

#undef WIDTH
