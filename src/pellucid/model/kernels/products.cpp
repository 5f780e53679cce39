// Matrix products by name (see products.h), for products.py.

#include "products.h"

#ifdef OWN_PRODUCTS
#define PARAMETERS                                                                                                       \
    const void *a, int64_t a_outer, int64_t a_inner, const int64_t *a_rows, const void *b, int64_t b_outer, int64_t b_inner, \
        const int64_t *b_rows, void *out, int64_t stride, int64_t M, int64_t N, int64_t K, int64_t add, int64_t read_soon, \
        int64_t batch, int64_t a_batch, int64_t b_batch, int64_t out_batch
#define PRODUCT(T, A, B, O)                                                                                                \
    product<T, O>(Matrix<A>{(const A*)a, a_outer, a_inner, a_rows}, Matrix<B>{(const B*)b, b_outer, b_inner, b_rows}, (O*)out, \
                  stride, M, N, K, add != 0, read_soon != 0, batch, a_batch, b_batch, out_batch)

extern "C" void product_float(PARAMETERS, int64_t, int64_t) { PRODUCT(float, float, float, float); }
#ifdef __AVX512BF16__
// b may be fp32, rounded as it is packed; or out. `add`, to what out holds, is for an out of fp32.
extern "C" void product_bf16(PARAMETERS, int64_t b_is_float, int64_t out_is_float) {
    if (b_is_float)
        PRODUCT(bf16, bf16, float, bf16);
    else if (out_is_float)
        PRODUCT(bf16, bf16, bf16, float);
    else
        PRODUCT(bf16, bf16, bf16, bf16);
}
#endif
#endif
