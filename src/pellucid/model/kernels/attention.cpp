// Causal attention with capped logits, forward and backward, where the products are Pellucid's own (see capped.py).
//
// As in FlashAttention-2 (Dao 2023) a block of scores stays in a core's cache from product to product; and because capped
// logits cannot overflow, e^logit is summed without a maximum: no block of keys has to wait for another. A block with no key
// of the queries' documents is left out. All sums are in the order of keys (or of queries), whatever the number of threads.
// Letters: B batch, K key/value heads, T sequence, G query heads for each of them, d head_dim; a row is a (query, head) pair.

#include <cstring>

#include "products.h"

#ifdef OWN_PRODUCTS
static const int64_t QUERIES = 256, KEYS = 512;  // rows and columns of a block of scores

struct Shape {
    int64_t B, K, T, G, d;
    float multiplier, cap;
    int64_t queries() const { return std::max<int64_t>(1, QUERIES / G); }  // of a block
    int64_t blocks() const { return (T + queries() - 1) / queries(); }
};

// The numbers of key/value head bk: in [B, K, T, G, d] of one query (or key) after another, in [B, T, K, G, d] with those of
// the other heads between them.
template <class T>
struct Head {
    T* first;
    int64_t stride;
    T* at(int64_t t) const { return first + t * stride; }
};
template <class T>
static Head<T> by_head(T* x, const Shape& s, int64_t bk, int64_t G) {
    return {x + bk * s.T * G * s.d, G * s.d};
}
template <class T>
static Head<T> by_token(T* x, const Shape& s, int64_t bk, int64_t G) {
    return {x + (bk / s.K * s.T * s.K + bk % s.K) * G * s.d, s.K * G * s.d};
}

template <class T>
static Matrix<T> matrix(const T* first, int64_t outer, int64_t inner) { return {first, outer, inner, nullptr}; }

// out [M, N] = a b', or that added to it, in fp32.
template <class T, class Wanted>
static void times(const Matrix<T>& a, const Matrix<T>& b, float* out, int64_t stride, int64_t M, int64_t N, int64_t K, bool add,
                  const Wanted& wanted) {
    multiply<T, float, false>(a, b, out, stride, M, N, K, add, false, wanted);
}

// Items are spread over the threads where there are enough of them; else each is divided.
template <class Work>
static void each(int64_t items, const Work& work) {
    if (items >= omp_get_max_threads()) {
#pragma omp parallel for schedule(dynamic)
        for (int64_t item = 0; item < items; item++) work(item);
    } else
        for (int64_t item = 0; item < items; item++) work(item);
}

// Queries t0..t1 of one head, and which blocks of keys they may see; pads among the keys are of document -1.
struct Block {
    const int32_t *key_document, *query_document;
    int64_t t0, t1, G, rows;
    Block(const Shape& s, const int32_t* keys, const int32_t* queries, int64_t bk, int64_t block)
        : key_document(keys + bk / s.K * s.T), query_document(queries + bk / s.K * s.T), t0(block * s.queries()),
          t1(std::min(s.T, t0 + s.queries())), G(s.G), rows((t1 - t0) * G) {}

    int64_t query(int64_t row) const { return t0 + row / G; }
    int32_t document(int64_t row) const { return query_document[query(row)]; }

    // What a row may not see because it comes later is left out of products with the keys from s0 on: of the scores, of sums over
    // keys for each row, of sums over rows for each key.
    auto scores(int64_t s0, int64_t d) const {
        return [=, this](int64_t, int64_t r1) { return Part{query(r1 - 1) - s0 + 1, 0, d}; };
    }
    auto over_keys(int64_t s0, int64_t d) const {
        return [=, this](int64_t, int64_t r1) { return Part{d, 0, query(r1 - 1) - s0 + 1}; };
    }
    auto over_rows(int64_t s0, int64_t d) const {
        return [=, this](int64_t key, int64_t) { return Part{d, (s0 + key - t0) * G, rows}; };
    }

    template <class Work>
    void each_block_of_keys(const Work& work) const {
        auto ends = std::minmax_element(query_document + t0, query_document + t1);
        for (int64_t s0 = 0; s0 < t1; s0 += KEYS) {
            int64_t s1 = std::min(t1, s0 + KEYS);
            auto may_be_seen = [&](int32_t document) { return *ends.first <= document && document <= *ends.second; };
            if (std::any_of(key_document + s0, key_document + s1, may_be_seen)) work(s0, s1);
        }
    }
};

// 16 at a time; the quotient by a reciprocal within 2^-14 and one step of Newton: tanh within 4 ulp.
static inline __m512 tangent(__m512 x) {
    const auto all = [](float number) { return _mm512_set1_ps(number); };
    x = _mm512_max_ps(all(-TANH_END), _mm512_min_ps(all(TANH_END), x));  // in this order a NaN stays
    __m512 y = _mm512_mul_ps(x, x), p = all(TANH_P[0]), q = all(TANH_Q[0]);
#pragma GCC unroll 8
    for (int i = 1; i < 7; i++) p = _mm512_fmadd_ps(p, y, all(TANH_P[i]));
#pragma GCC unroll 8
    for (int i = 1; i < 4; i++) q = _mm512_fmadd_ps(q, y, all(TANH_Q[i]));
    __m512 inverse = _mm512_rcp14_ps(q);
    inverse = _mm512_mul_ps(inverse, _mm512_fnmadd_ps(q, inverse, all(2.0f)));
    return _mm512_mul_ps(_mm512_mul_ps(x, p), inverse);
}

// 2^x: the whole part by the exponent, the rest by a polynomial (Cephes' exp2f).
static inline __m512 power_of_two(__m512 x) {
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), rest = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.535336188319500e-4f);
    for (float factor : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f, 2.402264791363012e-1f,
                         6.931472028550421e-1f, 1.0f})
        p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(p, whole);
}

static const float LOG2_E = 1.44269504088896341f;

// Numbers as they are when stored.
static inline __m512 rounded(float, __m512 x) { return x; }
#ifdef __AVX512BF16__
static inline __m512 rounded(bf16, __m512 x) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16);
}
#endif

// Which of 16 keys a row may see: of its own document, no later than its own.
static inline __mmask16 seen(const int32_t* document, int32_t own, int64_t last, int64_t keys) {
    __mmask16 wanted = lanes(std::min(last + 1, keys));
    return _mm512_mask_cmpeq_epi32_mask(wanted, _mm512_maskz_loadu_epi32(wanted, document), _mm512_set1_epi32(own));
}

// Of one row: e^logit of keys 0..keys, of which it may see those up to `last` that are of its own document; returns their sum as
// they are stored, so that a row which sees one key gives that key's value.
template <class T>
static float weigh(const float* product, const int32_t* document, int32_t own, int64_t last, int64_t keys, float multiplier, float cap,
                   T* weight) {
    __m512 inner = _mm512_set1_ps(multiplier / cap), outer = _mm512_set1_ps(cap * LOG2_E), sum = _mm512_setzero_ps();
    int64_t j = 0;
    for (; j <= last && j < keys; j += 16) {
        __m512 bend = tangent(_mm512_mul_ps(_mm512_loadu_ps(product + j), inner));
        __m512 e = _mm512_maskz_mov_ps(seen(document + j, own, last - j, keys - j), power_of_two(_mm512_mul_ps(bend, outer)));
        put(weight + j, 0xffff, e);
        sum = _mm512_add_ps(sum, rounded(T(), e));
    }
    for (; j < keys; j += 16) put(weight + j, 0xffff, _mm512_setzero_ps());
    return _mm512_reduce_add_ps(sum);
}

// The weights anew, and the gradients of the products: weight * (grad . v - grad . out) * slope of the cap.
template <class T>
static void weigh_backward(const float* product, const float* reached, float along, const int32_t* document, int32_t own,
                           int64_t last, int64_t keys, float scale, float multiplier, float cap, T* weight, T* slope) {
    __m512 inner = _mm512_set1_ps(multiplier / cap), outer = _mm512_set1_ps(cap * LOG2_E), one = _mm512_set1_ps(1.0f);
    int64_t j = 0;
    for (; j <= last && j < keys; j += 16) {
        __m512 bend = tangent(_mm512_mul_ps(_mm512_loadu_ps(product + j), inner));
        __m512 w = _mm512_mul_ps(power_of_two(_mm512_mul_ps(bend, outer)), _mm512_set1_ps(scale));
        w = _mm512_maskz_mov_ps(seen(document + j, own, last - j, keys - j), w);
        __m512 steep = _mm512_mul_ps(_mm512_fnmadd_ps(bend, bend, one), _mm512_set1_ps(multiplier));
        __m512 grad = _mm512_sub_ps(_mm512_loadu_ps(reached + j), _mm512_set1_ps(along));
        put(weight + j, 0xffff, w);
        put(slope + j, 0xffff, _mm512_mul_ps(_mm512_mul_ps(w, grad), steep));
    }
    for (; j < keys; j += 16) put(weight + j, 0xffff, _mm512_setzero_ps()), put(slope + j, 0xffff, _mm512_setzero_ps());
}

// out = sum of e^logit v over the keys that a row may see, divided by total = sum of e^logit; zero if it sees none. lost: what rounding
// takes from out, or null. The backward pass needs both: the gradient of a peaked row's logits is a small difference.
template <class T>
static void attention(const T* q, const T* k, const T* v, const int32_t* key_document, const int32_t* query_document, T* out,
                      T* lost, float* total, const Shape& s) {
    each(s.B * s.K * s.blocks(), [&](int64_t item) {
        int64_t bk = item % (s.B * s.K), G = s.G, d = s.d;
        Block block(s, key_document, query_document, bk, s.blocks() - 1 - item / (s.B * s.K));  // the longest first
        int64_t rows = block.rows;
        auto query = by_head(q, s, bk, G), key = by_head(k, s, bk, 1), value = by_token(v, s, bk, 1);
        auto result = by_token(out, s, bk, G);
        float *sums = total + (bk * s.T + block.t0) * G, *sum_v = room<3>(rows * d), *logit = room<4>(rows * KEYS);
        T* weight = (T*)room<5>(rows * KEYS);
        std::memset(sums, 0, rows * sizeof(float));
        std::memset(sum_v, 0, rows * d * sizeof(float));
        block.each_block_of_keys([&](int64_t s0, int64_t s1) {
            times(matrix(query.at(block.t0), d, 1), matrix(key.at(s0), d, 1), logit, KEYS, rows, s1 - s0, d, false,
                  block.scores(s0, d));
#pragma omp parallel for if (!omp_in_parallel())
            for (int64_t r = 0; r < rows; r++) {
                sums[r] += weigh(logit + r * KEYS, block.key_document + s0, block.document(r), block.query(r) - s0, s1 - s0,
                                 s.multiplier, s.cap, weight + r * KEYS);
            }
            times(matrix(weight, KEYS, 1), matrix(value.at(s0), 1, value.stride), sum_v, d, rows, d, s1 - s0, true,
                  block.over_keys(s0, d));
        });
        for (int64_t r = 0; r < rows; r++) {
            float scale = sums[r] == 0 ? 0.0f : 1.0f / sums[r];
            T* y = result.at(block.t0 + r / G) + r % G * d;
            for (int64_t i = 0; i < d; i++) store(y[i], sum_v[r * d + i] * scale);
            for (int64_t i = 0; lost && i < d; i++) store(lost[y - out + i], sum_v[r * d + i] * scale - load(y[i]));
        }
    });
}

// grad_q and grad_k lie by head, grad_v by token; the latter two are sums in fp32.
template <class T>
static void attention_backward(const T* q, const T* k, const T* v, const int32_t* key_document, const int32_t* query_document,
                               const T* out, const T* lost, const float* total, const T* grad_out, T* grad_q, float* grad_k, float* grad_v,
                               const Shape& s) {
    std::memset(grad_k, 0, s.B * s.K * s.T * s.d * sizeof(float));
    std::memset(grad_v, 0, s.B * s.K * s.T * s.d * sizeof(float));
    each(s.B * s.K, [&](int64_t bk) {
        int64_t G = s.G, d = s.d;
        auto query = by_head(q, s, bk, G), key = by_head(k, s, bk, 1), value = by_token(v, s, bk, 1);
        auto result = by_token(out, s, bk, G), grad_result = by_token(grad_out, s, bk, G);
        auto to_query = by_head(grad_q, s, bk, G);
        auto to_key = by_head(grad_k, s, bk, 1), to_value = by_token(grad_v, s, bk, 1);
        for (int64_t b = 0; b < s.blocks(); b++) {
            Block block(s, key_document, query_document, bk, b);
            int64_t rows = block.rows;
            const float* sums = total + (bk * s.T + block.t0) * G;
            float *sum_q = room<3>(rows * d), *logit = room<4>(rows * KEYS), *reached = room<5>(rows * KEYS), *along = room<6>(rows);
            T *weight = (T*)room<7>(rows * KEYS), *slope = (T*)room<8>(rows * KEYS), *grad = (T*)room<9>(rows * d);
            std::memset(sum_q, 0, rows * d * sizeof(float));
            for (int64_t r = 0; r < rows; r++) {
                const T *from = grad_result.at(block.t0 + r / G) + r % G * d, *y = result.at(block.t0 + r / G) + r % G * d;
                std::memcpy(grad + r * d, from, d * sizeof(T));
                float dot = 0;
#pragma omp simd reduction(+ : dot)
                for (int64_t i = 0; i < d; i++) dot += load(from[i]) * load(y[i]);
                if (lost)
#pragma omp simd reduction(+ : dot)
                    for (int64_t i = 0; i < d; i++) dot += load(from[i]) * load(lost[y - out + i]);
                along[r] = dot;
            }
            block.each_block_of_keys([&](int64_t s0, int64_t s1) {
                times(matrix(query.at(block.t0), d, 1), matrix(key.at(s0), d, 1), logit, KEYS, rows, s1 - s0, d, false,
                  block.scores(s0, d));
                times(matrix(grad, d, 1), matrix(value.at(s0), value.stride, 1), reached, KEYS, rows, s1 - s0, d, false,
                      block.scores(s0, d));
#pragma omp parallel for if (!omp_in_parallel())
                for (int64_t r = 0; r < rows; r++) {
                    weigh_backward(logit + r * KEYS, reached + r * KEYS, along[r], block.key_document + s0, block.document(r),
                                   block.query(r) - s0, s1 - s0, sums[r] == 0 ? 0.0f : 1.0f / sums[r], s.multiplier, s.cap,
                                   weight + r * KEYS, slope + r * KEYS);
                }
                times(matrix(weight, 1, KEYS), matrix(grad, 1, d), to_value.at(s0), to_value.stride, s1 - s0, d, rows, true,
                      block.over_rows(s0, d));
                times(matrix(slope, 1, KEYS), matrix(query.at(block.t0), 1, d), to_key.at(s0), d, s1 - s0, d, rows, true,
                      block.over_rows(s0, d));
                times(matrix(slope, KEYS, 1), matrix(key.at(s0), 1, d), sum_q, d, rows, d, s1 - s0, true, block.over_keys(s0, d));
            });
            for (int64_t i = 0; i < rows * d; i++) store(to_query.at(block.t0)[i], sum_q[i]);
        }
    });
}

#define BOTH(name, parameters, call)                                   \
    extern "C" void name##_float parameters { using T = float; call; } \
    IF_BF16(extern "C" void name##_bf16 parameters { using T = bf16; call; })
#ifdef __AVX512BF16__
#define IF_BF16(...) __VA_ARGS__
#else
#define IF_BF16(...)
#endif

BOTH(attention,
     (void* q, void* k, void* v, int32_t* keys, int32_t* queries, void* out, void* lost, float* total, int64_t B, int64_t K, int64_t L,
      int64_t G, int64_t d, float multiplier, float cap),
     attention((T*)q, (T*)k, (T*)v, keys, queries, (T*)out, (T*)lost, total, Shape{B, K, L, G, d, multiplier, cap}))
BOTH(attention_backward,
     (void* q, void* k, void* v, int32_t* keys, int32_t* queries, void* out, void* lost, float* total, void* grad, void* grad_q, float* grad_k,
      float* grad_v, int64_t B, int64_t K, int64_t L, int64_t G, int64_t d, float multiplier, float cap),
     attention_backward((T*)q, (T*)k, (T*)v, keys, queries, (T*)out, (T*)lost, total, (T*)grad, (T*)grad_q, grad_k, grad_v,
                        Shape{B, K, L, G, d, multiplier, cap}))
#endif
