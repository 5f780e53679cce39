// Numbers in float and bf16, and the two functions that are not in the processor.

#pragma once
#include <cstdint>

struct bf16 { uint16_t bits; };

static inline float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
static inline uint32_t as_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
static inline float load(float x) { return x; }
static inline float load(bf16 x) { return as_float(uint32_t(x.bits) << 16); }
static inline void store(float& to, float x) { to = x; }
static inline void store(bf16& to, float x) {  // round to nearest, ties to even
    uint32_t bits = as_bits(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = uint16_t(x == x ? rounded : 0x7fc0);
}

// e^x within 2 ulp: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes). Saturates where float does.
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = __builtin_rintf(x * 1.44269504088896341f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * as_float(uint32_t(int32_t(n) + 127) << 23);
}

// tanh within 3 ulp: x p(x^2) / q(x^2), the rational function of Eigen (ptanh_float); 1 beyond TANH_END.
static const float TANH_END = 7.90531f;
static const float TANH_P[] = {-2.76076847742355e-16f, 2.00018790482477e-13f, -8.60467152213735e-11f, 5.12229709037114e-08f,
                          1.48572235717979e-05f, 6.37261928875436e-04f, 4.89352455891786e-03f};
static const float TANH_Q[] = {1.19825839466702e-06f, 1.18534705686654e-04f, 2.26843463243900e-03f, 4.89352518554385e-03f};
static inline float tangent(float x) {
    x = x < -TANH_END ? -TANH_END : x > TANH_END ? TANH_END : x;
    float y = x * x, p = TANH_P[0], q = TANH_Q[0];
#pragma GCC unroll 8
    for (int i = 1; i < 7; i++) p = p * y + TANH_P[i];
#pragma GCC unroll 8
    for (int i = 1; i < 4; i++) q = q * y + TANH_Q[i];
    return x * p / q;
}
