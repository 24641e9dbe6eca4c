// Who holds what: the accumulators of a tile over the threads of the warpgroups that compute it, and sums of its
// columns.
//
//     128×128   one warpgroup, two instructions of 64 rows one below the other
//     128×256   two warpgroups, one instruction of 64 rows each
//
// wgmma leaves thread t = 32·warp + lane of all of them with accumulators (n, m, half, b), half < 2, b < 2, of
//
//     row 64·m + 16·warp + 8·half + lane / 4,    column 8·n + 2·(lane % 4) + b
//
// 128 in either case; the threads of a quad share rows, and lanes that are equal modulo four share columns.
#pragma once

#include "tiles.h"

namespace gapkernels {

constexpr int kConsumers = 2;  // warpgroups of a block that compute
constexpr int kGroupThreads = 128;

template <int kTileWidth>
struct Fragments {
  static constexpr int kWidth = kTileWidth;
  static constexpr int kMembers = kWidth / kTile;  // warpgroups that share a tile, a team
  static constexpr int kTeams = kConsumers / kMembers;
  static constexpr int kHalves = 2 / kMembers;       // instructions of 64 rows for each warpgroup, m < kHalves
  static constexpr int kRowsPerThread = 2 * kHalves;  // of a tile
  static constexpr int kColsPerThread = kWidth / 4;  // n < kColsPerThread / 2
  static constexpr int kGroupRows = 64 * kHalves;    // of a warpgroup
};

GAPKERNELS_HOST_DEVICE constexpr int fragment_row(int thread, int m, int half) {
  return 64 * m + 16 * (thread / 32) + 8 * half + thread % 32 / 4;
}

GAPKERNELS_HOST_DEVICE constexpr int fragment_col(int thread, int n, int b) { return 8 * n + 2 * (thread % 4) + b; }

// The number of a warpgroup's part of a tile, which begins at these entries, among all of a matrix; how many there are.
template <int kWidth>
GAPKERNELS_HOST_DEVICE int part_number(int row_start, int col_start, int num_cols) {
  return row_start / Fragments<kWidth>::kGroupRows * ceil_div(num_cols, kWidth) + col_start / kWidth;
}

template <int kWidth>
int64_t num_parts(int num_rows, int num_cols) {
  return static_cast<int64_t>(ceil_div(num_rows, Fragments<kWidth>::kGroupRows)) * ceil_div(num_cols, kWidth);
}

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
