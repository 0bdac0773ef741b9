/* What tiles.c and units.c have in common: what a head and a block of its queries are, and weights of scores.

   Every dot product is added up in one order, whatever rows are beside it, so that what is equal cancels. Who includes
   this says first what a `number` of q, k, v, out and the gradient of out is. */

#include "vectors.h"

enum { MOST_ROWS = 128, KEYS = 64 }; /* queries of a block, at most, and keys that are at hand at a time */
enum { COLUMNS = MOST_ROWS + LANES }; /* how far apart rows of scores are: a power of 2 would be slow to read by columns */

/* One head of one sequence. Rows are `_row` numbers apart, the numbers of a row beside each other. */
struct head {
    const number *q, *k, *v;
    const float *falloff;   /* the bias by base 2 of a key at distance d is number key_length - 1 - d */
    const float *hidden;    /* -inf for keys that are padding, else 0; NULL without such */
    number *out;
    float *peak, *total;
    const number *grad_out; /* the rest is for the backward pass alone */
    const float *grad_lse;
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
    int64_t head; /* number of it among all of all sequences */
    int64_t row, rows, low, high;
    int64_t needed_low, needed_high; /* what is left of these keys after `limit` */
};

/* What threads take parts of: some blocks, which one thread computes in their order. */
struct work {
    struct head *heads;
    struct block *blocks;
    const int64_t *ends;    /* of each part, the number of blocks up to its last */
    int64_t parts, most;    /* how many, and the most steps of KEYS keys that any block takes */
    int64_t next;           /* how many parts are taken */
    _Atomic int failed;     /* whether a thread had no memory */
};

/* By query of a block, the largest score and the sum of weights so far, and what sums of before are to be times. */
struct running {
    float peak[MOST_ROWS], total[MOST_ROWS], factor[MOST_ROWS];
};

/* What native.py must agree with. */
int64_t longreach_size_of_head(void) { return sizeof(struct head); }
int64_t longreach_size_of_block(void) { return sizeof(struct block); }
int64_t longreach_most_rows(void) { return MOST_ROWS; }

INLINE int64_t steps_of(const struct block *b) { return (b->high - b->low + KEYS - 1) / KEYS; }

/* Have threads compute all parts by a function that takes some of them; 0, or 1 where there is no memory for that. */
static int64_t compute(void some(void *), struct head *heads, struct block *blocks, const int64_t *ends, int64_t parts,
                       region *region, int64_t threads) {
    struct work work = {.heads = heads, .blocks = blocks, .ends = ends, .parts = parts};
    for (int64_t i = 0; parts && i < ends[parts - 1]; i++)
        if (steps_of(blocks + i) > work.most) work.most = steps_of(blocks + i);
    share_out(some, &work, region, threads);
    return work.failed;
}

static void attend_some(void *work), differentiate_some(void *work);

/* Write output, peak and total of the queries of blocks; 0 or 1 likewise. */
int64_t longreach_attend(struct head *heads, struct block *blocks, const int64_t *ends, int64_t parts, region *region,
                         int64_t threads) {
    return compute(attend_some, heads, blocks, ends, parts, region, threads);
}

/* Write the gradient of the queries of blocks, and add to those of keys and values; 0 or 1 likewise. The blocks of all
   query heads that read one key head are one part. */
int64_t longreach_differentiate(struct head *heads, struct block *blocks, const int64_t *ends, int64_t parts,
                                region *region, int64_t threads) {
    return compute(differentiate_some, heads, blocks, ends, parts, region, threads);
}

/* Compute the blocks of the parts that nobody has taken, given memory for one. */
INLINE void compute_parts(struct work *work, void block(struct head *, struct block *, void *), void *memory) {
    for (int64_t i; (i = take_next(&work->next)) < work->parts;)
        for (int64_t n = i ? work->ends[i - 1] : 0; n < work->ends[i]; n++)
            block(work->heads + work->blocks[n].head, work->blocks + n, memory);
}

/* Queries lie in reverse, so that the biases of a key lie in the order of the queries. How many of a block see it. */
INLINE int64_t count_seeing(const struct head *h, const struct block *b, int64_t key) {
    const int64_t before = key - (h->key_length - h->query_length) - b->row;
    return !h->causal || before <= 0 ? b->rows : before < b->rows ? b->rows - before : 0;
}

/* Scores of a key with LANES queries from column c on: products times a factor, and the bias. */
INLINE vec with_bias(const struct head *h, const struct block *b, vec products, float factor, int64_t key, int64_t c) {
    const vec s = products * all(factor) + load(h->falloff + (h->query_length - b->row - b->rows) + key + c);
    return h->hidden ? s + all(h->hidden[key]) : s;
}

INLINE void begin(struct running *r) {
    for (int c = 0; c < MOST_ROWS; c++) r->peak[c] = -FLT_MAX, r->total[c] = 0.0f;
}

/* Make scores of the products of some keys with LANES queries from column c on; the largest of them and of `most`. */
INLINE vec add_biases(const struct head *h, const struct block *b, int64_t first, int64_t keys, int64_t c, float factor,
                      float *products, vec most) {
    for (int64_t j = 0; j < keys; j++) {
        const vec s = with_bias(h, b, load(products + j * COLUMNS + c), factor, first + j, c);
        store(products + j * COLUMNS + c, s);
        most = larger(s, most);
    }
    return most;
}

/* Count the sum of weights of some keys, relative to `most`. It is left for `leave_out`, too, unless sums is NULL. */
INLINE void count_weights(struct running *r, int64_t c, vec most, vec sum, float *sums, float *peaks) {
    const vec factor = exp2_of(load(r->peak + c) - most);
    store(r->factor + c, factor);
    store(r->peak + c, most);
    store(r->total + c, load(r->total + c) * factor + sum);
    if (sums) store(sums + c, sum), store(peaks + c, most);
}

/* Likewise for queries that see none of these keys. */
INLINE void count_none(int64_t rows, float *sums, float *peaks) {
    for (int64_t c = padded(rows); sums && c < MOST_ROWS; c++) sums[c] = 0.0f, peaks[c] = -FLT_MAX;
}

/* What of the keys of a block the backward pass needs: weights are summed from either end, in blocks of KEYS. */
static void leave_out(const struct head *h, struct block *b, const float *sums, const float *peaks,
                      const struct running *r) {
    const int64_t count = steps_of(b);
    for (int end = 0; end < (h->causal ? 1 : 2); end++) {
        float below[MOST_ROWS] = {0};
        int64_t unneeded = 0;
        for (; unneeded < count; unneeded++) {
            const int64_t at = (end ? count - 1 - unneeded : unneeded) * MOST_ROWS;
            int exceeds = 0;
            for (int64_t c = 0; c < b->rows; c += LANES) {
                const vec share = exp2_of(load(peaks + at + c) - load(r->peak + c));
                store(below + c, load(below + c) + load(sums + at + c) * share);
            }
            for (int64_t c = 0; c < b->rows; c++) exceeds |= !(below[c] <= r->total[c] * (float)h->limit);
            if (exceeds) break;
        }
        if (end) {
            const int64_t past = b->low + (count - unneeded) * KEYS;
            b->needed_high = past < b->high ? past : b->high;
        } else
            b->needed_low = b->low + unneeded * KEYS < b->high ? b->low + unneeded * KEYS : b->high;
    }
}

/* Leave peak and total of the queries of a block, and what of its keys the backward pass needs. */
static void finish(const struct head *h, struct block *b, const float *sums, const float *peaks,
                   const struct running *r) {
    for (int64_t c = 0; c < b->rows; c++) {
        h->peak[b->row + b->rows - 1 - c] = r->peak[c];
        h->total[b->row + b->rows - 1 - c] = r->total[c];
    }
    b->needed_low = b->low, b->needed_high = b->high;
    if (h->limit >= 0) leave_out(h, b, sums, peaks, r);
}

/* Add the gradients of the slopes, -sum_ij dS_ij d_ij over past or over future distances d, of the query in a column.

   Each row of dS sums to the gradient of its LSE, but for rounding in `out`, which distances would magnify. So the excess
   of the sum, times P, is taken from dS. Sums of P are of weights times `share`. */
static void add_to_slopes(struct head *h, int64_t row, double sums[5][MOST_ROWS], int64_t c, double share) {
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
