/* By how much the largest scores that queries could have exceed lower bounds of their LSE: `largest_excess` of
   near_reach.py, each number of keys and queries read where it lies. Whatever the centre is, the bound holds. Queries are
   no more than keys. */

#include "vectors.h"

typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

/* Everything of a call. Strides are in numbers, those of a row beside each other; both in bfloat16, or in float32. */
struct near {
    const void *q, *k;
    float *excess; /* (B, H, Tq / block), dense */
    int64_t q_shape[4], q_strides[4], k_shape[4], k_strides[4];
    int64_t is_bfloat16, block;
    double scale;
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
    }
}

/* Write `excess`; 0, or 1 where there is no memory for that. */
int64_t longreach_near(const void *call) {
    struct near n;
    memcpy(&n, call, sizeof(n));
    float *const centre = memory_of(padded(n.k_shape[NUMBER]) * sizeof(float));
    if (!centre) return 1;
    const unsigned before = flush_denormals();
    for (int64_t sequence = 0; sequence < n.k_shape[SEQUENCE]; sequence++)
        for (int64_t head = 0; head < n.k_shape[HEAD]; head++)
            if (n.is_bfloat16)
                of_key_head(1, &n, sequence, head, centre);
            else
                of_key_head(0, &n, sequence, head, centre);
    _mm_setcsr(before);
    free(centre);
    return 0;
}
