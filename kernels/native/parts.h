/* The parts of a product, one per range of rows of the factors: what is multiplied there, and how it is put together. */

/* A part of a product: rows x columns numbers; of one that has only a triangle, the rows from i on that are multiplied
 * together, `deep` of them, begin with the vector of `lanes` columns that their diagonal does, and lie closer. */
static inline int64_t first_kept(int64_t i, int64_t lanes) { return i / lanes * lanes; }
static inline int64_t part_numbers(int64_t rows, int64_t columns, int64_t triangle, int64_t deep, int64_t lanes) {
    int64_t numbers = 0;
    for (int64_t i = 0; i < rows; i += deep) numbers += deep * (columns - (triangle ? first_kept(i, lanes) : 0));
    return numbers;
}

/* A product put together: out (R x k) is the sum of `count` parts (rows x columns each), in order; mirrored if only one
 * triangle is there. */
struct whole {
    const double *parts;
    int64_t count, rows, columns, R, k, mirror;
    double *out;
};

/* Row r, where it is kept from column `start` on, at `at` in every part of `numbers`. */
static void collect_row(const struct whole *w, int64_t r, int64_t start, int64_t at, int64_t numbers) {
    for (int64_t c = w->mirror ? r : 0; c < w->k; c++) {
        double sum = 0;
        for (int64_t p = 0; p < w->count; p++) sum += w->parts[p * numbers + at + c - start];
        w->out[r * w->k + c] = sum;
        if (w->mirror) w->out[c * w->k + r] = sum;
    }
}
