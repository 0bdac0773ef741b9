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

INLINE float largest_in(vec x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

INLINE float sum_in(vec x) {
    float halves[LANES];
    memcpy(halves, &x, sizeof x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) halves[i] += halves[i + width];
    return halves[0];
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

/* `rows` rows of x times `factor`, in rows of `width`, of which the last are 0. */
static void copy_rows(const float *x, int64_t x_row, int64_t rows, int64_t head_dim, float factor, float *to, int64_t width) {
    for (int64_t r = 0; r < rows; r++, x += x_row, to += width) {
        for (int64_t d = 0; d < head_dim; d++) to[d] = x[d] * factor;
        for (int64_t d = head_dim; d < width; d++) to[d] = 0.0f;
    }
}

/* Likewise as columns, KEYS of them, of which the last are 0. */
static void transpose_rows(const float *x, int64_t x_row, int64_t rows, int64_t head_dim, float *to) {
    for (int64_t r = 0; r < KEYS; r++)
        for (int64_t d = 0; d < head_dim; d++) to[d * KEYS + r] = r < rows ? x[r * x_row + d] : 0.0f;
}

/* Numbers below the normal ones, 1e-38, are 0 until this is undone: they would be slow to multiply. */
static unsigned flush_denormals(void) {
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
}

INLINE int64_t padded(int64_t head_dim) { return (head_dim + LANES - 1) / LANES * LANES; }

static float *memory_of(int64_t numbers) { return aligned_alloc(64, (numbers * sizeof(float) + 63) / 64 * 64); }

/* The first row of a block that sees a key. */
INLINE int64_t first_row(const struct head *h, const struct block *b, int64_t key) {
    const int64_t row = key - (h->key_length - h->query_length) - b->row;
    return h->causal && row > 0 ? (row < b->rows ? row : b->rows) : 0;
}

/* The bias of row r of a block from a key on. */
INLINE const float *bias_at(const struct head *h, const struct block *b, int64_t r, int64_t key) {
    return h->falloff + (h->query_length - 1 - b->row - r) + key;
}

/* The largest score of a row, `width` of whose KEYS are keys, to which the bias is added here. */
INLINE float add_bias(const struct head *h, float *scores, const float *bias, int64_t key, int64_t width) {
    if (width == KEYS && !h->hidden) {
        vec most = all(-INFINITY);
        for (int n = 0; n < KEYS; n += LANES) {
            const vec s = load(scores + n) + load(bias + n);
            store(scores + n, s);
            most = larger(s, most);
        }
        return largest_in(most);
    }
    float most = -INFINITY;
    for (int64_t n = 0; n < KEYS; n++) {
        scores[n] = n < width ? scores[n] + bias[n] + (h->hidden ? h->hidden[key + n] : 0.0f) : -INFINITY;
        most = scores[n] > most ? scores[n] : most;
    }
    return most;
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
            for (int64_t r = 0; r < b->rows; r += LANES) {
                vec now = load(below + r) + load(sums + at + r) * exp2_of(load(peaks + at + r) - load(peak + r));
                store(below + r, now);
            }
            for (int64_t r = 0; r < b->rows; r++) exceeds |= !(below[r] <= total[r] * (float)h->limit);
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
    const int64_t dim = h->head_dim, width = padded(dim), count = (b->high - b->low + KEYS - 1) / KEYS;
    float *const q = memory, *const out = q + MOST_ROWS * width, *const scores = out + MOST_ROWS * width;
    float *const keys = scores + MOST_ROWS * KEYS, *const values = keys + KEYS * width;
    float *const sums = values + KEYS * width, *const peaks = sums + count * MOST_ROWS; /* of each KEYS keys */
    float peak[MOST_ROWS], total[MOST_ROWS];
    copy_rows(h->q + b->row * h->q_row, h->q_row, b->rows, dim, (float)(h->scale * M_LOG2E), q, width);
    memset(out, 0, b->rows * width * sizeof(float));
    for (int r = 0; r < MOST_ROWS; r++) peak[r] = -FLT_MAX, total[r] = 0.0f;
    for (int64_t i = 0; i < count; i++) {
        const int64_t key = b->low + i * KEYS, now = b->high - key < KEYS ? b->high - key : KEYS;
        const int64_t first = first_row(h, b, key);
        transpose_rows(h->k + key * h->k_row, h->k_row, now, dim, keys);
        copy_rows(h->v + key * h->v_row, h->v_row, now, dim, 1.0f, values, width);
        product(b->rows - first, KEYS, dim, q + first * width, width, 1, keys, KEYS, scores + first * KEYS, KEYS, 0);
        if (h->limit >= 0)
            for (int r = 0; r < MOST_ROWS; r++) sums[i * MOST_ROWS + r] = 0.0f, peaks[i * MOST_ROWS + r] = -FLT_MAX;
        for (int64_t r = first; r < b->rows; r++) {
            float *const of_row = scores + r * KEYS;
            const float most = add_bias(h, of_row, bias_at(h, b, r, key), key, now);
            if (most > peak[r]) {
                const vec factor = exp2_of(all(peak[r] - most));
                total[r] *= factor[0];
                for (int64_t d = 0; d < width; d += LANES) store(out + r * width + d, load(out + r * width + d) * factor);
                peak[r] = most;
            }
            vec sum = {0};
            for (int n = 0; n < KEYS; n += LANES) {
                const vec weight = exp2_of(load(of_row + n) - all(peak[r]));
                store(of_row + n, weight);
                sum += weight;
            }
            const float of_keys = sum_in(sum);
            total[r] += of_keys;
            if (h->limit >= 0) sums[i * MOST_ROWS + r] = of_keys, peaks[i * MOST_ROWS + r] = peak[r];
        }
        product(b->rows - first, width, now, scores + first * KEYS, KEYS, 1, values, width, out + first * width, width, 1);
    }
    for (int64_t r = 0; r < b->rows; r++) {
        float *const to = h->out + (b->row + r) * h->out_row;
        const float by = total[r] == 0.0f ? 1.0f : total[r]; /* 0 for rows that see no key */
        for (int64_t d = 0; d < dim; d++) to[d] = out[r * width + d] / by;
        h->peak[b->row + r] = peak[r];
        h->total[b->row + r] = total[r];
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
    float *const memory = memory_of((2 * MOST_ROWS + 2 * KEYS) * padded(h->head_dim) + MOST_ROWS * KEYS + sums);
    if (!memory) return 1;
    const unsigned before = flush_denormals();
    for (int64_t i = 0; i < count; i++) attend_block(h, blocks + i, memory);
    _mm_setcsr(before);
    free(memory);
    return 0;
}

/* Add the gradients of the slopes, -sum_ij dS_ij d_ij over past or over future distances d.

   Each row of dS sums to the gradient of its LSE, but for rounding in `out`, which distances would magnify. So the excess
   of the sum, times P, is taken from dS. */
static void add_to_slopes(struct head *h, int64_t row, const double *sums) {
    const double of_lse = h->total[row] == 0.0f ? 0.0 : h->grad_lse[row], excess = sums[0] - of_lse;
    const double share = h->total[row] == 0.0f ? 0.0 : 1.0 / h->total[row];
    h->of_left += excess * share * sums[3] - sums[1];
    h->of_right += excess * share * sums[4] - sums[2];
}

/* Sums over KEYS from a key on of dS, dS d and P d, with past and with future distances d, added to those of a row. */
static void add_moments(const float *weights, const float *of_scores, int64_t position, int64_t key, double *sums) {
    float now[5] = {0};
    for (int n = 0; n < KEYS; n++) {
        const float distance = (float)(position - key - n), past = distance > 0 ? distance : 0, future = past - distance;
        now[0] += of_scores[n];
        now[1] += of_scores[n] * past;
        now[2] += of_scores[n] * future;
        now[3] += weights[n] * past;
        now[4] += weights[n] * future;
    }
    for (int i = 0; i < 5; i++) sums[i] += now[i];
}

static void differentiate_block(struct head *h, const struct block *b, float *memory) {
    const int64_t dim = h->head_dim, width = padded(dim), own = b->row;
    float *const by_2 = memory, *const scaled = by_2 + MOST_ROWS * width, *const grad = scaled + MOST_ROWS * width;
    float *const of_q = grad + MOST_ROWS * width, *const weights = of_q + MOST_ROWS * width;
    float *const of_scores = weights + MOST_ROWS * KEYS, *const keys = of_scores + MOST_ROWS * KEYS;
    float *const columns_k = keys + KEYS * width, *const columns_v = columns_k + KEYS * width;
    float *const of_keys = columns_v + KEYS * width;
    float offset[MOST_ROWS]; /* what dP is less Delta_i = dO_i . o_i by, with the gradient of the LSE */
    double moments[MOST_ROWS][5] = {{0}};
    copy_rows(h->q + own * h->q_row, h->q_row, b->rows, dim, (float)(h->scale * M_LOG2E), by_2, width);
    copy_rows(h->q + own * h->q_row, h->q_row, b->rows, dim, (float)h->scale, scaled, width);
    memset(of_q, 0, b->rows * width * sizeof(float));
    for (int64_t r = 0; r < b->rows; r++) {
        /* Weights are relative to the largest one: what they multiply is divided by their sum instead. */
        const float total = h->total[own + r], share = total == 0.0f ? 0.0f : 1.0f / total;
        const float *const out = h->out + (own + r) * h->out_row;
        copy_rows(h->grad_out + (own + r) * h->grad_out_row, 0, 1, dim, share, grad + r * width, width);
        float delta = 0.0f; /* the same chain as that of dP */
        for (int64_t d = 0; d < dim; d++) delta = fmaf(out[d], grad[r * width + d], delta);
        offset[r] = (total == 0.0f ? 0.0f : h->grad_lse[own + r]) * share - delta;
    }
    for (int64_t key = b->low; key < b->high; key += KEYS) {
        const int64_t now = b->high - key < KEYS ? b->high - key : KEYS, first = first_row(h, b, key);
        const int64_t rows = b->rows - first, from = first * width, at = first * KEYS;
        transpose_rows(h->k + key * h->k_row, h->k_row, now, dim, columns_k);
        transpose_rows(h->v + key * h->v_row, h->v_row, now, dim, columns_v);
        copy_rows(h->k + key * h->k_row, h->k_row, now, dim, 1.0f, keys, width);
        product(rows, KEYS, dim, by_2 + from, width, 1, columns_k, KEYS, weights + at, KEYS, 0);
        product(rows, KEYS, dim, grad + from, width, 1, columns_v, KEYS, of_scores + at, KEYS, 0);
        for (int64_t r = first; r < b->rows; r++) {
            add_bias(h, weights + r * KEYS, bias_at(h, b, r, key), key, now);
            const vec peak = all(h->peak[own + r]), less = all(offset[r]);
            for (int n = 0; n < KEYS; n += LANES) {
                float *const weight = weights + r * KEYS + n, *const of_score = of_scores + r * KEYS + n;
                const vec p = exp2_of(load(weight) - peak);
                store(weight, p);
                store(of_score, p * (load(of_score) + less));
            }
            if (h->slopes_learn) {
                const int64_t position = h->key_length - h->query_length + own + r;
                add_moments(weights + r * KEYS, of_scores + r * KEYS, position, key, moments[r]);
            }
        }
        const float *const by[2] = {of_scores + at, weights + at}, *const of[2] = {scaled + from, grad + from};
        float *const to[2] = {h->of_k + key * h->of_k_row, h->of_v + key * h->of_v_row};
        const int64_t to_row[2] = {h->of_k_row, h->of_v_row};
        for (int i = 0; i < 2; i++) {
            product(now, width, rows, by[i], 1, KEYS, of[i], width, of_keys, width, 0);
            for (int64_t r = 0; r < now; r++)
                for (int64_t d = 0; d < dim; d++) to[i][r * to_row[i] + d] += of_keys[r * width + d];
        }
        product(rows, width, now, of_scores + at, KEYS, 1, keys, width, of_q + from, width, 1);
    }
    for (int64_t r = 0; h->slopes_learn && r < b->rows; r++) add_to_slopes(h, own + r, moments[r]);
    for (int64_t r = 0; r < b->rows; r++)
        for (int64_t d = 0; d < dim; d++) h->of_q[(own + r) * h->of_q_row + d] = of_q[r * width + d] * (float)h->scale;
}

/* Write the gradient of the queries of some blocks, and add to those of keys and values; 0, or 1 likewise. */
int64_t longreach_differentiate(struct head *h, const struct block *blocks, int64_t count) {
    float *const memory = memory_of((4 * MOST_ROWS + 4 * KEYS) * padded(h->head_dim) + 2 * MOST_ROWS * KEYS);
    if (!memory) return 1;
    const unsigned before = flush_denormals();
    for (int64_t i = 0; i < count; i++) differentiate_block(h, blocks + i, memory);
    _mm_setcsr(before);
    free(memory);
    return 0;
}
