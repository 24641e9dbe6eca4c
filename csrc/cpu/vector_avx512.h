// AVX-512: sixteen floats or eight doubles. See vector.h for what each function means.
#pragma once

#include <immintrin.h>

#include <cstdint>

template <class T>
struct Vec;

template <>
struct Vec<float> {
    static constexpr int size = 16;
    static constexpr int per_stripe = 4;  // vectors of a row that a tile pass holds in registers
    __m512 v;

    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Vec all(float x) { return {_mm512_set1_ps(x)}; }
    static Vec zero() { return {_mm512_setzero_ps()}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    Vec operator+(Vec o) const { return {_mm512_add_ps(v, o.v)}; }
    Vec operator-(Vec o) const { return {_mm512_sub_ps(v, o.v)}; }
    Vec operator*(Vec o) const { return {_mm512_mul_ps(v, o.v)}; }
    Vec operator/(Vec o) const { return {_mm512_div_ps(v, o.v)}; }
    float sum() const { return _mm512_reduce_add_ps(v); }
};

inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec<float> max_or_nan(Vec<float> x, Vec<float> bound) { return {_mm512_max_ps(bound.v, x.v)}; }
inline Vec<float> if_within(Vec<float> y, Vec<float> limit, Vec<float> x, Vec<float> other) {
    return {_mm512_mask_mov_ps(other.v, _mm512_cmp_ps_mask(y.v, limit.v, _CMP_NGT_UQ), x.v)};
}

inline Vec<float> exp2(Vec<float> x) {
    const __m512 f = _mm512_reduce_ps(x.v, 0x09);  // x − ⌊x⌋, zero for −∞
    __m512 p = _mm512_set1_ps(0x1.c541749fdd4ebp-13f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.46d64ce3b0e1bp-10f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.3d0b920f2a9bbp-7f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.c68911341e77ep-5f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ebfd57972e649p-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62e42b5e6787cp-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));  // 2^0 is one exactly: equal centroids
    return {_mm512_scalef_ps(p, x.v)};  // p·2^⌊x⌋
}

template <>
struct Vec<double> {
    static constexpr int size = 8;
    static constexpr int per_stripe = 4;
    __m512d v;

    static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
    static Vec all(double x) { return {_mm512_set1_pd(x)}; }
    static Vec zero() { return {_mm512_setzero_pd()}; }
    void store(double* p) const { _mm512_storeu_pd(p, v); }
    Vec operator+(Vec o) const { return {_mm512_add_pd(v, o.v)}; }
    Vec operator-(Vec o) const { return {_mm512_sub_pd(v, o.v)}; }
    Vec operator*(Vec o) const { return {_mm512_mul_pd(v, o.v)}; }
    Vec operator/(Vec o) const { return {_mm512_div_pd(v, o.v)}; }
    double sum() const { return _mm512_reduce_add_pd(v); }
};

inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline Vec<double> max_or_nan(Vec<double> x, Vec<double> bound) { return {_mm512_max_pd(bound.v, x.v)}; }
inline Vec<double> if_within(Vec<double> y, Vec<double> limit, Vec<double> x, Vec<double> other) {
    return {_mm512_mask_mov_pd(other.v, _mm512_cmp_pd_mask(y.v, limit.v, _CMP_NGT_UQ), x.v)};
}
inline Vec<double> fraction(Vec<double> x) { return {_mm512_reduce_pd(x.v, 0x08)}; }  // x − nearest integer
inline Vec<double> times_power_of_two(Vec<double> p, Vec<double> n) { return {_mm512_scalef_pd(p.v, n.v)}; }

// The first and the last eight of sixteen floats, and back.
inline Vec<double> first_half(Vec<float> x) { return {_mm512_cvtps_pd(_mm512_castps512_ps256(x.v))}; }
inline Vec<double> second_half(Vec<float> x) { return {_mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1))}; }
inline Vec<float> narrowed(Vec<double> first, Vec<double> second) {
    return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(first.v)), _mm512_cvtpd_ps(second.v), 1)};
}

// Sixteen floats from sixteen numbers of 16 bits.
inline Vec<float> from_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec<float> from_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void to_f16(Vec<float> x, uint16_t* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
// As torch rounds: to even, denormals kept (the instruction for it takes them for zero).
inline void round_to_bf16(Vec<float> x, uint16_t* p) {
    const __m512i bits = _mm512_castps_si512(x.v), high = _mm512_srli_epi32(bits, 16);
    const __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(high, _mm512_set1_epi32(1)));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
}

#if defined(__AVX512BF16__)
#define HAS_BF16_PRODUCTS 1
// Two rows of sixteen numbers in bf16: each by itself, and interleaved as the right operand of a product wants them.
inline void store_bf16_rows(Vec<float> even, Vec<float> odd, uint16_t* even_out, uint16_t* odd_out,
                            uint16_t* interleaved_out) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(even_out), _mm512_castsi512_si256(both));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(odd_out), _mm512_extracti64x4_epi64(both, 1));
    _mm512_storeu_si512(interleaved_out, _mm512_permutexvar_epi16(order, both));
}
inline void to_bf16(Vec<float> x, uint16_t* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x.v));
}
#elif defined(EMULATE_BF16_PRODUCTS)  // to test the code of richer processors
#define HAS_BF16_PRODUCTS 1
inline void store_bf16_rows(Vec<float> even, Vec<float> odd, uint16_t* even_out, uint16_t* odd_out,
                            uint16_t* interleaved_out) {
    round_to_bf16(even, even_out);
    round_to_bf16(odd, odd_out);
    for (int i = 0; i < Vec<float>::size; ++i) {
        interleaved_out[2 * i] = even_out[i];
        interleaved_out[2 * i + 1] = odd_out[i];
    }
}
inline void to_bf16(Vec<float> x, uint16_t* p) { round_to_bf16(x, p); }
#endif

// out[c][r] = in[r][c] for 16×16 words of 32 bits.
inline void transpose_16x16(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(in + i * in_stride);
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        r[4 * i + 0] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        _mm512_storeu_si512(out + i * out_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_si512(out + (i + 8) * out_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    }
}
