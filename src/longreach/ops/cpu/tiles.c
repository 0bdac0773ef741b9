/* Blocks of queries of ALiBi attention, forward and backward, in float32: no weight leaves the cache.

   The equations are those of products.py, its rounding too (docs/attention.md, "Rounding"): weights are powers of 2 of
   scores that hold log2 e, relative to the largest score of their row, and every dot product is added up in one order,
   whatever rows are beside it, so that what is equal cancels. native.py says what the arguments are; it is compiled once
   for each width of vectors, and knows nothing of Python, PyTorch or threads. */

#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
enum { LANES = 16, ROWS = 8 }; /* numbers in a vector; rows of a product whose sums are in registers */
#else
enum { LANES = 8, ROWS = 6 };
#endif
enum { MOST_ROWS = 128, KEYS = 64 }; /* queries of a block, at most, and keys that are at hand at a time */
enum { COLUMNS = MOST_ROWS + LANES }; /* how far apart rows of scores are: a power of 2 would be slow to read by columns */

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec load(const float *at) { return *(const anywhere *)at; }
INLINE void store(float *at, vec x) { *(anywhere *)at = x; }
INLINE vec all(float x) { return x - (vec){0}; }

/* One head of one sequence. Rows are `_row` numbers apart, the numbers of a row beside each other. */
struct head {
    const float *q, *k, *v;
    const float *falloff;   /* the bias by base 2 of a key at distance d is number key_length - 1 - d */
    const float *hidden;    /* -inf for keys that are padding, else 0; NULL without such */
    float *out, *peak, *total;
    const float *grad_out, *grad_lse; /* the rest is for the backward pass alone */
    float *of_q, *of_k, *of_v;
    int64_t q_row, k_row, v_row, out_row, grad_out_row, of_q_row, of_k_row, of_v_row;
    int64_t head_dim, query_length, key_length;
    double scale;
    double limit; /* share of a row's weights that the backward pass may leave out at either end; < 0: do not ask */
    int64_t causal, slopes_learn;
    double of_left, of_right; /* gradients of the slopes, which are added to */
};

/* Some queries and the keys that they need. */
struct block {
    int64_t row, rows, low, high;
    int64_t needed_low, needed_high; /* what is left of these keys after `limit` */
};

/* What native.py must agree with. */
int64_t longreach_size_of_head(void) { return sizeof(struct head); }
int64_t longreach_most_rows(void) { return MOST_ROWS; }

/* 2^x within 1.4 units of 2^-24, and 0 below 2^-126: nothing denormal, which would be slow to multiply. */
INLINE vec exp2_of(vec x) {
    const vec least = all(-126.0f), shift = all(0x1.8p23f);
    const ivec is_small = x < least;
    const vec kept = (vec)(((ivec)least & is_small) | ((ivec)x & ~is_small)); /* NaN stays */
    const vec shifted = kept + shift; /* rounded to a whole number, in the last bits */
    const vec f = kept - (shifted - shift);
    vec p = all(0x1.41fbbcp-13f);
    p = p * f + all(0x1.5f3e54p-10f);
    p = p * f + all(0x1.3b2d4cp-7f);
    p = p * f + all(0x1.c6aee8p-5f);
    p = p * f + all(0x1.ebfbdcp-3f);
    p = p * f + all(0x1.62e430p-1f);
    p = p * f + all(1.0f);
    const vec power = (vec)(((ivec)shifted + 127) << 23);
    return (vec)((ivec)(p * power) & ~is_small);
}

INLINE vec larger(vec a, vec b) {
    const ivec is = a > b;
    return (vec)(((ivec)a & is) | ((ivec)b & ~is));
}

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

/* Numbers below the normal ones, 1e-38, are 0 until this is undone: they would be slow to multiply. */
static unsigned flush_denormals(void) {
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
}

INLINE int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

/* How far apart rows of head_dim numbers are. */
INLINE int64_t apart(const struct head *h) { return padded(h->head_dim) + LANES; }

static float *memory_of(int64_t numbers) {
    float *const memory = aligned_alloc(64, (numbers * sizeof(float) + 63) / 64 * 64);
    if (memory) memset(memory, 0, numbers * sizeof(float)); /* what pads rows is read, if not used */
    return memory;
}

/* Queries lie in reverse, so that the biases of a key lie in the order of the queries. How many of a block see it. */
INLINE int64_t count_seeing(const struct head *h, const struct block *b, int64_t key) {
    const int64_t before = key - (h->key_length - h->query_length) - b->row;
    return !h->causal || before <= 0 ? b->rows : before < b->rows ? b->rows - before : 0;
}

/* Add the biases of a key to its scores with LANES queries from column c on. */
INLINE vec with_bias(const struct head *h, const struct block *b, const float *scores, int64_t key, int64_t c) {
    const vec s = load(scores + c) + load(h->falloff + (h->query_length - b->row - b->rows) + key + c);
    return h->hidden ? s + all(h->hidden[key]) : s;
}

/* What of the keys of a block the backward pass needs: weights are summed from either end, in blocks of KEYS. */
static void leave_out(const struct head *h, struct block *b, const float *sums, const float *peaks, const float *peak,
                      const float *total) {
    const int64_t count = (b->high - b->low + KEYS - 1) / KEYS;
    for (int end = 0; end < (h->causal ? 1 : 2); end++) {
        float below[MOST_ROWS] = {0};
        int64_t unneeded = 0;
        for (; unneeded < count; unneeded++) {
            const int64_t at = (end ? count - 1 - unneeded : unneeded) * MOST_ROWS;
            int exceeds = 0;
            for (int64_t c = 0; c < b->rows; c += LANES)
                store(below + c, load(below + c) + load(sums + at + c) * exp2_of(load(peaks + at + c) - load(peak + c)));
            for (int64_t c = 0; c < b->rows; c++) exceeds |= !(below[c] <= total[c] * (float)h->limit);
            if (exceeds) break;
        }
        if (end) {
            const int64_t past = b->low + (count - unneeded) * KEYS;
            b->needed_high = past < b->high ? past : b->high;
        } else
            b->needed_low = b->low + unneeded * KEYS < b->high ? b->low + unneeded * KEYS : b->high;
    }
}

static void attend_block(const struct head *h, struct block *b, float *memory) {
    const int64_t dim = h->head_dim, width = padded(dim), row = apart(h), last = b->row + b->rows - 1;
    float *const q = memory, *const out = q + dim * COLUMNS, *const scores = out + MOST_ROWS * row;
    float *const values = scores + KEYS * COLUMNS, *const sums = values + KEYS * row;
    const int64_t count = (b->high - b->low + KEYS - 1) / KEYS;
    float *const peaks = sums + count * MOST_ROWS; /* of each KEYS keys, as sums are */
    float peak[MOST_ROWS], total[MOST_ROWS], factors[MOST_ROWS];
    copy_rows(h->q + last * h->q_row, -h->q_row, b->rows, dim, (float)(h->scale * M_LOG2E), out, row);
    transpose(out, row, b->rows, dim, q);
    memset(out, 0, MOST_ROWS * row * sizeof(float));
    for (int c = 0; c < MOST_ROWS; c++) peak[c] = -FLT_MAX, total[c] = 0.0f;
    for (int64_t i = 0; i < count; i++) {
        const int64_t first = b->low + i * KEYS, keys = b->high - first < KEYS ? b->high - first : KEYS;
        const int64_t rows = count_seeing(h, b, first);
        copy_rows(h->v + first * h->v_row, h->v_row, keys, dim, 1.0f, values, row);
        product(keys, padded(rows), dim, h->k + first * h->k_row, h->k_row, 1, q, COLUMNS, scores, COLUMNS, 0);
        for (int64_t c = 0; c < padded(rows); c += LANES) {
            const vec before = load(peak + c);
            vec most = before, sum = {0};
            for (int64_t j = 0; j < keys; j++) {
                const vec s = with_bias(h, b, scores + j * COLUMNS, first + j, c);
                store(scores + j * COLUMNS + c, s);
                most = larger(s, most);
            }
            for (int64_t j = 0; j < keys; j++) {
                const vec weight = exp2_of(load(scores + j * COLUMNS + c) - most);
                store(scores + j * COLUMNS + c, weight);
                sum += weight;
            }
            const vec factor = exp2_of(before - most);
            store(factors + c, factor);
            store(peak + c, most);
            store(total + c, load(total + c) * factor + sum);
            if (h->limit >= 0) store(sums + i * MOST_ROWS + c, sum), store(peaks + i * MOST_ROWS + c, most);
        }
        for (int64_t c = padded(rows); h->limit >= 0 && c < MOST_ROWS; c++)
            sums[i * MOST_ROWS + c] = 0.0f, peaks[i * MOST_ROWS + c] = -FLT_MAX;
        for (int64_t c = 0; c < rows; c++)
            if (factors[c] != 1.0f)
                for (int64_t d = 0; d < width; d += LANES)
                    store(out + c * row + d, load(out + c * row + d) * all(factors[c]));
        product(rows, width, keys, scores, 1, COLUMNS, values, row, out, row, 1);
    }
    for (int64_t c = 0; c < b->rows; c++) {
        float *const to = h->out + (last - c) * h->out_row;
        const float by = total[c] == 0.0f ? 1.0f : total[c]; /* 0 for rows that see no key */
        for (int64_t d = 0; d < dim; d++) to[d] = out[c * row + d] / by;
        h->peak[last - c] = peak[c];
        h->total[last - c] = total[c];
    }
    b->needed_low = b->low, b->needed_high = b->high;
    if (h->limit >= 0) leave_out(h, b, sums, peaks, peak, total);
}

/* Write output, peak and total of the queries of some blocks; 0, or 1 where there is no memory for that. */
int64_t longreach_attend(const struct head *h, struct block *blocks, int64_t count) {
    int64_t widest = 0;
    for (int64_t i = 0; i < count; i++)
        if (blocks[i].high - blocks[i].low > widest) widest = blocks[i].high - blocks[i].low;
    const int64_t sums = 2 * MOST_ROWS * ((widest + KEYS - 1) / KEYS);
    float *const memory = memory_of((h->head_dim + KEYS) * COLUMNS + (MOST_ROWS + KEYS) * apart(h) + sums);
    if (!memory) return 1;
    const unsigned before = flush_denormals();
    for (int64_t i = 0; i < count; i++) attend_block(h, blocks + i, memory);
    _mm_setcsr(before);
    free(memory);
    return 0;
}

/* Add the gradients of the slopes, -sum_ij dS_ij d_ij over past or over future distances d, of the query in a column.

   Each row of dS sums to the gradient of its LSE, but for rounding in `out`, which distances would magnify. So the excess
   of the sum, times P, is taken from dS. */
static void add_to_slopes(struct head *h, int64_t row, double sums[5][MOST_ROWS], int64_t c) {
    const double share = h->total[row] == 0.0f ? 0.0 : 1.0 / h->total[row];
    const double excess = sums[0][c] - (h->total[row] == 0.0f ? 0.0 : h->grad_lse[row]);
    h->of_left += excess * share * sums[3][c] - sums[1][c];
    h->of_right += excess * share * sums[4][c] - sums[2][c];
}

/* Add up dS, dS d and P d of a key, with past and with future distances d; column 0 has the last position. */
static void add_moments(const float *weights, const float *of_scores, int64_t rows, int64_t position, int64_t key,
                        double sums[5][MOST_ROWS]) {
    for (int64_t c = 0; c < rows; c++) {
        const float distance = (float)(position - c - key), past = distance > 0 ? distance : 0, future = past - distance;
        sums[0][c] += of_scores[c];
        sums[1][c] += of_scores[c] * past;
        sums[2][c] += of_scores[c] * future;
        sums[3][c] += weights[c] * past;
        sums[4][c] += weights[c] * future;
    }
}

static void differentiate_block(struct head *h, const struct block *b, float *memory) {
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
                const vec p = exp2_of(with_bias(h, b, weight, first + j, c) - load(peak + c));
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
    for (int64_t c = 0; h->slopes_learn && c < b->rows; c++) add_to_slopes(h, last - c, moments, c);
    copy_rows(of_q, row, b->rows, dim, (float)h->scale, h->of_q + last * h->of_q_row, -h->of_q_row);
}

/* Write the gradient of the queries of some blocks, and add to those of keys and values; 0, or 1 likewise. */
int64_t longreach_differentiate(struct head *h, const struct block *blocks, int64_t count) {
    const int64_t columns = 2 * h->head_dim + 2 * KEYS, rows = 3 * MOST_ROWS + 2 * KEYS;
    float *const memory = memory_of(columns * COLUMNS + rows * apart(h));
    if (!memory) return 1;
    const unsigned before = flush_denormals();
    for (int64_t i = 0; i < count; i++) differentiate_block(h, blocks + i, memory);
    _mm_setcsr(before);
    free(memory);
    return 0;
}
