/* What a decoding step is given: tensors of Python, which PyTorch describes to C by DLPack, and whether they fit together.

   To look at one from Python takes as long as a row of keys, and a step needs forty looks. */

#include "vectors.h"

enum { KEYS = 64 }; /* keys that share a bound of their norms, and are at hand at a time */
enum { FLOAT32, BFLOAT16, FLOAT16 };

/* DLTensor of DLPack 1 (https://dmlc.github.io/dlpack/latest/c_api.html). Strides are in numbers. */
struct tensor {
    char *data;
    int32_t device, device_number, dimensions;
    uint8_t kind, bits;
    uint16_t lanes;
    const int64_t *shape, *strides;
    uint64_t byte_offset;
};

enum { ON_CPU = 1 };                          /* a device */
enum { FLOATS = 2, BFLOATS = 4, TRUTHS = 6 }; /* kinds of numbers */

/* Describe a tensor of Python; not 0 where that is impossible, with an exception of Python raised. */
typedef int describer(void *object, struct tensor *);

/* Rows of numbers that lie beside each other, from heads of sequences: q, k or v. */
struct rows {
    const char *data;
    int64_t shape[4], strides[4];
};

/* Everything of a call. Python reads the first fields. */
struct step {
    int64_t dtype; /* of q, k, v and the output */
    int64_t key_length, head_dim, cached; /* how many numbers all keys are */
    struct rows q, k, v;
    const float *slopes; /* (H,) or (B, H), dense */
    int64_t slopes_sequence; /* how far the slopes of sequences are apart */
    const float *norms;      /* (B, Hkv, Tk / KEYS), upper bounds; NULL: read all keys */
    int64_t norms_strides[3];
    const uint8_t *hidden; /* (B, Tk), not 0 where a key is padding, dense; NULL without such */
    float *lse;            /* (B, H, Tq), dense; NULL where it is not wanted */
    char *out;             /* (B, H, Tq, D), dense */
    int64_t window;        /* how many keys back a query sees, itself included */
    double scale, tolerance;
};

int64_t longreach_size_of_step(void) { return sizeof(struct step); }

INLINE int64_t blocks_of(const struct step *s) { return (s->k.shape[TOKEN] + KEYS - 1) / KEYS; }

INLINE int holds(const struct tensor *x, int kind, int bits) {
    return x->kind == kind && x->bits == bits && x->lanes == 1;
}

INLINE int has_shape(const struct tensor *x, int dimensions, const int64_t *shape) {
    return x->dimensions == dimensions && !memcmp(x->shape, shape, dimensions * sizeof(*shape));
}

/* Whether its numbers lie in order, with nothing between them. */
INLINE int is_dense(const struct tensor *x) {
    int64_t count = 1;
    for (int i = x->dimensions - 1; i >= 0; i--) {
        if (x->shape[i] != 1 && x->strides[i] != count) return 0;
        count *= x->shape[i];
    }
    return 1;
}

/* Take q, k or v for what it is; 0 where it is none, or empty. */
INLINE int take_rows(struct rows *rows, const struct tensor *x) {
    if (x->dimensions != 4) return 0;
    for (int i = 0; i < 4; i++)
        if (!x->shape[i]) return 0;
    rows->data = x->data;
    memcpy(rows->shape, x->shape, sizeof(rows->shape));
    memcpy(rows->strides, x->strides, sizeof(rows->strides));
    return x->strides[NUMBER] == 1 || x->shape[NUMBER] == 1;
}

enum { UNREADABLE, READABLE, PLAIN };

/* Take what a step is given, all but its output, from tensors of Python. Whoever calls this holds Python's lock.

   UNREADABLE: one is not described, not on the CPU, empty, or not of the shape, dtype and order above.
   PLAIN: there is a slope for each head, finite and not negative, too. */
int64_t longreach_read_step(describer *describe, struct step *s, void *q, void *k, void *v, void *slopes, void *norms,
                            void *hidden, void *lse) {
    enum { Q, K, V, SLOPES, NORMS, HIDDEN, LSE, ALL };
    void *const objects[ALL] = {q, k, v, slopes, norms, hidden, lse};
    struct tensor x[ALL] = {0};
    for (int i = 0; i < ALL; i++) {
        if (!objects[i]) continue;
        if (describe(objects[i], x + i) || x[i].device != ON_CPU || !x[i].data) return UNREADABLE;
        x[i].data += x[i].byte_offset;
    }
    memset(s, 0, sizeof(*s));
    if (!take_rows(&s->q, x + Q) || !take_rows(&s->k, x + K) || !take_rows(&s->v, x + V)) return UNREADABLE;
    for (int i = K; i <= V; i++)
        if (!holds(x + i, x[Q].kind, x[Q].bits)) return UNREADABLE;
    if (holds(x + Q, FLOATS, 32))
        s->dtype = FLOAT32;
    else if (holds(x + Q, FLOATS, 16))
        s->dtype = FLOAT16;
    else if (holds(x + Q, BFLOATS, 16))
        s->dtype = BFLOAT16;
    else
        return UNREADABLE;

    const int64_t batch = s->q.shape[SEQUENCE], heads = s->q.shape[HEAD];
    const int64_t kv_heads = s->k.shape[HEAD], keys = s->k.shape[TOKEN];
    if (memcmp(s->k.shape, s->v.shape, sizeof(s->k.shape)) || s->k.shape[SEQUENCE] != batch) return UNREADABLE;
    if (s->k.shape[NUMBER] != s->q.shape[NUMBER] || heads % kv_heads) return UNREADABLE;

    const int64_t of_heads[] = {batch, heads}, of_norms[] = {batch, kv_heads, blocks_of(s)}, of_hidden[] = {batch, keys};
    const struct tensor *const m = x + SLOPES;
    if (!holds(m, FLOATS, 32) || !is_dense(m)) return UNREADABLE;
    if (!has_shape(m, 1, of_heads + 1) && !has_shape(m, 2, of_heads)) return UNREADABLE;
    s->slopes = (const float *)m->data;
    s->slopes_sequence = m->dimensions == 2 ? heads : 0;
    if (norms) {
        if (!holds(x + NORMS, FLOATS, 32) || !has_shape(x + NORMS, 3, of_norms)) return UNREADABLE;
        s->norms = (const float *)x[NORMS].data;
        memcpy(s->norms_strides, x[NORMS].strides, sizeof(s->norms_strides));
    }
    if (hidden) {
        if (!holds(x + HIDDEN, TRUTHS, 8) || !has_shape(x + HIDDEN, 2, of_hidden) || !is_dense(x + HIDDEN))
            return UNREADABLE;
        s->hidden = (const uint8_t *)x[HIDDEN].data;
    }
    if (lse) {
        if (!holds(x + LSE, FLOATS, 32) || !has_shape(x + LSE, 3, s->q.shape) || !is_dense(x + LSE)) return UNREADABLE;
        s->lse = (float *)x[LSE].data;
    }
    s->key_length = keys, s->head_dim = s->q.shape[NUMBER];
    s->cached = batch * kv_heads * keys * s->head_dim;
    for (int64_t i = 0; i < heads; i++)
        if (!(s->slopes[i] >= 0.0f && s->slopes[i] <= FLT_MAX)) return READABLE;
    return m->dimensions == 1 ? PLAIN : READABLE;
}
