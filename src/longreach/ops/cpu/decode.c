/* A decoding step of ALiBi attention: few queries, which read keys from the nearest on, until the rest is out of reach.

   The weights of the keys from distance d on sum to at most 2^(|q| K - m d) / (1 - 2^-m) by base 2, where K is the
   largest norm among them and m the slope. Where that is no more than the tolerance times what was summed before, they
   are not read. Keys and values of half types are read as they are and computed in float32. */

#include "vectors.h"

enum { KEYS = 64 }; /* keys that share a bound of their norms, and are at hand at a time */
enum { FLOAT32, BFLOAT16, FLOAT16 };

/* Everything of a call. Strides are in numbers, those of a row beside each other; query head n reads n / group. */
struct step {
    const void *q, *k, *v;
    float *out, *lse;      /* (B, H, Tq, D) and (B, H, Tq), dense */
    const float *slopes;   /* (H,) or (B, H) */
    const float *norms;    /* (B, Hkv, Tk / KEYS), upper bounds, dense; NULL: read all keys */
    const uint8_t *hidden; /* (B, Tk), not 0 where a key is padding, dense; NULL without such */
    int64_t q_sequence, q_head, q_row, k_sequence, k_head, k_row, v_sequence, v_head, v_row, slopes_sequence;
    int64_t dtype, batch, kv_heads, group, query_length, key_length, head_dim;
    int64_t window; /* how many keys back a query sees, itself included */
    double scale, tolerance;
    int64_t next, failed; /* the first key head that no thread has taken, and whether one had no memory; 0 at first */
};

int64_t longreach_size_of_step(void) { return sizeof(struct step); }

INLINE vec widened(int64_t dtype, const uint16_t *x) {
#ifdef __AVX512F__
    const __m256i halves = _mm256_loadu_si256((const __m256i *)x);
    if (dtype == FLOAT16) return (vec)_mm512_cvtph_ps(halves);
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#else
    const __m128i halves = _mm_loadu_si128((const __m128i *)x);
    if (dtype == FLOAT16) return (vec)_mm256_cvtph_ps(halves);
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#endif
}

INLINE float sum_of(vec x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#endif
}

/* Rows of any dtype in float32, padded by zeros. */
static void widen(int64_t dtype, const void *x, int64_t x_row, int64_t rows, int64_t dim, float *to, int64_t to_row) {
    for (int64_t r = 0; r < rows; r++, to += to_row) {
        if (dtype == FLOAT32) {
            memcpy(to, (const float *)x + r * x_row, dim * sizeof(float));
            continue;
        }
        const uint16_t *const row = (const uint16_t *)x + r * x_row;
        int64_t d = 0;
        for (; d + LANES <= dim; d += LANES) store(to + d, widened(dtype, row + d));
        if (d < dim) {
            uint16_t last[LANES] = {0};
            memcpy(last, row + d, (dim - d) * sizeof(uint16_t));
            store(to + d, widened(dtype, last));
        }
    }
}

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

/* Add values, each times its weight, to some vectors of sums that are times a factor. Hidden ones are not read. */
INLINE void mix(const int vecs, int64_t keys, const float *weights, const float *v, int64_t v_row, float factor,
                float *sums) {
    vec mixed[4];
    for (int i = 0; i < vecs; i++) mixed[i] = (vec){0}; /* few terms a sum, so that it is rounded the less */
    for (int64_t j = 0; j < keys; j++) {
        if (weights[j] == 0.0f) continue;
        for (int i = 0; i < vecs; i++) mixed[i] += all(weights[j]) * load(v + j * v_row + i * LANES);
    }
    for (int i = 0; i < vecs; i++) store(sums + i * LANES, load(sums + i * LANES) * all(factor) + mixed[i]);
}

/* Add some keys, and their values, to a row. */
static void add_keys(const struct step *s, struct row *r, const float *q, int64_t first, int64_t keys, const float *k,
                     int64_t k_row, const float *v, int64_t v_row, const uint8_t *hidden, float *sums) {
    const int64_t width = padded(s->head_dim);
    const float factor = (float)(s->scale * M_LOG2E);
    float scores[KEYS];
    for (int64_t j = 0; j < KEYS; j++) scores[j] = -INFINITY;
    for (int64_t j = 0; j < keys; j++) {
        const int64_t distance = r->position - first - j;
        if (distance < 0 || distance >= s->window || (hidden && hidden[first + j])) continue;
        vec sum = {0};
        for (int64_t d = 0; d < width; d += LANES) sum += load(q + d) * load(k + j * k_row + d);
        scores[j] = sum_of(sum) * factor - r->slope * (float)distance;
    }
    vec most = all(r->peak), sum = {0};
    for (int64_t j = 0; j < KEYS; j += LANES) most = larger(load(scores + j), most);
    float mosts[LANES], peak = r->peak;
    store(mosts, most);
    for (int64_t l = 0; l < LANES; l++) peak = mosts[l] > peak ? mosts[l] : peak;
    for (int64_t j = 0; j < KEYS; j += LANES) {
        const vec weights = exp2_of(load(scores + j) - all(peak));
        store(scores + j, weights);
        sum += weights;
    }
    const float less = exp2_of(all(r->peak - peak))[0];
    r->peak = peak;
    r->total = r->total * less + sum_of(sum);
    int64_t d = 0;
    for (; d + 4 * LANES <= width; d += 4 * LANES) mix(4, keys, scores, v + d, v_row, less, sums + d);
    for (; d < width; d += LANES) mix(1, keys, scores, v + d, v_row, less, sums + d);
}

/* The queries that read one key head of one sequence. */
static void decode_head(const struct step *s, int64_t sequence, int64_t kv_head, void *memory) {
    const int64_t dim = s->head_dim, width = padded(dim), count = s->group * s->query_length, size = s->dtype ? 2 : 4;
    const int64_t blocks = (s->key_length + KEYS - 1) / KEYS;
    struct row *const rows = memory;
    float *const q = (float *)(rows + count), *const sums = q + count * width, *const near = sums + count * width;
    float *const values = near + KEYS * width, *const longest = values + KEYS * width; /* of a block and those before */
    const char *const k = (const char *)s->k + (sequence * s->k_sequence + kv_head * s->k_head) * size;
    const char *const v = (const char *)s->v + (sequence * s->v_sequence + kv_head * s->v_head) * size;
    const uint8_t *const hidden = s->hidden ? s->hidden + sequence * s->key_length : NULL;
    const int is_direct = s->dtype == FLOAT32 && width == dim;
    for (int64_t i = 0; s->norms && i < blocks; i++) {
        const float norm = s->norms[(sequence * s->kv_heads + kv_head) * blocks + i];
        const int is_less = i && (norm <= longest[i - 1] || longest[i - 1] != longest[i - 1]); /* NaN stays */
        longest[i] = is_less ? longest[i - 1] : norm;
    }
    for (int64_t n = 0; n < count; n++) {
        const int64_t head = kv_head * s->group + n / s->query_length, t = n % s->query_length;
        const char *const at = (const char *)s->q + (sequence * s->q_sequence + head * s->q_head + t * s->q_row) * size;
        const float slope = (float)(s->slopes[sequence * s->slopes_sequence + head] * M_LOG2E);
        widen(s->dtype, at, 0, 1, dim, q + n * width, width);
        vec squares = {0};
        for (int64_t d = 0; d < width; d += LANES) {
            store(sums + n * width + d, (vec){0});
            squares += load(q + n * width + d) * load(q + n * width + d);
        }
        rows[n] = (struct row){
            .position = s->key_length - s->query_length + t,
            .norm = sqrtf(sum_of(squares)) * (float)(s->scale * M_LOG2E * (1 + 0x1p-16)), /* whatever was rounded */
            .slope = slope,
            .peak = -FLT_MAX,
            .tolerated = slope > 0.0f ? s->tolerance * -expm1(-M_LN2 * (double)slope) : -1.0,
        };
    }
    for (int64_t i = blocks - 1; i >= 0; i--) {
        const int64_t first = i * KEYS, keys = s->key_length - first < KEYS ? s->key_length - first : KEYS;
        int64_t left = 0;
        for (int64_t n = 0; n < count; n++) {
            rows[n].done = rows[n].done || is_done(s, rows + n, first + keys - 1, s->norms ? longest + i : NULL);
            left += !rows[n].done;
        }
        if (!left) break;
        const char *const some_k = k + first * s->k_row * size, *const some_v = v + first * s->v_row * size;
        if (!is_direct) {
            widen(s->dtype, some_k, s->k_row, keys, dim, near, width);
            widen(s->dtype, some_v, s->v_row, keys, dim, values, width);
        }
        for (int64_t n = 0; n < count; n++)
            if (!rows[n].done)
                add_keys(s, rows + n, q + n * width, first, keys, is_direct ? (const float *)some_k : near,
                         is_direct ? s->k_row : width, is_direct ? (const float *)some_v : values,
                         is_direct ? s->v_row : width, hidden, sums + n * width);
    }
    for (int64_t n = 0; n < count; n++) {
        const int64_t at = (sequence * s->kv_heads + kv_head) * count + n;
        const float total = rows[n].total;
        for (int64_t d = 0; d < dim; d++) s->out[at * dim + d] = total == 0.0f ? 0.0f : sums[n * width + d] / total;
        s->lse[at] = total == 0.0f ? -INFINITY : (float)((rows[n].peak + log2((double)total)) * M_LN2);
    }
}

/* Decode key heads that no other thread has taken. */
static void decode_some(void *at) {
    struct step *const s = at;
    const int64_t count = s->group * s->query_length, blocks = (s->key_length + KEYS - 1) / KEYS;
    const int64_t numbers = 2 * (count + KEYS) * padded(s->head_dim) + blocks;
    void *const memory = memory_of(count * sizeof(struct row) + numbers * sizeof(float));
    if (!memory) {
        __atomic_store_n(&s->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    const unsigned before = flush_denormals();
    for (;;) {
        const int64_t i = __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED);
        if (i >= s->batch * s->kv_heads) break;
        decode_head(s, i / s->kv_heads, i % s->kv_heads, memory);
    }
    _mm_setcsr(before);
    free(memory);
}

/* Write output and LSE, by so many threads of a region of OpenMP; 0, or 1 where there is no memory for that. */
int64_t longreach_decode(struct step *s, void region(void (*)(void *), void *, unsigned, unsigned), int64_t threads) {
    if (threads > 1)
        region(decode_some, s, (unsigned)threads, 0);
    else
        decode_some(s);
    return s->failed;
}
