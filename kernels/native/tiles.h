/* beta W + sum_u c_u B_u A_u on a processor with a matrix unit (AMX): factors in float are split into three bfloat16
 * numbers, which hold all 24 bits; six products of them, with sums in float, lose no more than products in float do.
 * Factors are split once, panel by panel (`panels`), and multiplied tile by tile of W (`tiles`). */

#include <unistd.h>
#include <sys/syscall.h>

/* PANEL rows of B, or columns of A, are two tiles of 16, DEEP ranks of them. TILE_COLUMNS of W are worked on at a time,
 * NEAR_RUN depths, whose panel of B the first cache holds; sums stay in float over TILE_RUN. */
enum { PANEL = 32, DEEP = 32, TILE = 512, TERMS = 3, TILE_COLUMNS = 256, NEAR_RUN = 4, TILE_RUN = 16 };
/* Panels that are packed, and columns multiplied, by one job. */
enum { GROUP = TILE_COLUMNS / PANEL };
/* Rows of sums lie further apart than there are columns, so that they do not share sets of the cache. */
enum { SUMS_APART = TILE_COLUMNS + 16 };

/* The smallest number but zero (less one) and the largest one of a panel, by magnitude, as the bits of a float. */
struct extent { uint32_t least, most; };

/* Panels [first, last) of one side, `length` numbers of every rank: of B where there are the clients' numbers, by which
 * it is multiplied, else of A. */
struct panels {
    const struct member *members;
    int64_t count, R;
    const double *scale;
    int64_t length, terms, first, last;
    uint16_t *to;
    struct extent *extents;
};

/* The rows [row, last) of W, and TILE_COLUMNS columns from `column` on. */
struct tiles {
    struct sum of;
    int64_t last, terms;
    const uint16_t *left, *right;
    const struct extent *left_extents, *right_extents;
};

static inline int64_t depths(int64_t R) { return (R + DEEP - 1) / DEEP; }
/* 16-bit numbers of a panel. */
static inline int64_t panel_numbers(int64_t R, int64_t terms) { return terms * depths(R) * 2 * TILE; }

/* The leading bfloat16 of 16 floats, rounded to nearest even, as float. */
static inline __m512i leading(__m512i x) {
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_and_si512(rounded, _mm512_set1_epi32((int)0xffff0000));
}

static inline __m512i rest(__m512i x, __m512i part) {
    return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(part)));
}

/* 16 x 16 numbers of 32 bits, rows to columns. */
static void turn(__m512i *x) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int h = 0; h < 2; h++) {
            x[i + 2 * h] = _mm512_unpacklo_epi64(y[i + h], y[i + h + 2]);
            x[i + 2 * h + 1] = _mm512_unpackhi_epi64(y[i + h], y[i + h + 2]);
        }
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
        x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
        x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd);
    }
}

/* A tile of every term from `n` ranks of 16 numbers, PANEL apart: pairs of ranks, one behind the other (as the right
 * operand is laid out), or with `turned` number by number (as the left one is). Terms lie `apart`. */
static void split_tile(const float *from, int64_t n, int64_t terms, int turned, uint16_t *to, int64_t apart,
                       __m512i *lowest, __m512i *most) {
    __m512i tile[TERMS][16];
    for (int pair = 0; pair < DEEP / 2; pair++) {
        __m512i x[2];
        for (int h = 0; h < 2; h++) {
            x[h] = 2 * pair + h < n ? _mm512_loadu_si512(from + (2 * pair + h) * PANEL) : _mm512_setzero_si512();
            __m512i size = _mm512_and_si512(x[h], _mm512_set1_epi32(0x7fffffff));
            *most = _mm512_max_epu32(*most, size);
            *lowest = _mm512_min_epu32(*lowest, _mm512_sub_epi32(size, _mm512_set1_epi32(1))); /* zero is the largest */
        }
        for (int64_t t = 0; t < terms; t++) {
            __m512i part[2] = {leading(x[0]), leading(x[1])};
            tile[t][pair] = _mm512_or_si512(_mm512_srli_epi32(part[0], 16), part[1]);
            x[0] = rest(x[0], part[0]);
            x[1] = rest(x[1], part[1]);
        }
    }
    for (int64_t t = 0; t < terms; t++) {
        if (turned) turn(tile[t]);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + t * apart + i * DEEP, tile[t][i]);
    }
}

static void split_panels(const struct panels *p, float *E) {
    int64_t at = p->first * PANEL, columns = least(p->last * PANEL, p->length) - at, depth = depths(p->R);
    int64_t numbers = panel_numbers(p->R, p->terms), panels = p->last - p->first;
    __m512i lowest[GROUP], most[GROUP];
    for (int64_t i = 0; i < panels; i++) lowest[i] = _mm512_set1_epi32(-1), most[i] = _mm512_setzero_si512();
    for (int64_t k = 0; k < depth; k++) {
        int64_t n = least(DEEP, p->R - k * DEEP);
        pack_ranks_float_avx512(E, p->members, p->count, p->scale, k * DEEP, n, at, columns);
        for (int64_t i = 0; i < 2 * panels; i++)
            split_tile(E + i / 2 * PANEL * n + i % 2 * 16, n, p->terms, p->scale != 0,
                       p->to + (p->first + i / 2) * numbers + (2 * k + i % 2) * TILE, depth * 2 * TILE, lowest + i / 2,
                       most + i / 2);
    }
    struct extent *to = p->extents + p->first;
    for (int64_t i = 0; i < panels; i++)
        to[i] = (struct extent){_mm512_reduce_min_epu32(lowest[i]), _mm512_reduce_max_epu32(most[i])};
}

/* Whether the unit multiplies two panels as float products would: nothing is infinite in them (or when rounded), and
 * neither a part of a number nor a product of two is so small that the unit takes it for zero (2^-126). */
static int ordinary(struct extent a, struct extent b) {
    enum { INFINITE = 0x7f7f8000, BIAS = 127, SMALLEST = -100 };
    int small_a = (int)(a.least >> 23) - BIAS, small_b = (int)(b.least >> 23) - BIAS;
    return a.most < INFINITE && b.most < INFINITE && small_a > SMALLEST && small_b > SMALLEST &&
           small_a + small_b > SMALLEST;
}

static struct extent join(const struct extent *e, int64_t count) {
    struct extent both = e[0];
    for (int64_t i = 1; i < count; i++) {
        if (e[i].least < both.least) both.least = e[i].least;
        if (e[i].most > both.most) both.most = e[i].most;
    }
    return both;
}

/* Rows of W that are asked for line by line while tiles are multiplied: all at once they would be waited for. */
struct wanted { const char *row; int64_t step, lines, line, rows, share; };

static inline struct wanted wanted(const struct sum *s, int64_t rows, int64_t columns, int64_t steps) {
    const struct member *W = s->W;
    int64_t size = bytes_of[W->type], lines = columns * size / LINE + 1;
    if (s->beta == 0 || W->along != 1) rows = 0;
    return (struct wanted){(const char *)W->address + (s->row * W->across + s->column) * size, W->across * size, lines, 0,
                           rows, (rows * lines + steps - 1) / steps};
}

static inline void want(struct wanted *w) {
    for (int64_t i = 0; i < w->share && w->rows; i++) {
        __builtin_prefetch(w->row + w->line * LINE, 0, 2);
        if (++w->line == w->lines) w->line = 0, w->row += w->step, w->rows--;
    }
}

static const char products[][2] = {{0, 2}, {1, 1}, {2, 0}, {0, 1}, {1, 0}, {0, 0}}; /* of terms; small ones first */
static inline int64_t products_of(int64_t terms) { return terms == 3 ? 6 : terms == 2 ? 5 : 3; }

/* PANEL x PANEL sums over depths [from, to), of all products of terms but the smallest, begun here or added to what is
 * there. Rows lie SUMS_APART. */
static void multiply_panels(const uint16_t *left, const uint16_t *right, int64_t depth, int64_t from, int64_t to,
                            int64_t terms, float *sums, int begin, struct wanted *w) {
    if (begin) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, SUMS_APART * 4);
        _tile_loadd(1, sums + 16, SUMS_APART * 4);
        _tile_loadd(2, sums + 16 * SUMS_APART, SUMS_APART * 4);
        _tile_loadd(3, sums + 16 * SUMS_APART + 16, SUMS_APART * 4);
    }
    for (int p = 0; p < 6; p++) {
        if (products[p][1] >= terms) continue;
        const uint16_t *l = left + products[p][0] * depth * 2 * TILE, *r = right + products[p][1] * depth * 2 * TILE;
        for (int64_t k = from; k < to; k++) {
            want(w);
            _tile_loadd(4, l + 2 * k * TILE, 64);
            _tile_loadd(6, r + 2 * k * TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, r + (2 * k + 1) * TILE, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, l + (2 * k + 1) * TILE, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, SUMS_APART * 4);
    _tile_stored(1, sums + 16, SUMS_APART * 4);
    _tile_stored(2, sums + 16 * SUMS_APART, SUMS_APART * 4);
    _tile_stored(3, sums + 16 * SUMS_APART + 16, SUMS_APART * 4);
}

/* One row: beta W, sums of earlier runs where there are any, and those of the last one. */
static void finish_row(const struct sum *s, int64_t row, int64_t columns, const double *earlier, const float *sums) {
    const struct member *W = s->W;
    int64_t at = row * W->across + s->column * W->along;
    if (s->beta == 0 && !earlier) {
        put_row_float_avx512(s, row, columns, sums);
    } else if (s->beta == 1 && !earlier && W->type != F64) { /* the same bits as below: a sum of floats, rounded once */
        float y[TILE_COLUMNS];
        widen_float_avx512(y, (const void *)W->address, (int)W->type, at, W->along, columns);
        for (int64_t j = 0; j < columns; j++) y[j] += sums[j];
        put_row_float_avx512(s, row, columns, y);
    } else {
        double y[TILE_COLUMNS];
        if (s->beta == 0) memset(y, 0, sizeof y);
        else widen_double_avx512(y, (const void *)W->address, (int)W->type, at, W->along, columns);
        for (int64_t j = 0; j < columns; j++) y[j] = s->beta * y[j] + (earlier ? earlier[j] : 0) + (double)sums[j];
        put_row_double_avx512(s, row, columns, y);
    }
}

/* PANEL rows of W from `row` on. */
static void multiply_rows(const struct tiles *t, int64_t row, float *sums, double *earlier) {
    struct sum s = t->of;
    int64_t rows = least(PANEL, s.rows - row), columns = least(TILE_COLUMNS, s.columns - s.column), depth = depths(s.R);
    const uint16_t *left = t->left + row / PANEL * panel_numbers(s.R, TERMS);
    s.row = row;
    struct wanted w = wanted(&s, rows, columns, (columns + PANEL - 1) / PANEL * depth * products_of(t->terms));
    for (int64_t k = 0; k < depth; k += NEAR_RUN) {
        if (k && k % TILE_RUN == 0)
            for (int64_t i = 0; i < PANEL * SUMS_APART; i++) earlier[i] = (k > TILE_RUN ? earlier[i] : 0) + (double)sums[i];
        for (int64_t j = 0; j < columns; j += PANEL)
            multiply_panels(left, t->right + (s.column + j) / PANEL * panel_numbers(s.R, t->terms), depth, k,
                            least(k + NEAR_RUN, depth), t->terms, sums + j, k % TILE_RUN == 0, &w);
    }
    for (int64_t i = 0; i < rows; i++)
        finish_row(&s, row + i, columns, depth > TILE_RUN ? earlier + i * SUMS_APART : 0, sums + i * SUMS_APART);
}

static void multiply_tiles(const struct tiles *t, double *work) {
    int64_t columns = least(TILE_COLUMNS, t->of.columns - t->of.column), last = least(t->last, t->of.rows);
    struct extent right = join(t->right_extents + t->of.column / PANEL, (columns + PANEL - 1) / PANEL);
    float *sums = (float *)work;
    double *earlier = work + PANEL * SUMS_APART / 2;
    for (int64_t row = t->of.row; row < last; row += PANEL) {
        if (ordinary(t->left_extents[row / PANEL], right)) {
            multiply_rows(t, row, sums, earlier);
            continue;
        }
        struct sum s = t->of;
        s.row = row;
        s.rows = least(row + PANEL, last);
        lowrank_sum_float_avx512(&s, work);
    }
}

/* Rows of 64 bytes, 16 of them, in every one of the eight tiles. A constant: compilers take what loads it to read no more
 * than its first eight bytes, and need not have stored the others. */
static const struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } SHAPE = {
    .palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

static void multiply_all(const struct tiles *jobs, int64_t count, int64_t *next, double *work) {
    _tile_loadconfig(&SHAPE);
    EACH multiply_tiles(jobs + i, work);
    stream_ends();
    _tile_release();
}

/* Whether the processor has the unit and the system lets this process use it. */
static int ask_for_tiles(void) {
    enum { PERMISSION = 0x1023, TILE_DATA = 18 };
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, PERMISSION, TILE_DATA) == 0;
}
