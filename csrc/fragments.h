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

}  // namespace gapkernels
