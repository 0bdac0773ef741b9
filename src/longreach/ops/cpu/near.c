/* Which keys are within reach of blocks of queries: `near_ranges` of near_reach.py, each number of keys and queries read
   where it lies. Whatever the centre is, the bound holds. Queries are no more than keys. */

#include "vectors.h"

typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

/* Everything of a call. Strides are in numbers, those of a row beside each other; both in bfloat16, or in float32. */
struct near {
    const void *q, *k;
    const float *left, *right; /* slopes (H,) or (B, H), whose sequences lie as far apart as said below */
    float *excess;             /* by how much scores may exceed the LSE, (B, H, Tq / block), dense */
    int32_t *starts, *ends;    /* likewise the first block of keys within reach, and one past the last */
    int64_t q_shape[4], q_strides[4], k_shape[4], k_strides[4];
    int64_t left_sequence, right_sequence;
    int64_t is_bfloat16, causal, block, key_block; /* of so many queries, and keys */
    double scale, log_mass; /* log of the mass that may be dropped at either end */
    double of_radius, of_all, of_score, of_lse; /* the slack for rounding: three factors, and a number */
};

int64_t longreach_size_of_near(void) { return sizeof(struct near); }

/* LANES numbers of a row from number d on, zeros after its last. */
INLINE vec numbers(const int is_bfloat16, const void *row, int64_t d, int64_t dim) {
    const int64_t size = is_bfloat16 ? 2 : 4, count = dim - d;
    const char *const at = (const char *)row + d * size;
    if (is_bfloat16) {
        halves x = {0};
        if (count < LANES)
            memcpy(&x, at, count * size);
        else
            memcpy(&x, at, sizeof(x));
        return (vec)(__builtin_convertvector(x, ivec) << 16);
    }
    if (count >= LANES) return load((const float *)at);
    vec x = {0};
    memcpy(&x, at, count * size);
    return x;
}

/* The larger one, and NaN once there was one. */
INLINE double larger_of(double most, double x) { return x > most || x != x ? x : most; }

/* The log of the sum of weights, relative to the first, that fall off by a slope, less that of what may be dropped. */
static double log_excess_of_sum(const struct near *n, double slope) {
    const double keys = (double)n->k_shape[TOKEN];
    return log(slope == 0.0 ? keys : expm1(-slope * keys) / expm1(-slope)) - n->log_mass;
}

/* How many positions away the last key is that queries of some excess need. */
static int64_t needed(const struct near *n, double slope, double log_sum, double excess) {
    const double distance = ceil((excess + log_sum) / slope) - 1, keys = (double)n->k_shape[TOKEN];
    return distance < keys ? (int64_t)(distance > 0.0 ? distance : 0.0) : n->k_shape[TOKEN]; /* all where it is NaN */
}

/* The keys within reach of each block of one head. */
static void find_ranges(const struct near *n, int64_t sequence, int64_t head) {
    const int64_t keys = n->k_shape[TOKEN], queries = n->q_shape[TOKEN], blocks = (queries + n->block - 1) / n->block;
    const double left = n->left[sequence * n->left_sequence + head] * (1 - n->of_all);
    const double right = n->right[sequence * n->right_sequence + head] * (1 - n->of_all);
    const double of_left = log_excess_of_sum(n, left), of_right = n->causal ? 0.0 : log_excess_of_sum(n, right);
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t at = (sequence * n->q_shape[HEAD] + head) * blocks + i;
        const int64_t first = keys - queries + i * n->block, next = first + n->block < keys ? first + n->block : keys;
        const int64_t start = first - needed(n, left, of_left, n->excess[at]);
        const int64_t past = n->causal ? keys : next + needed(n, right, of_right, n->excess[at]);
        n->starts[at] = (int32_t)((start > 0 ? start : 0) / n->key_block);
        n->ends[at] = (int32_t)(((past < keys ? past : keys) + n->key_block - 1) / n->key_block);
    }
}

/* All queries of the query heads of one key head. */
INLINE void of_key_head(const int is_bfloat16, const struct near *n, int64_t sequence, int64_t kv_head, float *centre) {
    const int64_t dim = n->k_shape[NUMBER], keys = n->k_shape[TOKEN], queries = n->q_shape[TOKEN];
    const int64_t size = is_bfloat16 ? 2 : 4, k_row = n->k_strides[TOKEN] * size, q_row = n->q_strides[TOKEN] * size;
    const int64_t group = n->q_shape[HEAD] / n->k_shape[HEAD], blocks = (queries + n->block - 1) / n->block;
    const char *const k = (const char *)n->k + (sequence * n->k_strides[SEQUENCE] + kv_head * n->k_strides[HEAD]) * size;
    vec squares = {0};
    for (int64_t d = 0; d < dim; d += LANES) {
        vec sums[4] = {{0}}; /* of every fourth key */
        for (int64_t j = 0; j < keys; j++) sums[j % 4] += numbers(is_bfloat16, k + j * k_row, d, dim);
        const vec mean = (sums[0] + sums[1] + sums[2] + sums[3]) / all((float)keys);
        store(centre + d, mean);
        squares += mean * mean;
    }
    double radius = 0.0;
    for (int64_t j = 0; j < keys; j++) {
        vec sum = {0};
        for (int64_t d = 0; d < dim; d += LANES) {
            const vec x = numbers(is_bfloat16, k + j * k_row, d, dim) - load(centre + d);
            sum += x * x;
        }
        radius = larger_of(radius, sum_of(sum));
    }
    radius = sqrt(radius + dim * FLT_MIN); /* squares below that are none */
    const double wide = radius * (1 + n->of_radius), longest = radius + sqrt(sum_of(squares));
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        const char *const q = (const char *)n->q + (sequence * n->q_strides[SEQUENCE] + head * n->q_strides[HEAD]) * size;
        float *const excess = n->excess + (sequence * n->q_shape[HEAD] + head) * blocks;
        for (int64_t i = 0; i < blocks; i++) {
            const int64_t past = (i + 1) * n->block < queries ? (i + 1) * n->block : queries;
            double most = -INFINITY;
            for (int64_t r = i * n->block; r < past; r++) {
                vec square = {0}, product = {0};
                for (int64_t d = 0; d < dim; d += LANES) {
                    const vec x = numbers(is_bfloat16, q + r * q_row, d, dim);
                    square += x * x;
                    product += x * (numbers(is_bfloat16, k + (keys - queries + r) * k_row, d, dim) - load(centre + d));
                }
                const double norm = sqrt(sum_of(square) + dim * FLT_MIN) * n->scale, bound = norm * wide;
                const double lse = sum_of(product) * n->scale - norm * longest * n->of_score - n->of_lse;
                most = larger_of(most, bound - lse + n->of_all * (bound + fabs(lse)));
            }
            excess[i] = (float)(most + n->of_all * fabs(most)); /* not rounded below */
        }
        find_ranges(n, sequence, head);
    }
}

/* What threads take key heads of. */
struct shared_near {
    struct near near;
    int64_t next;       /* how many are taken */
    _Atomic int failed; /* whether a thread had no memory */
};

static void find_some(void *at) {
    struct shared_near *const shared = at;
    const struct near *const n = &shared->near;
    float *const centre = memory_of(padded(n->k_shape[NUMBER]) * sizeof(float));
    if (!centre) {
        shared->failed = 1;
        return;
    }
    const unsigned before = flush_denormals();
    for (int64_t i; (i = take_next(&shared->next)) < n->k_shape[SEQUENCE] * n->k_shape[HEAD];) {
        const int64_t sequence = i / n->k_shape[HEAD], head = i % n->k_shape[HEAD];
        if (n->is_bfloat16)
            of_key_head(1, n, sequence, head, centre);
        else
            of_key_head(0, n, sequence, head, centre);
    }
    _mm_setcsr(before);
    free(centre);
}

/* Write excess, starts and ends by so many threads; 0, or 1 where there is no memory for that. */
int64_t longreach_near(const void *call, region *region, int64_t threads) {
    struct shared_near shared = {.next = 0};
    memcpy(&shared.near, call, sizeof(shared.near));
    share_out(find_some, &shared, region, threads);
    return shared.failed;
}
