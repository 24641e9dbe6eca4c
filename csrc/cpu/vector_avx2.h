// AVX2: eight floats or four doubles. See vector.h for what each function means.
#pragma once

#include <immintrin.h>

#include <cstdint>

template <class T>
struct Vec;

template <>
struct Vec<float> {
    static constexpr int size = 8;
    static constexpr int per_stripe = 2;  // vectors of a row that a tile pass holds in registers
    __m256 v;

    static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static Vec all(float x) { return {_mm256_set1_ps(x)}; }
    static Vec zero() { return {_mm256_setzero_ps()}; }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    Vec operator+(Vec o) const { return {_mm256_add_ps(v, o.v)}; }
    Vec operator-(Vec o) const { return {_mm256_sub_ps(v, o.v)}; }
    Vec operator*(Vec o) const { return {_mm256_mul_ps(v, o.v)}; }
    Vec operator/(Vec o) const { return {_mm256_div_ps(v, o.v)}; }
    float sum() const {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
    }
};

inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec<float> max_or_nan(Vec<float> x, Vec<float> bound) { return {_mm256_max_ps(bound.v, x.v)}; }
inline Vec<float> if_within(Vec<float> y, Vec<float> limit, Vec<float> x, Vec<float> other) {
    return {_mm256_blendv_ps(other.v, x.v, _mm256_cmp_ps(y.v, limit.v, _CMP_NGT_UQ))};
}

inline Vec<float> exp2(Vec<float> x) {
    // Below 2^−127 the bits of a power of two are all zero, and so is the product. Nothing exceeds 2^127.
    const __m256 y = max_or_nan(x, Vec<float>::all(-127.0f)).v;
    const __m256 whole = _mm256_round_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const __m256 f = _mm256_sub_ps(y, whole);
    __m256 p = _mm256_set1_ps(0x1.c541749fdd4ebp-13f);
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.46d64ce3b0e1bp-10f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.3d0b920f2a9bbp-7f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.c68911341e77ep-5f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.ebfd57972e649p-3f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.62e42b5e6787cp-1f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));  // 2^0 is one exactly: equal centroids
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    return {_mm256_mul_ps(p, _mm256_castsi256_ps(bits))};  // not a number stays one: p is
}

template <>
struct Vec<double> {
    static constexpr int size = 4;
    static constexpr int per_stripe = 2;
    __m256d v;

    static Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
    static Vec all(double x) { return {_mm256_set1_pd(x)}; }
    static Vec zero() { return {_mm256_setzero_pd()}; }
    void store(double* p) const { _mm256_storeu_pd(p, v); }
    Vec operator+(Vec o) const { return {_mm256_add_pd(v, o.v)}; }
    Vec operator-(Vec o) const { return {_mm256_sub_pd(v, o.v)}; }
    Vec operator*(Vec o) const { return {_mm256_mul_pd(v, o.v)}; }
    Vec operator/(Vec o) const { return {_mm256_div_pd(v, o.v)}; }
    double sum() const {
        const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
        return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
    }
};

inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline Vec<double> max_or_nan(Vec<double> x, Vec<double> bound) { return {_mm256_max_pd(bound.v, x.v)}; }
inline Vec<double> if_within(Vec<double> y, Vec<double> limit, Vec<double> x, Vec<double> other) {
    return {_mm256_blendv_pd(other.v, x.v, _mm256_cmp_pd(y.v, limit.v, _CMP_NGT_UQ))};
}
inline Vec<double> fraction(Vec<double> x) {
    const Vec<double> bounded = max_or_nan(x, Vec<double>::all(-1e9));
    return bounded - Vec<double>{_mm256_round_pd(bounded.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// p·2^n for whole n, zero below 2^−1023.
inline Vec<double> times_power_of_two(Vec<double> p, Vec<double> n) {
    const __m256d bounded = max_or_nan(n, Vec<double>::all(-1023.0)).v;
    const __m256i whole = _mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(bounded));
    const __m256i bits = _mm256_slli_epi64(_mm256_add_epi64(whole, _mm256_set1_epi64x(1023)), 52);
    return {_mm256_mul_pd(p.v, _mm256_castsi256_pd(bits))};
}

// The first and the last four of eight floats, and back.
inline Vec<double> first_half(Vec<float> x) { return {_mm256_cvtps_pd(_mm256_castps256_ps128(x.v))}; }
inline Vec<double> second_half(Vec<float> x) { return {_mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1))}; }
inline Vec<float> narrowed(Vec<double> first, Vec<double> second) {
    return {_mm256_set_m128(_mm256_cvtpd_ps(second.v), _mm256_cvtpd_ps(first.v))};
}

// Eight floats from eight numbers of 16 bits.
inline Vec<float> from_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline Vec<float> from_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void to_f16(Vec<float> x, uint16_t* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
// As torch rounds: to even.
inline void round_to_bf16(Vec<float> x, uint16_t* p) {
    const __m256i bits = _mm256_castps_si256(x.v), high = _mm256_srli_epi32(bits, 16);
    const __m256i half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(high, _mm256_set1_epi32(1)));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1)));
}

inline void transpose_8x8(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(in + i * in_stride));
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        r[4 * i + 0] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(reinterpret_cast<float*>(out + i * out_stride), _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(reinterpret_cast<float*>(out + (i + 4) * out_stride),
                         _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}

// out[c][r] = in[r][c] for 16×16 words of 32 bits.
inline void transpose_16x16(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
    for (int i = 0; i < 16; i += 8) {
        for (int j = 0; j < 16; j += 8) transpose_8x8(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
    }
}
