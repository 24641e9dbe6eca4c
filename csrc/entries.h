// One definition of each formula of an entry, for the kernels and for the tests on the CPU.
#pragma once

#include <cmath>
#include <cstring>

#include "tiles.h"

namespace gapkernels {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLargestSpread = 100.0f;  // of the log sums of a tile that one exponential per entry can serve
constexpr float kLowest = -1e30f;         // stands for −∞ where it is multiplied by zero

// 2^x to 2^-22 relative; results below 2^-126 are zero.
GAPKERNELS_HOST_DEVICE float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// Two numbers rounded to bfloat16, to nearest even, the left one in the lower half.
GAPKERNELS_HOST_DEVICE uint32_t pack_bfloat16(float left, float right) {
#if defined(__CUDA_ARCH__)
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(right), "f"(left));
  return both;
#else
  const auto rounded = [](float value) -> uint32_t {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return rounded(left) | rounded(right) << 16;
#endif
}

// log2 e times the scale.
GAPKERNELS_HOST_DEVICE float load_scale(const void* scale, bool is_double) {
  return is_double ? static_cast<float>(*static_cast<const double*>(scale) * 1.4426950408889634074)
                   : *static_cast<const float*>(scale) * kLog2E;
}

// The smallest reference exponent with which no sum can overflow. Squared distances, the biased exponents, are never
// negative.
GAPKERNELS_HOST_DEVICE float constant_shift(float scale, const float* largest, bool biased, float headroom) {
  const float bound = biased ? 0.0f : largest == nullptr ? scale : scale * *largest;
  const float shift = bound - headroom;
  return shift < 0.0f ? 0.0f : shift;  // keeps a shift that is not a number
}

// What a row contributes to the exponents of its entries, and the exponent less `shift`. The products are taken in
// this order everywhere, so that forward and backward pass round alike.
template <bool kBiased>
GAPKERNELS_HOST_DEVICE float row_term(float factor, float scale) {
  return kBiased ? factor : factor * scale;
}

template <bool kBiased>
GAPKERNELS_HOST_DEVICE float exponent(float product, float row, float col_factor, float scale, float shift) {
  if (kBiased) return fmaf(product, scale, row + col_factor) - shift;
  return fmaf(product * row, col_factor, -shift);
}

// The entries of one row that count, by columns relative to a base: compares with constants once loops are unrolled.
struct RowMask {
  int diagonal;   // column on the diagonal
  int end;        // columns from here on do not count
  unsigned span;  // as many columns before the diagonal do not count either

  GAPKERNELS_HOST_DEVICE bool counts(int col) const {
    return col < end && static_cast<unsigned>(diagonal - col) > span;
  }
};

// Where a tile has entries that do not count: a diagonal through it, or an edge of the matrix.
struct Mask {
  int num_rows;
  int num_cols;
  int diagonal;
  bool triangle;  // below the diagonal nothing counts either

  GAPKERNELS_HOST_DEVICE bool needed(int row_start, int col_start, int width) const {
    const int first = row_start + diagonal;
    const bool meets = col_start <= first + kTile - 1 && (triangle || first <= col_start + width - 1);
    return meets || row_start + kTile > num_rows || col_start + width > num_cols;
  }

  GAPKERNELS_HOST_DEVICE RowMask row(int i, int base_col) const {
    return {i + diagonal - base_col, i < num_rows ? num_cols - base_col : -(1 << 30), triangle ? 0x7fffffffu : 0u};
  }
};

// A tile of a pair's gradient needs one exponential per entry,
//
//     2^(x − L) + 2^(x − M) = 2^(x − ref)·(2^(ref − L) + 2^(ref − M)),    ref halfway between all L and M of the tile,
//
// as long as these lie within kLargestSpread of each other. Otherwise it takes two; so do the few tiles with a mask, for
// which each form would need a second loop.
struct LogSumRange {
  float smallest;
  float largest;

  GAPKERNELS_HOST_DEVICE bool one_exponential() const { return largest - smallest <= kLargestSpread; }
  GAPKERNELS_HOST_DEVICE float middle() const { return (smallest + largest) * 0.5f; }
};

// How an entry of a pair's gradient is put together. With one exponential e = 2^(x − ref) and inverse norms f, g:
//
//     kFactored   H = e·(r·g + f·c)      r = 2^(ref − L)·f, c = 2^(ref − M)·g
//     kMoment     H = (e·(r + c))·f·g    r = 2^(ref − L),   c = 2^(ref − M), and Σ e·(r + c)·x is wanted as well
//     kTwo        H = (2^(x − L) + 2^(x − M))·f·g, likewise
enum class Form { kFactored, kMoment, kTwo };

GAPKERNELS_HOST_DEVICE Form form_of(const LogSumRange& range, bool masked, bool with_moment) {
  if (masked || !range.one_exponential()) return Form::kTwo;
  return with_moment ? Form::kMoment : Form::kFactored;
}

// r of a row or c of a column; the log sum itself for two exponentials.
template <Form kForm>
GAPKERNELS_HOST_DEVICE float share(float log_sum, float middle, float factor) {
  if (kForm == Form::kTwo) return log_sum;
  const float share = fast_exp2(middle - log_sum);
  return kForm == Form::kFactored ? share * factor : share;
}

// H_ij from x − ref (from x for two exponentials); adds to the moment.
template <Form kForm>
GAPKERNELS_HOST_DEVICE float pair_gradient(float x, float middle, float row_share, float row_factor, float col_share,
                                           float col_factor, float& moment) {
  if (kForm == Form::kFactored) return fast_exp2(x) * fmaf(row_share, col_factor, row_factor * col_share);
  float gradient;
  if (kForm == Form::kMoment) {
    gradient = fast_exp2(x) * (row_share + col_share);
    x += middle;
  } else {
    gradient = fast_exp2(x - row_share) + fast_exp2(x - col_share);
  }
  moment += gradient * (x > kLowest ? x : kLowest);
  return gradient * row_factor * col_factor;
}

}  // namespace gapkernels
