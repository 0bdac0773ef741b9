/* Blocks of queries of ALiBi attention, forward and backward, in bfloat16 by the matrix units of AMX.

   A unit multiplies two tiles of 16 rows of 64 bytes: `a` has rows of 32 numbers of the depth, and row p of `b` the
   numbers 2p and 2p + 1 of the depth of each of 16 columns beside each other, as a pair. They are added up in float32 in
   one order. Keys are rows of scores, so that weights of two keys make the rows of pairs for the product with V, and
   rows of weights those of `a` for the gradients of keys. Weights and gradients of scores are rounded to bfloat16 for
   that; what is summed over a row of weights is not. */

#include <stdint.h>

typedef uint16_t number; /* the bits of a bfloat16 */
#include "tiles.h"

#include <sys/syscall.h>
#include <unistd.h>

enum { SIDE = 16, DEPTH = 32, ROW = 64 }; /* rows and columns, and depth, of tiles; bytes of a row */

/* Whether the system lets this process have the units: asked for once, for all threads. */
int64_t longreach_may_compute(void) {
    const long request_permission = 0x1023, of_tiles = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return syscall(SYS_arch_prctl, request_permission, of_tiles) == 0;
}

static void open_units(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = ROW, shape.rows[i] = SIDE;
    _tile_loadconfig(&shape);
}

/* m x n tiles (1 or 2 each) of c = a b, or c + a b. Rows are `_row` bytes apart. */
INLINE void some_tiles(const int m, const int n, int64_t steps, const char *a, int64_t a_row, const char *b, int64_t b_row,
                       char *c, int64_t c_row, const int adds) {
    __asm__ volatile("" ::: "memory"); /* compilers do not know that tiles read memory */
    if (adds) {
        _tile_loadd(0, c, c_row);
        if (n > 1) _tile_loadd(1, c + ROW, c_row);
        if (m > 1) _tile_loadd(2, c + SIDE * c_row, c_row);
        if (m > 1 && n > 1) _tile_loadd(3, c + SIDE * c_row + ROW, c_row);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t i = 0; i < steps; i++, a += ROW, b += SIDE * b_row) {
        _tile_loadd(4, a, a_row);
        _tile_loadd(6, b, b_row);
        _tile_dpbf16ps(0, 4, 6);
        if (n > 1) {
            _tile_loadd(7, b + ROW, b_row);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (m > 1) {
            _tile_loadd(5, a + SIDE * a_row, a_row);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (m > 1 && n > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_row);
    if (n > 1) _tile_stored(1, c + ROW, c_row);
    if (m > 1) _tile_stored(2, c + SIDE * c_row, c_row);
    if (m > 1 && n > 1) _tile_stored(3, c + SIDE * c_row + ROW, c_row);
}

/* c (m x n) = a b, or c + a b, of whole tiles; `_row` is what lies from row to row, in numbers of each. */
static void product(int64_t m, int64_t n, int64_t depth, const number *a, int64_t a_row, const uint32_t *b, int64_t b_row,
                    float *c, int64_t c_row, const int adds) {
    for (int64_t i = 0; i < m; i += 2 * SIDE)
        for (int64_t j = 0; j < n; j += 2 * SIDE) {
            const char *const rows = (const char *)(a + i * a_row), *const columns = (const char *)(b + j);
            char *const to = (char *)(c + i * c_row + j);
#define SOME_TILES(m, n) some_tiles(m, n, depth / DEPTH, rows, 2 * a_row, columns, 4 * b_row, to, 4 * c_row, adds)
            if (m - i > SIDE && n - j > SIDE)
                SOME_TILES(2, 2);
            else if (m - i > SIDE)
                SOME_TILES(2, 1);
            else if (n - j > SIDE)
                SOME_TILES(1, 2);
            else
                SOME_TILES(1, 1);
        }
}

/* Those of the lanes of a vector that hold so many numbers. */
INLINE uint32_t lanes_of(int64_t numbers) { return numbers >= 32 ? ~0u : numbers > 0 ? (1u << numbers) - 1 : 0; }

/* Rows, in whole vectors; those past `rows` are zeros up to `of`. */
static void copy_rows(const number *x, int64_t x_row, int64_t rows, int64_t of, int64_t dim, number *to, int64_t to_row) {
    for (int64_t r = 0; r < of; r++)
        for (int64_t d = 0; d < to_row; d += DEPTH) {
            const __m512i numbers = _mm512_maskz_loadu_epi16(lanes_of(r < rows ? dim - d : 0), x + r * x_row + d);
            _mm512_storeu_si512(to + r * to_row + d, numbers);
        }
}

/* Numbers of two rows, 16 in each half, as pairs. */
INLINE __m512i in_pairs(__m512i halves) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, halves);
}

/* The numbers of two vectors rounded to bfloat16, one vector after the other. */
INLINE __m512i rounded(vec low, vec high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

/* Rows as rows of pairs. */
static void pair_rows(const number *x, int64_t rows, int64_t dim, uint32_t *to) {
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t d = 0; d < dim; d += SIDE) {
            const __m256i even = _mm256_loadu_si256((const __m256i *)(x + r * dim + d));
            const __m256i odd = _mm256_loadu_si256((const __m256i *)(x + (r + 1) * dim + d));
            const __m512i halves = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
            _mm512_storeu_si512(to + r / 2 * dim + d, in_pairs(halves));
        }
}

/* Exchange what is off the diagonal in 16 rows of 16: of blocks of 8, then within them of 4, 2 and 1. */
INLINE void transpose_16(__m512i x[SIDE]) {
    const __m512i at = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
    for (int step = 8; step; step /= 2) {
        const __mmask16 odd = _mm512_test_epi32_mask(at, _mm512_set1_epi32(step));
        /* from 16 on numbers are of the second vector */
        const __m512i low = _mm512_mask_add_epi32(at, odd, at, _mm512_set1_epi32(SIDE - step));
        const __m512i high = _mm512_mask_add_epi32(_mm512_add_epi32(at, _mm512_set1_epi32(step)), odd, at,
                                                   _mm512_set1_epi32(SIDE));
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++)
            if (!(i & step)) {
                const __m512i first = x[i], second = x[i + step];
                x[i] = _mm512_permutex2var_epi32(first, low, second);
                x[i + step] = _mm512_permutex2var_epi32(first, high, second);
            }
    }
}

/* Columns of pairs as rows. */
static void transpose(const void *x, int64_t x_row, int64_t rows, int64_t columns, void *to, int64_t to_row) {
    for (int64_t r = 0; r < rows; r += SIDE)
        for (int64_t c = 0; c < columns; c += SIDE) {
            __m512i some[SIDE];
#pragma GCC unroll 16
            for (int i = 0; i < SIDE; i++) some[i] = _mm512_loadu_si512((const uint32_t *)x + (r + i) * x_row + c);
            transpose_16(some);
#pragma GCC unroll 16
            for (int i = 0; i < SIDE; i++) _mm512_storeu_si512((uint32_t *)to + (c + i) * to_row + r, some[i]);
        }
}

/* What blocks of queries use, one after the other. */
struct memory {
    int64_t dim;           /* head_dim in whole tiles, how far apart rows of that are */
    number *queries;       /* [MOST_ROWS, dim], in reverse */
    uint32_t *of_queries;  /* [dim / 2, COLUMNS], pairs of a query in a column */
    number *keys, *values; /* [KEYS, dim] */
    uint32_t *paired;      /* [KEYS / 2, dim], pairs of values or, in the backward pass, of keys */
    number *turned;        /* [dim, KEYS], the same as columns */
    float *scores;         /* [KEYS, COLUMNS] */
    uint32_t *weights;     /* [KEYS / 2, COLUMNS], pairs of weights, or of gradients of scores */
    float *sums;           /* [dim, COLUMNS], of the output, or of the gradients of queries */
    float *of_steps;       /* see `leave_out`; the rest is for the backward pass alone */
    number *grads, *outs;  /* [MOST_ROWS, dim], in reverse */
    uint32_t *of_grads;    /* [dim / 2, COLUMNS] */
    uint32_t *paired_queries, *paired_grads;  /* [MOST_ROWS / 2, dim] */
    float *of_weights;                        /* [KEYS, COLUMNS] */
    number *rows_of_weights, *rows_of_scores; /* [KEYS, MOST_ROWS], P and dS */
    float *of_keys;                           /* [KEYS, dim] */
};

static void *take(uintptr_t *at, int64_t bytes) {
    void *const taken = (void *)*at;
    *at += (bytes + 63) / 64 * 64;
    return taken;
}

/* Lay it out from an address on; how many bytes that takes. */
static int64_t lay_out(struct memory *m, void *from, int64_t head_dim, int64_t steps, int differentiates) {
    uintptr_t at = (uintptr_t)from;
    const int64_t dim = m->dim = (head_dim + DEPTH - 1) / DEPTH * DEPTH;
    m->queries = take(&at, MOST_ROWS * dim * sizeof(number));
    m->of_queries = take(&at, dim / 2 * COLUMNS * sizeof(uint32_t));
    m->keys = take(&at, KEYS * dim * sizeof(number));
    m->values = take(&at, KEYS * dim * sizeof(number));
    m->paired = take(&at, KEYS / 2 * dim * sizeof(uint32_t));
    m->turned = take(&at, dim * KEYS * sizeof(number));
    m->scores = take(&at, KEYS * COLUMNS * sizeof(float));
    m->weights = take(&at, KEYS / 2 * COLUMNS * sizeof(uint32_t));
    m->sums = take(&at, dim * COLUMNS * sizeof(float));
    m->of_steps = take(&at, 2 * steps * MOST_ROWS * sizeof(float));
    if (differentiates) {
        m->grads = take(&at, MOST_ROWS * dim * sizeof(number));
        m->outs = take(&at, MOST_ROWS * dim * sizeof(number));
        m->of_grads = take(&at, dim / 2 * COLUMNS * sizeof(uint32_t));
        m->paired_queries = take(&at, MOST_ROWS / 2 * dim * sizeof(uint32_t));
        m->paired_grads = take(&at, MOST_ROWS / 2 * dim * sizeof(uint32_t));
        m->of_weights = take(&at, KEYS * COLUMNS * sizeof(float));
        m->rows_of_weights = take(&at, KEYS * MOST_ROWS * sizeof(number));
        m->rows_of_scores = take(&at, KEYS * MOST_ROWS * sizeof(number));
        m->of_keys = take(&at, KEYS * dim * sizeof(float));
    }
    return at - (uintptr_t)from;
}

/* Copy the rows of a block of queries, the last one first, and turn them into columns of pairs. */
static void take_queries(const struct head *h, const struct block *b, const number *x, int64_t row, int64_t dim,
                         number *rows, uint32_t *columns) {
    copy_rows(x + (b->row + b->rows - 1) * row, -row, b->rows, MOST_ROWS, h->head_dim, rows, dim);
    transpose(rows, dim / 2, MOST_ROWS, dim / 2, columns, COLUMNS);
}

static void take_keys(const struct head *h, const struct memory *m, int64_t first, int64_t keys) {
    copy_rows(h->k + first * h->k_row, h->k_row, keys, KEYS, h->head_dim, m->keys, m->dim);
    copy_rows(h->v + first * h->v_row, h->v_row, keys, KEYS, h->head_dim, m->values, m->dim);
}

/* Turn rows of keys or of values into columns, by way of pairs. */
static void turn(const number *rows, const struct memory *m) {
    pair_rows(rows, KEYS, m->dim, m->paired);
    transpose(m->paired, m->dim, KEYS / 2, m->dim, m->turned, KEYS / 2);
}

/* 16 rows, from number d on, of the sums of the queries from column c on, each times the factor of its query. */
INLINE void turn_sums(const struct memory *m, int64_t c, int64_t d, vec factor, __m512i rows[SIDE]) {
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++) rows[i] = (__m512i)(load(m->sums + (d + i) * COLUMNS + c) * factor);
    transpose_16(rows);
}

/* Multiply the sums of some queries by what their weights have become less by. */
INLINE void lessen_sums(const struct memory *m, int64_t c, vec factor) {
    if (_mm512_cmpeq_ps_mask((__m512)factor, (__m512)all(1.0f)) == 0xffff) return;
    for (int64_t d = 0; d < m->dim; d++) store(m->sums + d * COLUMNS + c, load(m->sums + d * COLUMNS + c) * factor);
}

/* Make weights of the scores of some keys, none for those past the last; the sum of weights. */
INLINE vec weigh(const struct memory *m, int64_t keys, int64_t c, vec most) {
    vec sum = {0};
    for (int64_t j = 0; j < KEYS; j += 2) {
        const vec even = j < keys ? exp2_of(load(m->scores + j * COLUMNS + c) - most) : (vec){0};
        const vec odd = j + 1 < keys ? exp2_of(load(m->scores + (j + 1) * COLUMNS + c) - most) : (vec){0};
        _mm512_storeu_si512(m->weights + j / 2 * COLUMNS + c, in_pairs(rounded(even, odd)));
        sum += even + odd;
    }
    return sum;
}

static void attend_block(struct head *h, struct block *b, void *memory) {
    const struct memory *const m = memory;
    const int64_t dim = padded(h->head_dim), steps = steps_of(b), last = b->row + b->rows - 1;
    float *const sums = m->of_steps, *const peaks = sums + steps * MOST_ROWS;
    struct running r;
    take_queries(h, b, h->q, h->q_row, m->dim, m->queries, m->of_queries);
    memset(m->sums, 0, m->dim * COLUMNS * sizeof(float));
    begin(&r);
    for (int64_t i = 0; i < steps; i++) {
        const int64_t first = b->low + i * KEYS, keys = b->high - first < KEYS ? b->high - first : KEYS;
        const int64_t rows = padded(count_seeing(h, b, first)), at = i * MOST_ROWS;
        float *const sums_here = h->limit < 0 ? NULL : sums + at;
        take_keys(h, m, first, keys);
        turn(m->values, m);
        product(KEYS, rows, m->dim, m->keys, m->dim, m->of_queries, COLUMNS, m->scores, COLUMNS, 0);
        for (int64_t c = 0; c < rows; c += LANES) {
            const float factor = (float)(h->scale * M_LOG2E);
            const vec most = add_biases(h, b, first, keys, c, factor, m->scores, load(r.peak + c));
            count_weights(&r, c, most, weigh(m, keys, c, most), sums_here, peaks + at);
            lessen_sums(m, c, load(r.factor + c));
        }
        count_none(rows, sums_here, peaks + at);
        product(dim, rows, KEYS, m->turned, KEYS, m->weights, COLUMNS, m->sums, COLUMNS, 1);
    }
    for (int64_t c = 0; c < b->rows; c += SIDE)
        for (int64_t d = 0; d < h->head_dim; d += SIDE) {
            const vec total = load(r.total + c), share = all(1.0f) / total;
            const ivec is_some = total != (vec){0}; /* 0 for rows that see no key */
            __m512i rows[SIDE];
            turn_sums(m, c, d, (vec)((ivec)share & is_some), rows);
            for (int64_t i = 0; i < SIDE && c + i < b->rows; i++)
                _mm256_mask_storeu_epi16(h->out + (last - c - i) * h->out_row + d, lanes_of(h->head_dim - d),
                                         (__m256i)_mm512_cvtneps_pbh((__m512)rows[i]));
        }
    finish(h, b, sums, peaks, &r);
}

/* Compute parts by matrix units. */
INLINE void compute_some(struct work *work, void block(struct head *, struct block *, void *), int differentiates) {
    const int64_t head_dim = work->heads->head_dim, steps = differentiates ? 0 : work->most; /* of all heads */
    struct memory m;
    void *const memory = memory_of(lay_out(&m, NULL, head_dim, steps, differentiates));
    if (!memory) {
        work->failed = 1;
        return;
    }
    lay_out(&m, memory, head_dim, steps, differentiates);
    const unsigned before = flush_denormals();
    open_units();
    compute_parts(work, block, &m);
    _tile_release();
    _mm_setcsr(before);
    free(memory);
}

static void attend_some(void *work) { compute_some(work, attend_block, 0); }

/* dO_i . o_i of each query, as the units add up dO_i . v_j: the diagonal of their product. */
static void multiply_outs(const struct head *h, const struct block *b, const struct memory *m, float *deltas) {
    float tile[SIDE * SIDE];
    const number *const last = h->out + (b->row + b->rows - 1) * h->out_row;
    copy_rows(last, -h->out_row, b->rows, MOST_ROWS, h->head_dim, m->outs, m->dim);
    for (int64_t c = 0; c < MOST_ROWS; c += SIDE) {
        product(SIDE, SIDE, m->dim, m->outs + c * m->dim, m->dim, m->of_grads + c, COLUMNS, tile, SIDE, 0);
        for (int64_t i = 0; i < SIDE; i++) deltas[c + i] = tile[i * SIDE + i];
    }
}

/* P and dS of some keys and LANES queries from column c on, of scores and dP: as rows, and dS as pairs of keys. */
INLINE void weigh_again(const struct head *h, const struct block *b, const struct memory *m, int64_t first, int64_t keys,
                        int64_t c, vec peak, vec share, vec offset) {
    const float factor = (float)(h->scale * M_LOG2E);
    for (int64_t j = 0; j < KEYS; j += 2) {
        vec p[2] = {{0}}, of_score[2] = {{0}};
        for (int64_t i = 0; i < 2 && j + i < keys; i++) {
            float *const score = m->scores + (j + i) * COLUMNS + c, *const of_weight = m->of_weights + (j + i) * COLUMNS + c;
            p[i] = exp2_of(with_bias(h, b, load(score), factor, first + j + i, c) - peak) * share;
            of_score[i] = p[i] * (load(of_weight) + offset);
            if (h->slopes_learn) store(score, p[i]), store(of_weight, of_score[i]);
        }
        const __m512i both = rounded(p[0], p[1]), of_both = rounded(of_score[0], of_score[1]);
        number *const at = m->rows_of_weights + j * MOST_ROWS + c, *const of = m->rows_of_scores + j * MOST_ROWS + c;
        _mm256_storeu_si256((__m256i *)at, _mm512_castsi512_si256(both));
        _mm256_storeu_si256((__m256i *)(at + MOST_ROWS), _mm512_extracti64x4_epi64(both, 1));
        _mm256_storeu_si256((__m256i *)of, _mm512_castsi512_si256(of_both));
        _mm256_storeu_si256((__m256i *)(of + MOST_ROWS), _mm512_extracti64x4_epi64(of_both, 1));
        _mm512_storeu_si512(m->weights + j / 2 * COLUMNS + c, in_pairs(of_both));
    }
}

/* Add a product with the rows of all queries to rows of a gradient. */
static void add_to_keys(const struct head *h, const struct memory *m, const number *weights, const uint32_t *paired,
                        int64_t rows, int64_t keys, float factor, float *to, int64_t to_row) {
    product(KEYS, padded(h->head_dim), rows, weights, MOST_ROWS, paired, m->dim, m->of_keys, m->dim, 0);
    for (int64_t j = 0; j < keys; j++)
        for (int64_t d = 0; d < h->head_dim; d++) to[j * to_row + d] += factor * m->of_keys[j * m->dim + d];
}

static void differentiate_block(struct head *h, struct block *b, void *memory) {
    const struct memory *const m = memory;
    const int64_t dim = padded(h->head_dim), last = b->row + b->rows - 1;
    float peak[MOST_ROWS], share[MOST_ROWS], offset[MOST_ROWS], deltas[MOST_ROWS];
    double moments[5][MOST_ROWS] = {{0}};
    take_queries(h, b, h->q, h->q_row, m->dim, m->queries, m->of_queries);
    take_queries(h, b, h->grad_out, h->grad_out_row, m->dim, m->grads, m->of_grads);
    pair_rows(m->queries, MOST_ROWS, m->dim, m->paired_queries);
    pair_rows(m->grads, MOST_ROWS, m->dim, m->paired_grads);
    memset(m->sums, 0, m->dim * COLUMNS * sizeof(float));
    multiply_outs(h, b, m, deltas);
    for (int64_t c = 0; c < MOST_ROWS; c++) {
        const float total = c < b->rows ? h->total[last - c] : 0.0f;
        peak[c] = total == 0.0f ? FLT_MAX : h->peak[last - c]; /* no weight where there is no query */
        share[c] = total == 0.0f ? 0.0f : 1.0f / total;
        offset[c] = total == 0.0f ? 0.0f : h->grad_lse[last - c] - deltas[c];
    }
    for (int64_t first = b->low; first < b->high; first += KEYS) {
        const int64_t keys = b->high - first < KEYS ? b->high - first : KEYS;
        const int64_t rows = (count_seeing(h, b, first) + DEPTH - 1) / DEPTH * DEPTH; /* those past it have no weight */
        take_keys(h, m, first, keys);
        turn(m->keys, m);
        product(KEYS, rows, m->dim, m->keys, m->dim, m->of_queries, COLUMNS, m->scores, COLUMNS, 0);
        product(KEYS, rows, m->dim, m->values, m->dim, m->of_grads, COLUMNS, m->of_weights, COLUMNS, 0);
        for (int64_t c = 0; c < rows; c += LANES)
            weigh_again(h, b, m, first, keys, c, load(peak + c), load(share + c), load(offset + c));
        for (int64_t j = 0; h->slopes_learn && j < keys; j++)
            add_moments(m->scores + j * COLUMNS, m->of_weights + j * COLUMNS, rows,
                        last + h->key_length - h->query_length, first + j, moments);
        float *const of_k = h->of_k + first * h->of_k_row, *const of_v = h->of_v + first * h->of_v_row;
        add_to_keys(h, m, m->rows_of_scores, m->paired_queries, rows, keys, (float)h->scale, of_k, h->of_k_row);
        add_to_keys(h, m, m->rows_of_weights, m->paired_grads, rows, keys, 1.0f, of_v, h->of_v_row);
        product(dim, rows, KEYS, m->turned, KEYS, m->weights, COLUMNS, m->sums, COLUMNS, 1);
    }
    for (int64_t c = 0; h->slopes_learn && c < b->rows; c++) add_to_slopes(h, last - c, moments, c, 1.0);
    for (int64_t c = 0; c < b->rows; c += SIDE)
        for (int64_t d = 0; d < h->head_dim; d += SIDE) {
            __m512i rows[SIDE];
            turn_sums(m, c, d, all((float)h->scale), rows);
            for (int64_t i = 0; i < SIDE && c + i < b->rows; i++)
                _mm512_mask_storeu_epi32(h->of_q + (last - c - i) * h->of_q_row + d, lanes_of(h->head_dim - d), rows[i]);
        }
}

static void differentiate_some(void *work) { compute_some(work, differentiate_block, 1); }
