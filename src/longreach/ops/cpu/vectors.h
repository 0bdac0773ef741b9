/* Vectors of floats, of the width that the compiler was told, and what else all of the C of attention has in common.

   Weights are powers of 2 of scores that hold log2 e, relative to the largest score of their row (docs/attention.md,
   "Rounding"). Nothing here knows of PyTorch: native.py says what the arguments are, which region threads are of and,
   where step.h asks for objects of Python, what describes them. */

#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
enum { LANES = 16 }; /* numbers in a vector */
#else
enum { LANES = 8 };
#endif

enum { SEQUENCE, HEAD, TOKEN, NUMBER }; /* dimensions of tensors */

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float anywhere __attribute__((vector_size(4 * LANES), aligned(2), may_alias)); /* numbers of half types, too */

INLINE vec load(const float *at) { return *(const anywhere *)at; }
INLINE void store(float *at, vec x) { *(anywhere *)at = x; }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

INLINE vec larger(vec a, vec b) {
#ifdef __AVX512F__
    return (vec)_mm512_max_ps((__m512)a, (__m512)b); /* b where one is NaN */
#else
    const ivec is = a > b;
    return (vec)(((ivec)a & is) | ((ivec)b & ~is));
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

/* 2^x within 1.4 units of 2^-24, and 0 below 2^-126: nothing denormal, which would be slow to multiply. */
INLINE vec exp2_of(vec x) {
    const vec shift = all(0x1.8p23f);
#ifndef __AVX512F__
    const ivec is_small = x < all(-126.0f);
    x = (vec)((ivec)x & ~is_small); /* NaN stays */
#endif
    const vec shifted = x + shift; /* rounded to a whole number, in the last bits */
    const vec whole = shifted - shift, f = x - whole;
    vec p = all(0x1.41fbbcp-13f);
    p = p * f + all(0x1.5f3e54p-10f);
    p = p * f + all(0x1.3b2d4cp-7f);
    p = p * f + all(0x1.c6aee8p-5f);
    p = p * f + all(0x1.ebfbdcp-3f);
    p = p * f + all(0x1.62e430p-1f);
    p = p * f + all(1.0f);
#ifdef __AVX512F__
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)whole); /* 0 for -inf too, though f is NaN then */
#else
    const vec power = (vec)(((ivec)shifted + 127) << 23);
    return (vec)((ivec)(p * power) & ~is_small);
#endif
}

/* Numbers below the normal ones, 1e-38, are 0 until this is undone: they would be slow to multiply. */
INLINE unsigned flush_denormals(void) {
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
}

/* A parallel region of OpenMP, in which so many threads call a function with a pointer. */
typedef void region(void (*)(void *), void *, unsigned, unsigned);

/* Have so many threads, of which the caller is one, take what there is to do at `work` until nothing is left. */
INLINE void share_out(void some(void *), void *work, region *region, int64_t threads) {
    if (threads > 1)
        region(some, work, (unsigned)threads, 0);
    else
        some(work);
}

/* The number of what a thread takes next. */
INLINE int64_t take_next(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

/* Memory of zeros: what pads rows is read, if not used. */
static void *memory_of(int64_t bytes) {
    const int64_t whole = (bytes + 63) / 64 * 64;
    void *const memory = aligned_alloc(64, whole);
    if (memory) memset(memory, 0, whole);
    return memory;
}
