// What lies between the matrix products of a layer, each in one pass over memory. Compiled by native.py on first use.
//
// Every function has a plain PyTorch twin beside its caller, and a test that they agree. Tensors are contiguous, rows by
// columns, in float or bf16 (the name's ending); all arithmetic is float. Rows go to threads; sums over rows are taken
// in a fixed number of blocks, so that results do not depend on the number of threads.
// No -ffast-math: a NaN that comes in comes out.
// Letters: N rows, D hidden, F intermediate, V vocabulary, S keys, d head_dim, G query heads per key head.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "numbers.h"

static const int64_t SMALL = 8;  // rows that are not worth a second thread

// --------------------------------------------------------------------------------------------- products of one row

// A weight as it meets numbers of type T: fp32 masters are rounded to bf16 first.
template <class T, class W>
static inline float meeting(W weight) { return load(weight); }
template <>
inline float meeting<bf16, float>(float weight) {
    bf16 rounded;
    store(rounded, weight);
    return load(rounded);
}

// y[n] = x . weight[n], each one sum of the same order whatever the number of threads: the weight is read once, from end to end.
template <class T, class W>
static void one_row(const T* x, const W* weight, int64_t stride, T* y, int64_t N, int64_t K) {
    const int64_t LANES = 32, FAR = 8192;  // bytes: of bf16 the processor itself does not fetch enough before its turn
    std::vector<float> wide(K);
    for (int64_t k = 0; k < K; k++) wide[k] = load(x[k]);
#pragma omp parallel for if (N * K > 128 * 1024)
    for (int64_t n = 0; n < N; n++) {
        const W* row = weight + n * stride;
        const float* by = wide.data();
        float sums[LANES] = {}, total = 0;
        int64_t k = 0;
        for (; k + LANES <= K; k += LANES) {
            if (sizeof(W) == 2) __builtin_prefetch((const char*)(row + k) + FAR);
#pragma omp simd
            for (int64_t i = 0; i < LANES; i++) sums[i] += by[k + i] * meeting<T>(row[k + i]);
        }
        for (int64_t i = 0; k + i < K; i++) sums[i] += by[k + i] * meeting<T>(row[k + i]);
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < LANES; i++) total += sums[i];
        store(y[n], total);
    }
}

// ------------------------------------------------------------------------------------------------------- RMSNorm

template <class T>
static void rms_norm(const T* x, const float* weight, T* y, float* scale_N, int64_t N, int64_t D, float eps) {
#pragma omp parallel for if (N > SMALL)
    for (int64_t n = 0; n < N; n++) {
        const T* row = x + n * D;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < D; i++) squares += load(row[i]) * load(row[i]);
        float scale = 1.0f / std::sqrt(squares / D + eps);
        scale_N[n] = scale;
#pragma omp simd
        for (int64_t i = 0; i < D; i++) store(y[n * D + i], load(row[i]) * scale * weight[i]);
    }
}

// grad_x = scale * (g - x_hat * mean(g * x_hat)) with g = grad_y * weight; weight_blocks [blocks, D] sums grad_y * x_hat.
template <class T>
static void rms_norm_backward(const T* grad_y, const T* x, const float* weight, const float* scale_N, T* grad_x,
                              float* weight_blocks, int64_t N, int64_t D, int64_t blocks) {
    int64_t rows = (N + blocks - 1) / blocks;
#pragma omp parallel for if (N > SMALL)
    for (int64_t block = 0; block < blocks; block++) {
        float* sums = weight_blocks + block * D;
        std::memset(sums, 0, D * sizeof(float));
        for (int64_t n = block * rows; n < std::min(N, (block + 1) * rows); n++) {
            const T *gy = grad_y + n * D, *row = x + n * D;
            float scale = scale_N[n], dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < D; i++) dot += load(gy[i]) * weight[i] * load(row[i]);
            float along = dot * scale * scale / D;
#pragma omp simd
            for (int64_t i = 0; i < D; i++) {
                sums[i] += load(gy[i]) * load(row[i]) * scale;
                store(grad_x[n * D + i], scale * (load(gy[i]) * weight[i] - load(row[i]) * along));
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------- rotary positions

// y[b,k,t,g,:] = x[b,t,k,g,:] turned by the phase of (b,t); `forward` false: turned back, from y's order to x's.
template <class T>
static void rotate(const T* from, const float* cos_BTd, const float* sin_BTd, T* to, int64_t B, int64_t T_, int64_t K,
                   int64_t G, int64_t d, bool forward) {
    int64_t half = d / 2;
    float sign = forward ? 1.0f : -1.0f;
#pragma omp parallel for collapse(2) if (B * T_ > SMALL)
    for (int64_t b = 0; b < B; b++)
        for (int64_t t = 0; t < T_; t++) {
            const float *cosine = cos_BTd + (b * T_ + t) * d, *sine = sin_BTd + (b * T_ + t) * d;
            for (int64_t k = 0; k < K; k++)
                for (int64_t g = 0; g < G; g++) {
                    int64_t by_token = (((b * T_ + t) * K + k) * G + g) * d, by_head = (((b * K + k) * T_ + t) * G + g) * d;
                    const T* x = from + (forward ? by_token : by_head);
                    T* y = to + (forward ? by_head : by_token);
#pragma omp simd
                    for (int64_t i = 0; i < half; i++) {
                        float first = load(x[i]), second = load(x[i + half]), turn = sign * sine[i];
                        store(y[i], first * cosine[i] - second * turn);
                        store(y[i + half], second * cosine[i] + first * turn);
                    }
                }
        }
}

// --------------------------------------------------------------------------------------- softmax of capped logits

// One row of working memory for each thread and purpose.
template <class Item, int purpose>
static Item* scratch(int64_t size) {
    static thread_local std::vector<Item> memory;
    if (int64_t(memory.size()) < size) memory.resize(size);
    return memory.data();
}

// What a row may see: keys up to its own position, real, of its document (document_BT holds -1 for pads). Rows are walked in
// whole vectors, past their position where the row of S keys goes on: what is left of a vector would be done number by number.
static inline int32_t walked(int32_t position, int64_t S) { return std::min<int64_t>(S, (position / 16 + 1) * 16); }

// In place, products q.k [B*K, c*G, S] of the queries start.. become weights; total: the sum of e^logit of each row.
// No maximum is subtracted: capped logits cannot overflow. A row that sees nothing is zero (total = 0).
template <class T>
static void capped_softmax(T* products, const int32_t* key_document_BT, const int32_t* query_document_BT, float* total,
                           int64_t BK, int64_t K, int64_t rows, int64_t G, int64_t S, int64_t length, int64_t start,
                           float multiplier, float cap) {
    float inner = multiplier / cap;
#pragma omp parallel for collapse(2) if (BK * rows > SMALL)
    for (int64_t bk = 0; bk < BK; bk++)
        for (int64_t r = 0; r < rows; r++) {
            float* weight = scratch<float, 0>(S);
            int64_t b = bk / K;
            int32_t position = start + r / G, end = walked(position, S), own = query_document_BT[b * length + position];
            const int32_t* document = key_document_BT + b * length;
            T* row = products + (bk * rows + r) * S;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int32_t s = 0; s < end; s++) {
                bool seen = (s <= position) & (document[s] == own);
                weight[s] = seen ? exponential(cap * tangent(load(row[s]) * inner)) : 0.0f;
                sum += weight[s];
            }
            total[bk * rows + r] = sum;
            float scale = sum == 0 ? 0.0f : 1.0f / sum;
#pragma omp simd
            for (int32_t s = 0; s < end; s++) store(row[s], weight[s] * scale);
            std::memset(row + end, 0, (S - end) * sizeof(T));
        }
}

// In place: products become weights, grad_weights become gradients of the products.
template <class T>
static void capped_softmax_backward(T* products, T* grad_weights, const int32_t* key_document_BT,
                                    const int32_t* query_document_BT, const float* total, int64_t BK, int64_t K,
                                    int64_t rows, int64_t G, int64_t S, int64_t length, int64_t start, float multiplier,
                                    float cap) {
    float inner = multiplier / cap;
#pragma omp parallel for collapse(2) if (BK * rows > SMALL)
    for (int64_t bk = 0; bk < BK; bk++)
        for (int64_t r = 0; r < rows; r++) {
            float *weight = scratch<float, 0>(S), *slope = scratch<float, 1>(S);
            int64_t b = bk / K;
            int32_t position = start + r / G, end = walked(position, S), own = query_document_BT[b * length + position];
            const int32_t* document = key_document_BT + b * length;
            T *row = products + (bk * rows + r) * S, *grad = grad_weights + (bk * rows + r) * S;
            float sum = total[bk * rows + r], scale = sum == 0 ? 0.0f : 1.0f / sum, dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int32_t s = 0; s < end; s++) {
                bool seen = (s <= position) & (document[s] == own);
                float bend = tangent(load(row[s]) * inner);
                weight[s] = seen ? exponential(cap * bend) * scale : 0.0f;
                slope[s] = 1.0f - bend * bend;
                dot += weight[s] * load(grad[s]);
            }
#pragma omp simd
            for (int32_t s = 0; s < end; s++) {
                store(row[s], weight[s]);
                store(grad[s], weight[s] * (load(grad[s]) - dot) * slope[s] * multiplier);
            }
            std::memset(row + end, 0, (S - end) * sizeof(T));
            std::memset(grad + end, 0, (S - end) * sizeof(T));
        }
}

// --------------------------------------------------------------------------------------------------------- GeGLU

// inner = gelu_tanh(gate) * up * factor, with gelu_tanh(g) = g * sigmoid(2 z), z = sqrt(2/pi) (g + 0.044715 g^3).
static const float ROOT = 0.7978845608028654f, CUBIC = 0.044715f;

template <class T>
static void geglu(const T* gate_up, const float* factor_N, T* inner, int64_t N, int64_t F) {
#pragma omp parallel for if (N > SMALL)
    for (int64_t n = 0; n < N; n++) {
        const T *gate = gate_up + n * 2 * F, *up = gate + F;
        float factor = factor_N[n];
#pragma omp simd
        for (int64_t i = 0; i < F; i++) {
            float g = load(gate[i]), z = ROOT * (g + CUBIC * g * g * g);
            store(inner[n * F + i], g / (1.0f + exponential(-2.0f * z)) * load(up[i]) * factor);
        }
    }
}

// In place, grad_inner becomes inner (the backward pass needs it anew); grad_factor_N = sum of grad_inner * gelu * up.
template <class T>
static void geglu_backward(T* grad_inner, const T* gate_up, const float* factor_N, T* grad_gate_up, float* grad_factor_N,
                           int64_t N, int64_t F) {
#pragma omp parallel for if (N > SMALL)
    for (int64_t n = 0; n < N; n++) {
        const T *gate = gate_up + n * 2 * F, *up = gate + F;
        T *grad_gate = grad_gate_up + n * 2 * F, *grad_up = grad_gate + F, *grad = grad_inner + n * F;
        float factor = factor_N[n], dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < F; i++) {
            float g = load(gate[i]), u = load(up[i]), slope = load(grad[i]);
            float z = ROOT * (g + CUBIC * g * g * g);
            float sigmoid = 1.0f / (1.0f + exponential(-2.0f * z));
            float gelu = g * sigmoid;
            float bend = sigmoid + gelu * (1.0f - sigmoid) * 2.0f * ROOT * (1.0f + 3.0f * CUBIC * g * g);
            dot += slope * gelu * u;
            store(grad_gate[i], slope * factor * u * bend);
            store(grad_up[i], slope * factor * gelu);
            store(grad[i], gelu * u * factor);
        }
        grad_factor_N[n] = dot;
    }
}

// ----------------------------------------------------------------------------------------- sums of gathered rows

// y[n] = sum over the k rows x[index[n, :]], in order.
template <class T>
static void gather_sum(const T* x, const int64_t* index_Nk, T* y, int64_t N, int64_t k, int64_t D) {
#pragma omp parallel for if (N > SMALL)
    for (int64_t n = 0; n < N; n++)
        for (int64_t start = 0; start < D; start += 512) {
            float sum[512];
            int64_t size = std::min<int64_t>(512, D - start);
            for (int64_t i = 0; i < size; i++) sum[i] = 0;
            for (int64_t choice = 0; choice < k; choice++) {
                const T* row = x + index_Nk[n * k + choice] * D + start;
#pragma omp simd
                for (int64_t i = 0; i < size; i++) sum[i] += load(row[i]);
            }
#pragma omp simd
            for (int64_t i = 0; i < size; i++) store(y[n * D + start + i], sum[i]);
        }
}

// ------------------------------------------------------------------------------------------------- cross-entropy

// Products hidden.embedding [N, V] become, in place, the slope of the loss: ((1 + 2 z lse) softmax - onehot) * multiplier.
// nats_N and normalizer_N (lse) are zero where target_N is negative. `want_slope` false leaves the products alone.
template <class T>
static void cross_entropy(T* products, const int64_t* target_N, float* nats_N, float* normalizer_N, int64_t N, int64_t V,
                          float multiplier, float z_loss_weight, bool want_slope) {
#pragma omp parallel for if (N > SMALL)
    for (int64_t n = 0; n < N; n++) {
        T* row = products + n * V;
        int64_t target = target_N[n];
        if (target < 0) {
            nats_N[n] = normalizer_N[n] = 0;
            if (want_slope) std::memset(row, 0, V * sizeof(T));
            continue;
        }
        float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
        for (int64_t v = 0; v < V; v++) most = load(row[v]) > most ? load(row[v]) : most;
#pragma omp simd reduction(+ : sum)
        for (int64_t v = 0; v < V; v++) sum += exponential((load(row[v]) - most) * multiplier);
        float normalizer = most * multiplier + std::log(sum);
        nats_N[n] = normalizer - load(row[target]) * multiplier;
        normalizer_N[n] = normalizer;
        if (!want_slope) continue;
        float factor = (1.0f + 2.0f * z_loss_weight * normalizer) * multiplier;
        float at_target = exponential(-nats_N[n]) * factor - multiplier;
#pragma omp simd
        for (int64_t v = 0; v < V; v++) store(row[v], exponential(load(row[v]) * multiplier - normalizer) * factor);
        store(row[target], at_target);
    }
}

// --------------------------------------------------------------------------------------------- stochastic rounding

// 16 random bits of element i of the tensor that `key` belongs to: Widynski's squares32, see training/optimizers/rounding.py.
static inline uint32_t random_bits(uint64_t i, uint64_t key) {
    uint64_t a = i * key, b = a + key, s = a * a + a;
    s = (s >> 32) | (s << 32);
    s = s * s + b;
    s = (s >> 32) | (s << 32);
    s = s * s + a;
    s = (s >> 32) | (s << 32);
    return uint32_t((s * s + b) >> 48);
}

static inline bf16 up_or_down(float x, uint32_t random) {
    return {x == x ? uint16_t((as_bits(x) + random) >> 16) : uint16_t(0x7fc0)};
}

static void round_stochastically(const float* x, bf16* y, int64_t n, uint64_t key, uint64_t first) {
#pragma omp parallel for simd if (n > 4096)
    for (int64_t i = 0; i < n; i++) y[i] = up_or_down(x[i], random_bits(first + i, key));
}

// Adam or AdamW of one tensor whose moments are bf16, computed in float and rounded up or down: see training/optimizers/adam.py.
// rate = learning_rate / (1 - beta1^step), root = sqrt(1 - beta2^step), fresh = 1 - beta, kept = 1 - learning_rate * decay.
static void adam_rounded(float* weight, const float* gradient, bf16* m, bf16* v, int64_t n, uint64_t key_m, uint64_t key_v,
                         uint64_t first, float rate, float root, float beta1, float fresh1, float beta2, float fresh2, float eps,
                         float kept, float l2) {
#pragma omp parallel for simd if (n > 4096)
    for (int64_t i = 0; i < n; i++) {
        float slope = l2 == 0 ? gradient[i] : gradient[i] + l2 * weight[i], mean = load(m[i]) * beta1 + fresh1 * slope;
        float square = load(v[i]) * beta2 + fresh2 * slope * slope;
        weight[i] = weight[i] * kept - rate * (mean / (std::sqrt(square) / root + eps));
        m[i] = up_or_down(mean, random_bits(first + i, key_m));
        v[i] = up_or_down(square, random_bits(first + i, key_v));
    }
}

#define BOTH(name, parameters, call)                                        \
    extern "C" void name##_float parameters { using T = float; call; }      \
    extern "C" void name##_bf16 parameters { using T = bf16; call; }

BOTH(one_row, (void* x, void* weight, int64_t stride, int64_t is_bf16, void* y, int64_t N, int64_t K),
     is_bf16 ? one_row((T*)x, (bf16*)weight, stride, (T*)y, N, K) : one_row((T*)x, (float*)weight, stride, (T*)y, N, K))
BOTH(rms_norm, (void* x, float* w, void* y, float* scale, int64_t N, int64_t D, float eps),
     rms_norm((T*)x, w, (T*)y, scale, N, D, eps))
BOTH(rms_norm_backward,
     (void* gy, void* x, float* w, float* scale, void* gx, float* gw, int64_t N, int64_t D, int64_t blocks),
     rms_norm_backward((T*)gy, (T*)x, w, scale, (T*)gx, gw, N, D, blocks))
BOTH(rotate,
     (void* from, float* c, float* s, void* to, int64_t B, int64_t L, int64_t K, int64_t G, int64_t d, int64_t forward),
     rotate((T*)from, c, s, (T*)to, B, L, K, G, d, forward != 0))
BOTH(capped_softmax,
     (void* x, int32_t* keys, int32_t* queries, float* total, int64_t BK, int64_t K, int64_t rows, int64_t G, int64_t S,
      int64_t length, int64_t start, float multiplier, float cap),
     capped_softmax((T*)x, keys, queries, total, BK, K, rows, G, S, length, start, multiplier, cap))
BOTH(capped_softmax_backward,
     (void* x, void* grad, int32_t* keys, int32_t* queries, float* total, int64_t BK, int64_t K, int64_t rows, int64_t G,
      int64_t S, int64_t length, int64_t start, float multiplier, float cap),
     capped_softmax_backward((T*)x, (T*)grad, keys, queries, total, BK, K, rows, G, S, length, start, multiplier, cap))
BOTH(geglu, (void* gate_up, float* factor, void* inner, int64_t N, int64_t F),
     geglu((T*)gate_up, factor, (T*)inner, N, F))
BOTH(geglu_backward, (void* grad, void* gate_up, float* factor, void* grad_gate_up, float* grad_factor, int64_t N, int64_t F),
     geglu_backward((T*)grad, (T*)gate_up, factor, (T*)grad_gate_up, grad_factor, N, F))
BOTH(gather_sum, (void* x, int64_t* index, void* y, int64_t N, int64_t k, int64_t D),
     gather_sum((T*)x, index, (T*)y, N, k, D))
BOTH(cross_entropy,
     (void* products, int64_t* target, float* nats, float* normalizer, int64_t N, int64_t V, float multiplier, float z,
      int64_t want_slope),
     cross_entropy((T*)products, target, nats, normalizer, N, V, multiplier, z, want_slope != 0))
extern "C" void round_stochastically_float(void* x, void* y, int64_t n, int64_t key, int64_t first) {
    round_stochastically((float*)x, (bf16*)y, n, uint64_t(key), uint64_t(first));
}
extern "C" void adam_rounded_float(void* weight, void* gradient, void* m, void* v, int64_t n, int64_t key_m, int64_t key_v,
                                   int64_t first, float rate, float root, float beta1, float fresh1, float beta2, float fresh2,
                                   float eps, float kept, float l2) {
    adam_rounded((float*)weight, (float*)gradient, (bf16*)m, (bf16*)v, n, uint64_t(key_m), uint64_t(key_v), uint64_t(first), rate,
                 root, beta1, fresh1, beta2, fresh2, eps, kept, l2);
}
