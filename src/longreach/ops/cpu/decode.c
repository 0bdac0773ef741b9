/* A decoding step of ALiBi attention: few queries, which read keys from the nearest on, until the rest is out of reach.

   The weights of the keys from distance d on sum to at most 2^(|q| K - m d) / (1 - 2^-m) by base 2, where K is the
   largest norm among them and m the slope. Where that is no more than the tolerance times what was summed before, they
   are not read. Keys and values of half types are read as they are and computed in float32. */

#include "step.h"

enum { PAIR = 2 * LANES }; /* numbers of a row that are read at a time; the last pair holds the last PAIR of a row */

INLINE int64_t size_of(const int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* PAIR numbers in two vectors, each number at the same place whatever row it is of. */
struct pair {
    vec a, b;
};

#ifdef __AVX512F__
INLINE vec widened(const void *x) { return (vec)_mm512_cvtph_ps(_mm256_loadu_si256(x)); }
INLINE void narrow(void *to, vec x) { _mm256_storeu_si256(to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT)); }
#else
INLINE vec widened(const void *x) { return (vec)_mm256_cvtph_ps(_mm_loadu_si128(x)); }
INLINE void narrow(void *to, vec x) { _mm_storeu_si128(to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT)); }
#endif

INLINE struct pair read_pair(const int64_t dtype, const void *x) {
    if (dtype == FLOAT32) return (struct pair){load(x), load((const float *)x + LANES)};
    if (dtype == FLOAT16) return (struct pair){widened(x), widened((const uint16_t *)x + LANES)};
    const ivec both = (ivec)load(x); /* of bfloat16 one vector has every other number, which saves putting in order */
    return (struct pair){(vec)(both << 16), (vec)(both & -0x10000)};
}

/* The nearest bfloat16 in the upper half, and whatever in the lower. */
INLINE ivec rounded(vec x) {
    const ivec is_nan = x != x, bits = (ivec)x & ~is_nan;
    return (bits + 0x7fff + ((bits >> 16) & 1)) | (is_nan & 0x7fc00000);
}

INLINE void write_pair(const int64_t dtype, void *to, struct pair x) {
    if (dtype == FLOAT32) {
        store(to, x.a);
        store((float *)to + LANES, x.b);
    } else if (dtype == FLOAT16) {
        narrow(to, x.a);
        narrow((uint16_t *)to + LANES, x.b);
    } else {
        store(to, (vec)(((rounded(x.a) >> 16) & 0xffff) | (rounded(x.b) & -0x10000)));
    }
}

/* The sum of each of LANES vectors. */
INLINE vec sums_of(const vec *x) {
    vec four[LANES / 4];
    for (int i = 0; i < LANES / 4; i++) { /* a quarter of a vector has one number of each of four */
#ifdef __AVX512F__
        const __m512 *const y = (const __m512 *)x + 4 * i;
        const __m512 ab = _mm512_unpacklo_ps(y[0], y[1]) + _mm512_unpackhi_ps(y[0], y[1]);
        const __m512 cd = _mm512_unpacklo_ps(y[2], y[3]) + _mm512_unpackhi_ps(y[2], y[3]);
        four[i] = (vec)(_mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee));
    }
    const __m512 *const y = (const __m512 *)four;
    const __m512 ab = _mm512_shuffle_f32x4(y[0], y[1], 0x88) + _mm512_shuffle_f32x4(y[0], y[1], 0xdd);
    const __m512 cd = _mm512_shuffle_f32x4(y[2], y[3], 0x88) + _mm512_shuffle_f32x4(y[2], y[3], 0xdd);
    return (vec)(_mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd));
#else
        const __m256 *const y = (const __m256 *)x + 4 * i;
        four[i] = (vec)_mm256_hadd_ps(_mm256_hadd_ps(y[0], y[1]), _mm256_hadd_ps(y[2], y[3]));
    }
    const __m256 *const y = (const __m256 *)four;
    return (vec)(_mm256_permute2f128_ps(y[0], y[1], 0x20) + _mm256_permute2f128_ps(y[0], y[1], 0x31));
#endif
}

INLINE float largest_of(vec x) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)x);
#else
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
#endif
}

INLINE int64_t whole_pairs(int64_t count) { return (count + PAIR - 1) / PAIR * PAIR; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* One query of one head. */
struct row {
    int64_t position;
    float norm, slope, peak, total; /* |q| and the slope by base 2; see `running` in tiles.h */
    double tolerated;               /* times the total, what the nearest of the keys that are left may weigh at most */
    int done;
};

/* Whether this row needs none of the keys up to number `last`, whose norms are `longest` at most. */
static int is_done(const struct step *s, const struct row *r, int64_t last, const float *longest) {
    const int64_t distance = r->position - last;
    if (distance >= s->window) return 1;
    if (!longest || distance <= 0 || !(r->tolerated >= 0.0 && r->total > 0.0f)) return 0;
    const double exponent = (double)r->norm * *longest - (double)r->slope * distance - r->peak;
    return exp2(exponent) <= r->tolerated * r->total;
}

/* Some keys and their values: rows of `dim` numbers, a pair at least, so many bytes apart. */
struct keys {
    int64_t first, count, dim;
    const char *k, *v, *next; /* next: KEYS rows of k that are read after these; NULL without such */
    int64_t k_row, v_row;
};

/* Have a pair of numbers brought near before it is read; there may be none. */
INLINE void fetch_pair(const int64_t dtype, const char *at) {
    for (int64_t i = 0; i < PAIR * size_of(dtype); i += 64) _mm_prefetch(at + i, _MM_HINT_T0);
}

/* The products of a query with LANES keys from number j on; beyond the last that one is taken again. Their values, which
   are read next, are fetched meanwhile. */
INLINE vec products(const int64_t dtype, const float *q, const struct keys *near, int64_t j) {
    const int64_t left = near->count - 1 - j;
    vec sums[LANES];
#pragma GCC unroll 16
    for (int l = 0; l < LANES; l++) sums[l] = (vec){0};
    for (int64_t d = 0; d < near->dim; d += PAIR) {
        const struct pair x = {load(q + d), load(q + d + LANES)};
        const int64_t first = smaller(d, near->dim - PAIR) * size_of(dtype);
        const char *at = near->k + j * near->k_row + first, *next = near->v + j * near->v_row + first;
#pragma GCC unroll 16
        for (int l = 0; l < LANES; l++) {
            const struct pair y = read_pair(dtype, at);
            sums[l] += x.a * y.a;
            sums[l] += x.b * y.b;
            at += l < left ? near->k_row : 0;
            fetch_pair(dtype, next);
            next += l < left ? near->v_row : 0;
        }
    }
    return sums_of(sums);
}

/* Add values, each times its weight, to some pairs of sums that are times a factor. Hidden ones are not read. The keys
   that are read next are fetched meanwhile. */
INLINE void mix(const int64_t dtype, const int pairs, const struct keys *near, int64_t d, const float *weights,
                float factor, float *sums) {
    vec mixed[8]; /* few terms a sum, so that it is rounded the less */
    for (int i = 0; i < 2 * pairs; i++) mixed[i] = (vec){0};
    for (int64_t j = 0; j < near->count; j++) {
        if (weights[j] == 0.0f) continue;
        const int64_t first = smaller(d, near->dim - pairs * PAIR) * size_of(dtype);
        const char *const at = near->v + j * near->v_row + first;
        const char *const next = near->next ? near->next + j * near->k_row + first : at;
        for (int i = 0; i < pairs; i++) {
            const struct pair x = read_pair(dtype, at + i * PAIR * size_of(dtype));
            fetch_pair(dtype, next + i * PAIR * size_of(dtype));
            mixed[2 * i] += all(weights[j]) * x.a;
            mixed[2 * i + 1] += all(weights[j]) * x.b;
        }
    }
    for (int i = 0; i < 2 * pairs; i++) {
        float *const at = sums + d + i * LANES;
        store(at, load(at) * all(factor) + mixed[i]);
    }
}

/* Add some keys, and their values, to a row. */
INLINE void add_keys(const int64_t dtype, const struct step *s, struct row *r, const float *q, const struct keys *near,
                     const uint8_t *hidden, float *sums) {
    const int64_t farthest = r->position - near->first;
    const vec factor = all((float)(s->scale * M_LOG2E)), slope = all(r->slope);
    float scores[KEYS], back[LANES];
    for (int l = 0; l < LANES; l++) back[l] = (float)l;
    for (int64_t j = 0; j < KEYS; j += LANES) {
        if (j >= near->count) {
            store(scores + j, all(-INFINITY));
            continue;
        }
        store(scores + j, products(dtype, q, near, j) * factor - slope * (all((float)(farthest - j)) - load(back)));
        /* Whether all of them are there, and seen. */
        if (!hidden && j + LANES <= near->count && farthest - j < s->window && farthest - j >= LANES - 1) continue;
        for (int64_t l = j; l < j + LANES; l++)
            if (l >= near->count || farthest - l < 0 || farthest - l >= s->window || (hidden && hidden[near->first + l]))
                scores[l] = -INFINITY;
    }
    vec most = all(r->peak), sum = {0};
    for (int64_t j = 0; j < KEYS; j += LANES) most = larger(load(scores + j), most);
    const float peak = largest_of(most);
    for (int64_t j = 0; j < KEYS; j += LANES) {
        const vec weights = exp2_of(load(scores + j) - all(peak));
        store(scores + j, weights);
        sum += weights;
    }
    const float less = exp2_of(all(r->peak - peak))[0];
    r->peak = peak;
    r->total = r->total * less + sum_of(sum);
    int64_t d = 0;
    for (; d + 4 * PAIR <= near->dim; d += 4 * PAIR) mix(dtype, 4, near, d, scores, less, sums);
    for (; d + 2 * PAIR <= near->dim; d += 2 * PAIR) mix(dtype, 2, near, d, scores, less, sums);
    for (; d < near->dim; d += PAIR) mix(dtype, 1, near, d, scores, less, sums);
}

/* Numbers of a row as pairs: what the last one has of the pair before, or lacks, is zeros. */
INLINE void copy_as_pairs(int64_t dim, int64_t size, const char *x, char *to) {
    const int64_t last = whole_pairs(dim) - PAIR, rest = dim - last;
    memcpy(to, x, last * size);
    memset(to + last * size, 0, (PAIR - rest) * size);
    memcpy(to + (whole_pairs(dim) - rest) * size, x + last * size, rest * size);
}

/* Query heads read the key heads in order, as many each: how many queries read one. */
INLINE int64_t rows_of(const struct step *s) { return s->q.shape[HEAD] / s->k.shape[HEAD] * s->q.shape[TOKEN]; }

INLINE const char *row_of(const struct rows *x, int64_t size, int64_t sequence, int64_t head, int64_t row) {
    return x->data + (sequence * x->strides[SEQUENCE] + head * x->strides[HEAD] + row * x->strides[TOKEN]) * size;
}

/* Some of the queries that read one key head of one sequence, from number `from` on. */
INLINE void decode_rows(const int64_t dtype, const struct step *s, int64_t sequence, int64_t kv_head, int64_t from,
                        int64_t count, void *memory) {
    const int64_t dim = s->q.shape[NUMBER], width = whole_pairs(dim), size = size_of(dtype);
    const int64_t last = width - PAIR, rest = dim - last; /* where the last pair begins, and what is new in it */
    const int64_t query_length = s->q.shape[TOKEN], key_length = s->k.shape[TOKEN], blocks = blocks_of(s);
    const int64_t kv_heads = s->k.shape[HEAD], first_head = kv_head * (s->q.shape[HEAD] / kv_heads);
    const int64_t k_row = s->k.strides[TOKEN] * size, v_row = s->v.strides[TOKEN] * size;
    struct row *const rows = memory;
    float *const q = (float *)(rows + count), *const sums = q + count * width;
    float *const longest = sums + count * width; /* of a block and those before */
    char *const copies = (char *)(longest + blocks);
    const char *const k = row_of(&s->k, size, sequence, kv_head, 0), *const v = row_of(&s->v, size, sequence, kv_head, 0);
    const uint8_t *const hidden = s->hidden ? s->hidden + sequence * key_length : NULL;
    const int64_t *const of_norms = s->norms_strides;
    for (int64_t i = 0; s->norms && i < blocks; i++) {
        const float norm = s->norms[sequence * of_norms[0] + kv_head * of_norms[1] + i * of_norms[2]];
        const int is_less = i && (norm <= longest[i - 1] || longest[i - 1] != longest[i - 1]); /* NaN stays */
        longest[i] = is_less ? longest[i - 1] : norm;
    }
    for (int64_t n = 0; n < count; n++) {
        const int64_t head = first_head + (from + n) / query_length, t = (from + n) % query_length;
        const double steep = s->slopes[sequence * s->slopes_sequence + head] * M_LOG2E;
        const float slope = (float)fmin(steep, FLT_MAX); /* infinity times a distance of 0 would be no number */
        float *const own = q + n * width, *const own_sums = sums + n * width; /* whose place its numbers take first */
        copy_as_pairs(dim, size, row_of(&s->q, size, sequence, head, t), (char *)own_sums);
        vec squares = {0};
        for (int64_t d = 0; d < width; d += PAIR) {
            const struct pair x = read_pair(dtype, (char *)own_sums + d * size);
            write_pair(FLOAT32, own + d, x);
            squares += x.a * x.a + x.b * x.b;
        }
        memset(own_sums, 0, width * sizeof(float));
        rows[n] = (struct row){
            .position = key_length - query_length + t,
            /* Whatever was rounded, and squares that count as 0. */
            .norm = sqrtf(sum_of(squares) + dim * FLT_MIN) * (float)(s->scale * M_LOG2E * (1 + 0x1p-16)),
            .slope = slope,
            .peak = -FLT_MAX,
            .tolerated = slope > 0.0f ? s->tolerance * -expm1(-M_LN2 * (double)slope) : -1.0,
        };
    }
    for (int64_t i = blocks - 1; i >= 0; i--) {
        const int64_t first = i * KEYS, keys = smaller(key_length - first, KEYS);
        int64_t left = 0;
        for (int64_t n = 0; n < count; n++) {
            rows[n].done = rows[n].done || is_done(s, rows + n, first + keys - 1, s->norms ? longest + i : NULL);
            left += !rows[n].done;
        }
        if (!left) break;
        const char *const at = k + first * k_row;
        struct keys near = {first, keys, dim, at, v + first * v_row, i ? at - KEYS * k_row : NULL, k_row, v_row};
        if (dim < PAIR) {
            const int64_t row = PAIR * size;
            for (int64_t j = 0; j < keys; j++) {
                copy_as_pairs(dim, size, near.k + j * k_row, copies + j * row);
                copy_as_pairs(dim, size, near.v + j * v_row, copies + (KEYS + j) * row);
            }
            near = (struct keys){first, keys, PAIR, copies, copies + KEYS * row, NULL, row, row};
        }
        for (int64_t n = 0; n < count; n++)
            if (!rows[n].done) add_keys(dtype, s, rows + n, q + n * width, &near, hidden, sums + n * width);
    }
    for (int64_t n = 0; n < count; n++) {
        const int64_t at = (sequence * s->q.shape[HEAD] + first_head) * query_length + from + n;
        const float total = rows[n].total;
        float *const own = sums + n * width; /* whose place the output takes before it is copied */
        for (int64_t d = 0; d < width; d += PAIR) {
            const vec by = all(total == 0.0f ? 1.0f : total); /* sums are 0 where that is */
            const struct pair x = {load(own + d) / by, load(own + d + LANES) / by};
            write_pair(dtype, (char *)own + d * size, x);
        }
        char *const out = s->out + at * dim * size;
        memcpy(out, own, last * size);
        memcpy(out + last * size, (char *)own + (width - rest) * size, rest * size);
        if (s->lse) s->lse[at] = total == 0.0f ? -INFINITY : (float)((rows[n].peak + log2((double)total)) * M_LN2);
    }
}

/* A step that threads share. */
struct shared_step {
    struct step step;
    int64_t parts;       /* how many the queries of a key head are cut into, so that each thread has some */
    int64_t next;        /* how many parts threads have taken */
    _Atomic int failed;  /* whether one had no memory */
};

/* Decode what no other thread has taken, the last heads first: they see farthest by the usual slopes. */
static void decode_some(void *at) {
    struct shared_step *const shared = at;
    const struct step *const s = &shared->step;
    const int64_t dim = s->q.shape[NUMBER], rows = rows_of(s), kv_heads = s->k.shape[HEAD];
    const int64_t most = (rows + shared->parts - 1) / shared->parts, copied = dim < PAIR ? 2 * KEYS * PAIR : 0;
    const int64_t numbers = 2 * most * whole_pairs(dim) + blocks_of(s) + copied;
    void *const memory = memory_of(most * sizeof(struct row) + numbers * sizeof(float));
    if (!memory) {
        shared->failed = 1;
        return;
    }
    const unsigned before = flush_denormals();
    for (;;) {
        const int64_t i = s->k.shape[SEQUENCE] * kv_heads * shared->parts - 1 - take_next(&shared->next);
        if (i < 0) break;
        const int64_t sequence = i / shared->parts / kv_heads, kv_head = i / shared->parts % kv_heads;
        const int64_t from = i % shared->parts * most, count = smaller(rows - from, most);
        if (count <= 0) continue;
        if (s->dtype == FLOAT32) decode_rows(FLOAT32, s, sequence, kv_head, from, count, memory);
        if (s->dtype == BFLOAT16) decode_rows(BFLOAT16, s, sequence, kv_head, from, count, memory);
        if (s->dtype == FLOAT16) decode_rows(FLOAT16, s, sequence, kv_head, from, count, memory);
    }
    _mm_setcsr(before);
    free(memory);
}

/* Write output and LSE of what was read, by no more than so many threads of a region of OpenMP; 0, or 1 where there is
   no memory for that. */
int64_t longreach_decode(const struct step *given, void *out, int64_t window, double scale, double tolerance,
                         region *region, int64_t threads) {
    struct shared_step shared = {.step = *given};
    struct step *const s = &shared.step;
    s->out = out;
    s->window = window;
    s->scale = scale;
    s->tolerance = tolerance * (1 - 0x1p-8); /* less what the bound itself is rounded by */
    const int64_t heads = s->k.shape[SEQUENCE] * s->k.shape[HEAD];
    threads = smaller(threads, heads * rows_of(s));
    shared.parts = smaller((threads + heads - 1) / heads, rows_of(s));
    share_out(decode_some, &shared, region, threads);
    return shared.failed;
}
