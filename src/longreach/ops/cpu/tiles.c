/* Blocks of queries of ALiBi attention, forward and backward, in float32: no weight leaves the cache.

   The equations are those of products.py. It is compiled once for each width of vectors. */

typedef float number;
#include "tiles.h"

#ifdef __AVX512F__
enum { ROWS = 8 }; /* rows of a product whose sums are in registers */
#else
enum { ROWS = 6 };
#endif

/* c (rows x vecs vectors) = a b, or c + a b. Each number of a b is a chain of fused operations along the depth. */
INLINE void small_product(const int rows, const int vecs, int64_t depth, const float *a, int64_t a_row, int64_t a_step,
                          const float *b, int64_t b_row, float *c, int64_t c_row, const int adds) {
    vec sums[ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < vecs; n++) sums[r][n] = (vec){0};
    for (int64_t p = 0; p < depth; p++) {
        vec x[2];
        for (int n = 0; n < vecs; n++) x[n] = load(b + p * b_row + n * LANES);
        for (int r = 0; r < rows; r++) {
            const vec y = all(a[r * a_row + p * a_step]);
            for (int n = 0; n < vecs; n++) sums[r][n] += y * x[n];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < vecs; n++) {
            float *at = c + r * c_row + n * LANES;
            store(at, adds ? load(at) + sums[r][n] : sums[r][n]);
        }
}

#define SOME_ROWS(count, vecs) \
    small_product(count, vecs, depth, a + i * a_row, a_row, a_step, b + j, b_row, c + i * c_row + j, c_row, adds)

INLINE void columns(const int vecs, int64_t j, int64_t m, int64_t depth, const float *a, int64_t a_row, int64_t a_step,
                    const float *b, int64_t b_row, float *c, int64_t c_row, const int adds) {
    int64_t i = 0;
    for (; i + ROWS <= m; i += ROWS) SOME_ROWS(ROWS, vecs);
    for (; i + 4 <= m; i += 4) SOME_ROWS(4, vecs);
    for (; i < m; i++) SOME_ROWS(1, vecs);
}

/* c (m x n) = a b, or c + a b, of a (m x depth) with numbers a_step apart, and b (depth x n); n a multiple of LANES. */
INLINE void product(int64_t m, int64_t n, int64_t depth, const float *a, int64_t a_row, int64_t a_step, const float *b,
                    int64_t b_row, float *c, int64_t c_row, const int adds) {
    int64_t j = 0;
    for (; j + 2 * LANES <= n; j += 2 * LANES) columns(2, j, m, depth, a, a_row, a_step, b, b_row, c, c_row, adds);
    if (j < n) columns(1, j, m, depth, a, a_row, a_step, b, b_row, c, c_row, adds);
}

/* Rows of x times a factor. */
static void copy_rows(const float *x, int64_t x_row, int64_t rows, int64_t dim, float factor, float *to, int64_t to_row) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < dim; d++) to[r * to_row + d] = x[r * x_row + d] * factor;
}

/* Rows, of which there are MOST_ROWS at most, as columns. */
static void transpose(const float *x, int64_t x_row, int64_t rows, int64_t dim, float *to) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < dim; d++) to[d * COLUMNS + r] = x[r * x_row + d];
}

/* How far apart rows of head_dim numbers are. */
INLINE int64_t apart(const struct head *h) { return padded(h->head_dim) + LANES; }

static void attend_block(struct head *h, struct block *b, void *memory) {
    const int64_t dim = h->head_dim, width = padded(dim), row = apart(h), last = b->row + b->rows - 1;
    float *const q = memory, *const out = q + dim * COLUMNS, *const scores = out + MOST_ROWS * row;
    float *const values = scores + KEYS * COLUMNS, *const sums = values + KEYS * row;
    const int64_t steps = steps_of(b);
    float *const peaks = sums + steps * MOST_ROWS; /* of each KEYS keys, as sums are */
    struct running r;
    copy_rows(h->q + last * h->q_row, -h->q_row, b->rows, dim, (float)(h->scale * M_LOG2E), out, row);
    transpose(out, row, b->rows, dim, q);
    memset(out, 0, MOST_ROWS * row * sizeof(float));
    begin(&r);
    for (int64_t i = 0; i < steps; i++) {
        const int64_t first = b->low + i * KEYS, keys = b->high - first < KEYS ? b->high - first : KEYS;
        const int64_t rows = count_seeing(h, b, first), at = i * MOST_ROWS;
        float *const sums_here = h->limit < 0 ? NULL : sums + at;
        copy_rows(h->v + first * h->v_row, h->v_row, keys, dim, 1.0f, values, row);
        product(keys, padded(rows), dim, h->k + first * h->k_row, h->k_row, 1, q, COLUMNS, scores, COLUMNS, 0);
        for (int64_t c = 0; c < padded(rows); c += LANES) {
            const vec most = add_biases(h, b, first, keys, c, 1.0f, scores, load(r.peak + c));
            vec sum = {0};
            for (int64_t j = 0; j < keys; j++) {
                const vec weight = exp2_of(load(scores + j * COLUMNS + c) - most);
                store(scores + j * COLUMNS + c, weight);
                sum += weight;
            }
            count_weights(&r, c, most, sum, sums_here, peaks + at);
        }
        count_none(rows, sums_here, peaks + at);
        for (int64_t c = 0; c < rows; c++)
            if (r.factor[c] != 1.0f)
                for (int64_t d = 0; d < width; d += LANES)
                    store(out + c * row + d, load(out + c * row + d) * all(r.factor[c]));
        product(rows, width, keys, scores, 1, COLUMNS, values, row, out, row, 1);
    }
    for (int64_t c = 0; c < b->rows; c++) {
        float *const to = h->out + (last - c) * h->out_row;
        const float by = r.total[c] == 0.0f ? 1.0f : r.total[c]; /* 0 for rows that see no key */
        for (int64_t d = 0; d < dim; d++) to[d] = out[c * row + d] / by;
    }
    finish(h, b, sums, peaks, &r);
}

/* Compute parts, each block in memory of so many numbers. */
INLINE void compute_some(struct work *work, void block(struct head *, struct block *, void *), int64_t numbers) {
    void *const memory = memory_of(numbers * sizeof(float));
    if (!memory) {
        work->failed = 1;
        return;
    }
    const unsigned before = flush_denormals();
    compute_parts(work, block, memory);
    _mm_setcsr(before);
    free(memory);
}

static void attend_some(void *work) {
    const struct head *const h = ((struct work *)work)->heads; /* as wide as all others */
    const int64_t sums = 2 * MOST_ROWS * ((struct work *)work)->most;
    compute_some(work, attend_block, (h->head_dim + KEYS) * COLUMNS + (MOST_ROWS + KEYS) * apart(h) + sums);
}

static void differentiate_block(struct head *h, struct block *b, void *memory) {
    const int64_t dim = h->head_dim, width = padded(dim), row = apart(h), last = b->row + b->rows - 1;
    float *const q = memory, *const of_out = q + dim * COLUMNS; /* as columns */
    float *const scaled = of_out + dim * COLUMNS, *const grad = scaled + MOST_ROWS * row; /* the same as rows */
    float *const of_q = grad + MOST_ROWS * row, *const weights = of_q + MOST_ROWS * row;
    float *const of_scores = weights + KEYS * COLUMNS, *const near = of_scores + KEYS * COLUMNS;
    float *const of_keys = near + KEYS * row;
    float peak[MOST_ROWS] = {0}, offset[MOST_ROWS] = {0}; /* what dP is less Delta by, with the gradient of the LSE */
    double moments[5][MOST_ROWS] = {{0}};
    copy_rows(h->q + last * h->q_row, -h->q_row, b->rows, dim, (float)(h->scale * M_LOG2E), scaled, row);
    transpose(scaled, row, b->rows, dim, q);
    copy_rows(h->q + last * h->q_row, -h->q_row, b->rows, dim, (float)h->scale, scaled, row);
    for (int64_t c = 0; c < b->rows; c++) {
        /* Weights are relative to the largest one: what they multiply is divided by their sum instead. */
        const float total = h->total[last - c], share = total == 0.0f ? 0.0f : 1.0f / total;
        const float *const out = h->out + (last - c) * h->out_row;
        copy_rows(h->grad_out + (last - c) * h->grad_out_row, 0, 1, dim, share, grad + c * row, row);
        float delta = 0.0f; /* dO_i . o_i, by the same chain as that of dP */
        for (int64_t d = 0; d < dim; d++) delta = fmaf(out[d], grad[c * row + d], delta);
        offset[c] = (total == 0.0f ? 0.0f : h->grad_lse[last - c]) * share - delta;
        peak[c] = h->peak[last - c];
    }
    transpose(grad, row, b->rows, dim, of_out);
    memset(of_q, 0, MOST_ROWS * row * sizeof(float));
    for (int64_t first = b->low; first < b->high; first += KEYS) {
        const int64_t keys = b->high - first < KEYS ? b->high - first : KEYS, rows = count_seeing(h, b, first);
        copy_rows(h->k + first * h->k_row, h->k_row, keys, dim, 1.0f, near, row);
        product(keys, padded(rows), dim, near, row, 1, q, COLUMNS, weights, COLUMNS, 0);
        product(keys, padded(rows), dim, h->v + first * h->v_row, h->v_row, 1, of_out, COLUMNS, of_scores, COLUMNS, 0);
        for (int64_t j = 0; j < keys; j++) {
            float *const weight = weights + j * COLUMNS, *const of_score = of_scores + j * COLUMNS;
            for (int64_t c = 0; c < padded(rows); c += LANES) {
                const vec p = exp2_of(with_bias(h, b, load(weight + c), 1.0f, first + j, c) - load(peak + c));
                store(weight + c, p);
                store(of_score + c, p * (load(of_score + c) + load(offset + c)));
            }
            if (h->slopes_learn)
                add_moments(weight, of_score, rows, last + h->key_length - h->query_length, first + j, moments);
        }
        const float *const by[2] = {of_scores, weights}, *const of[2] = {scaled, grad};
        float *const to[2] = {h->of_k + first * h->of_k_row, h->of_v + first * h->of_v_row};
        const int64_t to_row[2] = {h->of_k_row, h->of_v_row};
        for (int i = 0; i < 2; i++) {
            product(keys, width, rows, by[i], COLUMNS, 1, of[i], row, of_keys, row, 0);
            for (int64_t j = 0; j < keys; j++)
                for (int64_t d = 0; d < dim; d++) to[i][j * to_row[i] + d] += of_keys[j * row + d];
        }
        product(rows, width, keys, of_scores, 1, COLUMNS, near, row, of_q, row, 1);
    }
    for (int64_t c = 0; h->slopes_learn && c < b->rows; c++) {
        const double total = h->total[last - c];
        add_to_slopes(h, last - c, moments, c, total == 0.0 ? 0.0 : 1.0 / total);
    }
    copy_rows(of_q, row, b->rows, dim, (float)h->scale, h->of_q + last * h->of_q_row, -h->of_q_row);
}

static void differentiate_some(void *work) {
    const struct head *const h = ((struct work *)work)->heads;
    const int64_t columns = 2 * h->head_dim + 2 * KEYS, rows = 3 * MOST_ROWS + 2 * KEYS;
    compute_some(work, differentiate_block, columns * COLUMNS + rows * apart(h));
}
