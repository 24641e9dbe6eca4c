// Who holds what: the accumulators of a tile over the threads of the team that computes it, and sums of its columns.
//
// wgmma leaves thread t = 32·warp + lane of the team with accumulators (n, m, half, b), half < 2, b < 2, of
//
//     row 64·m + 16·warp + 8·half + lane / 4,    column 8·n + 2·(lane % 4) + b
//
// 128 in either case; the threads of a quad share rows, and lanes that are equal modulo four share columns.
#pragma once

#include "tiles.h"

namespace gapkernels {

GAPKERNELS_HOST_DEVICE constexpr int fragment_row(int thread, int m, int half) {
  return 64 * m + 16 * (thread / 32) + 8 * half + thread % 32 / 4;
}

GAPKERNELS_HOST_DEVICE constexpr int fragment_col(int thread, int n, int b) { return 8 * n + 2 * (thread % 4) + b; }

// Adding up a warp's columns over the eight lanes that share them: in each of three steps a lane hands half of its sums
// to the lane `distance` away and takes that lane's share of the other half. What remains are the sums of an eighth.
//
//     distance 16: 32 → 16 sums     distance 8: 16 → 8     distance 4: 8 → 4     28 exchanges instead of 96
template <int kCols>
struct ColumnReduction {
  static constexpr int kLeft = kCols / 8;

  // Split: keep one half in place at the front, put the other into `sent`.
  template <int kHalf>
  GAPKERNELS_HOST_DEVICE static void split(float (&sums)[kCols], float (&sent)[kHalf], int lane, int distance) {
    const bool upper = lane & distance;
#pragma unroll
    for (int q = 0; q < kHalf; ++q) {
      sent[q] = upper ? sums[q] : sums[q + kHalf];
      sums[q] = upper ? sums[q + kHalf] : sums[q];
    }
  }

  // The column of the tile that sum q, q < kLeft, of a lane belongs to in the end.
  GAPKERNELS_HOST_DEVICE static constexpr int col(int lane, int q) {
    const int index = lane / 4 * kLeft + q;  // of (n, b): a half, a quarter and an eighth of the sums were passed over
    return fragment_col(lane, index / 2, index % 2);
  }
};

// The four lanes of a quad hold two neighbouring columns each of every eight; given four times eight, packed in one word
// per lane and eight, they exchange words until lane q of the quad has the q-th eight, in order. In each of two steps a
// lane gives two of its words to the lane `distance` away and takes two in their places.
struct QuadTranspose {
  static constexpr int kWords = 4;

  // The lower place of exchange e, e < 2, whose upper one is `distance` further.
  GAPKERNELS_HOST_DEVICE static constexpr int low(int distance, int e) { return distance == 1 ? 2 * e : e; }

  GAPKERNELS_HOST_DEVICE static uint32_t give(const uint32_t (&words)[kWords], int lane, int distance, int e) {
    return lane & distance ? words[low(distance, e)] : words[low(distance, e) + distance];
  }

  GAPKERNELS_HOST_DEVICE static void take(uint32_t (&words)[kWords], int lane, int distance, int e, uint32_t word) {
    uint32_t &lower = words[low(distance, e)], &upper = words[low(distance, e) + distance];
    const bool is_upper = lane & distance;
    lower = is_upper ? word : lower;
    upper = is_upper ? upper : word;
  }
};

}  // namespace gapkernels
