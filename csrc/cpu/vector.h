// Vectors of floats and doubles of the instruction set that the library was compiled for, and 2^x.
//
//     Vec<T>::size           numbers in a vector
//     max_or_nan(x, bound)   the larger; not a number if x is
//     if_within(y, limit, x, other)   x where y does not exceed the limit (or is not a number), else other
//     softplus_and_sigmoid(y)         ln(1 + 2^y) and 2^y / (1 + 2^y)
//     exp2(x)                2^x to two units in the last place (float) or nearly so (double); zero for −∞ and wherever
//                            2^x is below the range; x ≤ 127 (1023)
//
// 2^x = p(x − ⌊x⌋)·2^⌊x⌋ with a polynomial of degree 5 whose relative error is equal everywhere (7.5e-8).
#pragma once

#if defined(__AVX512F__)
#include "vector_avx512.h"
#elif defined(__AVX2__)
#include "vector_avx2.h"
#else
#error "compile with the flags that gapkernels/backends/cpu/build.py gives: AVX-512 or AVX2"
#endif

inline Vec<double> exp2(Vec<double> x) {
    // The Taylor series of 2^f about 0, |f| ≤ 1/2: (ln 2)^k / k!.
    static constexpr double terms[] = {
        1.0, 0.6931471805599453, 0.2402265069591007, 0.05550410866482158, 0.009618129107628477, 0.0013333558146428443,
        0.0001540353039338161, 1.5252733804059841e-05, 1.3215486790144307e-06, 1.0178086009239699e-07,
        7.054911620801123e-09, 4.4455382718708116e-10, 2.5678435993488202e-11, 1.3691488853904128e-12,
    };
    const Vec<double> f = fraction(x);
    Vec<double> p = Vec<double>::all(terms[13]);
    for (int k = 12; k >= 0; --k) p = fma(p, f, Vec<double>::all(terms[k]));
    return times_power_of_two(p, x - f);
}

template <class T>
struct SoftplusAndSigmoid {
    Vec<T> softplus, sigmoid;
};

// With z = 2^−|y|: ln(1 + 2^y) = max(y, 0)·ln 2 + ln(1 + z), and ln(1 + z) = 2·artanh(w), w = z / (2 + z) ≤ 1/3, whose
// series in w² loses less than the type holds after 7 (float) or 17 (double) terms.
template <class T>
inline SoftplusAndSigmoid<T> softplus_and_sigmoid(Vec<T> y) {
    using V = Vec<T>;
    const V zero = V::zero(), one = V::all(T(1));
    const V z = exp2(zero - max_or_nan(y, zero - y));
    const V w = z / (z + V::all(T(2)));
    const V square = w * w;
    constexpr int last = sizeof(T) == 4 ? 13 : 33;
    V series = V::all(T(1) / last);
    for (int k = last - 2; k >= 1; k -= 2) series = fma(series, square, V::all(T(1) / k));
    const V log = V::all(T(2)) * w * series;
    const V share = one / (one + z);
    return {fma(max_or_nan(y, zero), V::all(T(0.6931471805599453)), log), if_within(y, zero, z * share, share)};
}
