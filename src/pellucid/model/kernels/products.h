// Matrix products for processors with AVX-512 whose vendor's libraries leave it idle (see products.py): out = a b'.
//
// Both factors are packed, as in BLIS (Van Zee & van de Geijn 2015), into panels that are read from end to end: a cell
// holds what one multiply-add takes of a row, a float or two bf16 that follow each other along the sum. A tile of ROWS x
// COLUMNS sums stays in registers. Packing also converts (fp32 masters to bf16), gathers rows by index and transposes.
// Each result is one sum in order of k, in pieces of DEPTH cells, whatever the other sizes and the number of threads: the same
// bits. The instructions for bf16 take subnormal numbers for zero.
// Letters: M rows of a and out, N rows of b and columns of out, K numbers of each sum; P rows of a panel.

#pragma once
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define OWN_PRODUCTS
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>

#include "numbers.h"
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_num_threads() { return 1; }
static int omp_get_max_threads() { return 1; }
static int omp_in_parallel() { return 0; }
#endif

static const int ROWS = 14, VECTORS = 2, COLUMNS = 16 * VECTORS;  // 28 registers of sums, 2 of b, 1 of a
static const int64_t DEPTH = 2048;                                // cells of a sum at a time
static const int64_t NEAR = 128 * 1024, SHARED = 1024 * 1024;     // cells of a that one core keeps, of b that all share
static const int64_t SMALL = 32 * 32 * 32;                        // multiply-adds that are not worth a second thread
static const int64_t FAR = 256 * 1024;                            // numbers of a result that need not stay in a cache
static const int64_t GAP = 16, AHEAD = 8;                         // cells between panels; cells that are fetched before their turn

// Number (o, k) lies at first[o * outer + k * inner], one of them 1; `rows`, where given, renumbers the other's.
template <class S>
struct Matrix {
    const S* first;
    int64_t outer, inner;
    const int64_t* rows;
    const S* at(int64_t o, int64_t k) const {
        if (rows) (inner == 1 ? o : k) = rows[inner == 1 ? o : k];
        return first + o * outer + k * inner;
    }
};

static inline __mmask16 lanes(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

static inline __m512 multiply_add(float, __m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }

// 16 cells that follow each other along k, of `left` numbers.
static inline __m512 along(float, const float* x, int64_t left) { return _mm512_maskz_loadu_ps(lanes(left), x); }

// One cell of each of 16 rows, whose numbers lie side by side.
static inline __m512 across(float, const float* x, const float*, __mmask16 wanted) { return _mm512_maskz_loadu_ps(wanted, x); }

static inline __m512 get(const float* from, __mmask16 wanted) { return _mm512_maskz_loadu_ps(wanted, from); }
static inline void put(float* to, __mmask16 wanted, __m512 x, bool away = false) {  // away: past the caches, by whole lines
    if (away && wanted == 0xffff && (uintptr_t)to % 64 == 0)
        _mm512_stream_ps(to, x);
    else
        _mm512_mask_storeu_ps(to, wanted, x);
}

#ifdef __AVX512BF16__
static inline __m512 multiply_add(bf16, __m512 a, __m512 b, __m512 sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

static inline __m512 along(bf16, const bf16* x, int64_t left) {
    return (__m512)_mm512_maskz_loadu_epi16(left >= 32 ? ~0u : (1u << left) - 1, x);
}
static inline __m512 along(bf16, const float* x, int64_t left) {
    return (__m512)_mm512_cvtne2ps_pbh(get(x + 16, lanes(left - 16)), get(x, lanes(left)));
}

static inline __m256i halves(const bf16* x, __mmask16 wanted) { return _mm256_maskz_loadu_epi16(wanted, x); }
static inline __m256i halves(const float* x, __mmask16 wanted) { return (__m256i)_mm512_cvtneps_pbh(get(x, wanted)); }
template <class S>
static inline __m512 across(bf16, const S* x, const S* next, __mmask16 wanted) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i turns = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(32)), 16));
    __m512i low = _mm512_castsi256_si512(halves(x, wanted));
    __m512i high = next ? _mm512_castsi256_si512(halves(next, wanted)) : _mm512_setzero_si512();
    return (__m512)_mm512_permutex2var_epi16(low, turns, high);
}

static inline void put(bf16* to, __mmask16 wanted, __m512 x, bool = false) {
    _mm256_mask_storeu_epi16(to, wanted, (__m256i)_mm512_cvtneps_pbh(x));
}
#endif

// 16 x 16 cells, in place: blocks of 1, 2, 4, 8 are exchanged across the diagonal.
static inline void transpose(__m512* row) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
    for (int step = 1; step < 16; step *= 2) {
        __m512i bit = _mm512_set1_epi32(step), other = _mm512_set1_epi32(16);
        __mmask16 odd = _mm512_test_epi32_mask(lane, bit);
        __m512i low = _mm512_mask_add_epi32(lane, odd, _mm512_sub_epi32(lane, bit), other);
        __m512i high = _mm512_mask_add_epi32(_mm512_add_epi32(lane, bit), odd, lane, other);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            if (!(i & step)) {
                __m512 a = row[i], b = row[i + step];
                row[i] = _mm512_permutex2var_ps(a, low, b);
                row[i + step] = _mm512_permutex2var_ps(a, high, b);
            }
    }
}

// Panels begin this far from each other: the gap, so that they do not all take the same few places of a cache.
static inline int64_t panel(int64_t rows, int64_t cells) { return rows * cells + GAP; }

// Rows o0..o1 and numbers k0..k1 of x become panels of P rows: cell c of row p * P + o lies at to[p * panel(P, cells) + c * P + o].
template <class T, class S, int P>
static void pack(const Matrix<S>& x, int64_t o0, int64_t o1, int64_t k0, int64_t k1, float* to) {
    const int64_t per = sizeof(float) / sizeof(T), cells = (k1 - k0 + per - 1) / per, outer = o1 - o0;
    if (x.inner != 1) {
        for (int64_t c = 0; c < cells; c++) {
            int64_t k = k0 + c * per;
            const S *row = x.at(o0, k), *next = per > 1 && k + 1 < k1 ? x.at(o0, k + 1) : nullptr;
            const S *soon = x.at(o0, std::min(k + AHEAD * per, k1 - 1)), *after = x.at(o0, std::min(k + AHEAD * per + 1, k1 - 1));
            for (int64_t p = 0; p < outer; p += P)
                for (int64_t o = 0; o < P; o += 16) {
                    _mm_prefetch(soon + p + o, _MM_HINT_T0);  // each row is on a page of its own, where no processor guesses
                    if (per > 1) _mm_prefetch(after + p + o, _MM_HINT_T0);
                    put(to + p / P * panel(P, cells) + c * P + o, lanes(P - o),
                        across(T(), row + p + o, next ? next + p + o : next, lanes(P - o) & lanes(outer - p - o)));
                }
        }
        return;
    }
    for (int64_t p = 0; p < outer; p += P)
        for (int64_t o = 0; o < P; o += 16) {
            const S* row[16];
            int64_t real = std::min({int64_t(16), P - o, outer - p - o});
            for (int64_t i = 0; i < real; i++) row[i] = x.at(o0 + p + o + i, k0);
            for (int64_t c = 0; c < cells; c += 16) {
                __m512 cell[16];
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++)
                    cell[i] = i < real ? along(T(), row[i] + c * per, k1 - k0 - c * per) : _mm512_setzero_ps();
                transpose(cell);
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++)
                    if (c + i < cells) put(to + p / P * panel(P, cells) + (c + i) * P + o, lanes(P - o), cell[i]);
            }
        }
}

// Where sums are kept: lines of numbers, `stride` from one to the next; away: what nobody reads soon.
template <class O>
struct Lines {
    O* first;
    int64_t stride;
    bool away = false;
    Lines at(int64_t line, int64_t number) const { return {first ? first + line * stride + number : nullptr, stride, away}; }
};

// height x columns of out, or of its transpose where `turned`: the panels' product, and what is in `before`.
template <class T, class O, int rows, bool turned>
static void tile(int64_t cells, const float* a, const float* b, Lines<float> before, Lines<O> out, int64_t height,
                 int64_t columns) {
    __m512 sum[16][VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) sum[i][j] = _mm512_setzero_ps();
    for (int64_t c = 0; c < cells; c++) {
        __m512 vector[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) vector[j] = _mm512_load_ps(b + c * COLUMNS + 16 * j);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            __m512 number = _mm512_set1_ps(a[c * ROWS + i]);
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) sum[i][j] = multiply_add(T(), number, vector[j], sum[i][j]);
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) {
        __m512 line[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) line[i] = sum[i][j];
        if (turned) transpose(line);
#pragma GCC unroll 16
        for (int i = 0; i < (turned ? 16 : rows); i++) {
            int64_t to = turned ? 16 * j + i : i, from = turned ? 0 : 16 * j;
            int64_t wide = turned ? height : columns - 16 * j, high = turned ? columns - 16 * j : height;
            __mmask16 wanted = i < high ? lanes(wide) : 0;
            if (before.first) line[i] = _mm512_add_ps(line[i], get(before.at(to, from).first, wanted));
            put(out.at(to, from).first, wanted, line[i], out.away);
        }
    }
}

// The smallest tile that holds so many rows: of 2, 4, .. ROWS.
template <class T, class O, bool turned, int... pair>
static void tile_of(int64_t height, std::integer_sequence<int, pair...>, int64_t cells, const float* a, const float* b,
                    Lines<float> before, Lines<O> out, int64_t columns) {
    (void)((height <= 2 * pair + 2 && (tile<T, O, 2 * pair + 2, turned>(cells, a, b, before, out, height, columns), true)) || ...);
}

// Memory that a thread keeps from product to product, for each purpose.
template <int purpose>
static float* room(int64_t cells) {
    static thread_local std::unique_ptr<float[]> memory;
    static thread_local int64_t size = 0;
    if (size < cells) memory.reset(), memory.reset(new float[(size = cells) + 16]);
    return (float*)((uintptr_t(memory.get()) + 63) / 64 * 64);
}

// Of some rows of a product: the columns before `columns`, as sums of the numbers first..last alone. Elsewhere out is left as it is.
struct Part {
    int64_t columns, first, last;
};

// `wanted` says for rows m0..m1 which Part of them there should be. away: out is written past the caches.
template <class T, class O, bool turned, class A, class B, class Wanted>
static void multiply(const Matrix<A>& a, const Matrix<B>& b, O* out, int64_t stride, int64_t M, int64_t N, int64_t K, bool add,
                     bool away, const Wanted& wanted) {
    const int64_t per = sizeof(float) / sizeof(T), depth = DEPTH * per, panels = (M + ROWS - 1) / ROWS;
    const int64_t deepest = (std::min(K, depth) + per - 1) / per, width = std::max<int64_t>(1, SHARED / deepest / COLUMNS) * COLUMNS;
    float* packed_b = room<0>((std::min(N, width) + COLUMNS - 1) / COLUMNS * panel(COLUMNS, deepest));
    const int64_t shared = std::min(N, width);  // columns at a time
    float* sums = K > depth && sizeof(O) < sizeof(float) ? room<1>(M * shared) : nullptr;
    for (int64_t n0 = 0; n0 < N; n0 += width)
        for (int64_t k0 = 0; k0 < K; k0 += depth) {
            int64_t k1 = std::min(K, k0 + depth), cells = (k1 - k0 + per - 1) / per, n1 = std::min(N, n0 + width);
#pragma omp parallel if (M * N * K > SMALL)
            {
                int64_t threads = omp_get_num_threads();
                int64_t group = std::clamp<int64_t>((n1 - n0) / COLUMNS / threads, 1, 16) * COLUMNS;
#pragma omp for schedule(dynamic)
                for (int64_t n = n0; n < n1; n += group)
                    pack<T, B, COLUMNS>(b, n, std::min(n + group, n1), k0, k1, packed_b + (n - n0) / COLUMNS * panel(COLUMNS, cells));
                int64_t at_once = threads * std::max<int64_t>(2, NEAR / ROWS / cells);
                int64_t blocks = (panels + at_once - 1) / at_once * threads;
#pragma omp for schedule(dynamic)
                for (int64_t block = 0; block < blocks; block++) {
                    int64_t m0 = panels * block / blocks * ROWS, m1 = std::min(M, panels * (block + 1) / blocks * ROWS);
                    float* packed_a = room<2>((m1 - m0 + ROWS) / ROWS * panel(ROWS, cells));
                    pack<T, A, ROWS>(a, m0, m1, k0, k1, packed_a);
                    for (int64_t n = n0; n < n1; n += COLUMNS)
                        for (int64_t m = m0; m < m1; m += ROWS) {
                            int64_t rows = std::min<int64_t>(ROWS, m1 - m), column = sums ? n - n0 : n;
                            Part part = wanted(m, m + rows);
                            if (n >= part.columns) continue;
                            int64_t c0 = (std::clamp(part.first, k0, k1) - k0) / per, c1 = (std::clamp(part.last, k0, k1) - k0 + per - 1) / per;
                            const float *panel_a = packed_a + (m - m0) / ROWS * panel(ROWS, cells) + c0 * ROWS;
                            const float* panel_b = packed_b + (n - n0) / COLUMNS * panel(COLUMNS, cells) + c0 * COLUMNS;
                            Lines<float> partial = {sums ? sums : (float*)out, !sums ? stride : turned ? M : shared};
                            Lines<O> result = Lines<O>{out, stride, away}.at(turned ? n : m, turned ? m : n);
                            partial = partial.at(turned ? column : m, turned ? m : column);
                            Lines<float> before = k0 || add ? partial : Lines<float>{nullptr, 0};
                            auto sizes = std::make_integer_sequence<int, ROWS / 2>();
                            if (k1 < K)
                                tile_of<T, float, turned>(rows, sizes, c1 - c0, panel_a, panel_b, before, partial, n1 - n);
                            else
                                tile_of<T, O, turned>(rows, sizes, c1 - c0, panel_a, panel_b, before, result, n1 - n);
                        }
                }
                if (away) _mm_sfence();
            }
        }
}

// The longer side is taken for rows: their panels stay with one core, those of the other factor are shared. But what is written past
// the caches is not turned: a column of a tile is no whole line.
template <class T, class O, class A, class B>
static void product(const Matrix<A>& a, const Matrix<B>& b, O* out, int64_t stride, int64_t M, int64_t N, int64_t K, bool add,
                    bool read_soon, int64_t batch, int64_t a_batch, int64_t b_batch, int64_t out_batch) {
    const bool away = !read_soon && !add && M * N > FAR && sizeof(O) == sizeof(float);
    auto one = [&](int64_t i) {
        auto all = [&](int64_t, int64_t) { return Part{std::max(M, N), 0, K}; };
        Matrix<A> left = {a.first + i * a_batch, a.outer, a.inner, a.rows};
        Matrix<B> right = {b.first + i * b_batch, b.outer, b.inner, b.rows};
        if (N > M && !away)
            multiply<T, O, true>(right, left, out + i * out_batch, stride, N, M, K, add, false, all);
        else
            multiply<T, O, false>(left, right, out + i * out_batch, stride, M, N, K, add, away, all);
    };
    if (batch >= omp_get_max_threads() && batch > 1) {
#pragma omp parallel for schedule(dynamic)
        for (int64_t i = 0; i < batch; i++) one(i);
    } else  // not within a region of one thread: a region inside another starts threads anew
        for (int64_t i = 0; i < batch; i++) one(i);
}
#endif
