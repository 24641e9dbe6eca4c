// Row and column sums of matrices of exponentials, nothing of size N×N stored.
//
// A thread adds up its rows and columns of a tile, four and 32 or, if it is wide, two and 64, in registers. Rows stay
// there as long as a consumer's tiles have the same ones; then quads finish them. A butterfly over the warp and shared
// memory finish the columns of a warpgroup's part of a tile: two that share a tile do not wait for each other. Each
// finished sum reaches device memory by one atomic addition.
//
// Entries that are kept go from registers to device memory, eight at a time: shared memory is left to the pipeline.
#pragma once

#include "entries.h"
#include "persistent_sm90.cuh"

namespace gapkernels {

template <int kTileWidth>
struct StatsEpilogue {
  static constexpr int kWidth = kTileWidth;
  using Tiling = Teams<kWidth>;
  static constexpr int kRowsPerThread = Tiling::kRowsPerThread, kColsPerThread = Tiling::kColsPerThread;
  using Reduction = ColumnReduction<kColsPerThread>;
  static constexpr int kProducerRegisters = 40;

  struct MatrixParams {
    const float* row_factors;
    const float* col_factors;
    const void* scale;
    bool scale_is_double;
    bool biased;
    Kept kept;
  };

  struct Params {
    MatrixParams matrices[kMaxMatrices];
    int diagonal;
    float headroom;
    const float* largest;
    float* row_sums;
    float* col_sums;
  };

  struct Prepared {
    Item tile;
    float scale;
    float shift;
    bool biased;
    float row_terms[kTile];
    alignas(16) float col_factors[kWidth];
  };

  struct Scratch {
    float col_sums[2][4][kWidth];  // of every other tile, of each warp
  };

  struct Fetched {
    float row_factors[kTile / kWarp];  // of rows lane, lane + 32, …
    float col_factors[kWidth / kWarp];
    float scale;
    float shift;
  };

  // Reads device memory for prepare(), which is called once its place is free.
  __device__ static Fetched fetch(const Params& params, const TileSpace& space, const Item& tile, int lane) {
    const MatrixParams& matrix = params.matrices[tile.matrix];
    Fetched fetched;
#pragma unroll
    for (int q = 0; q < kTile / kWarp; ++q) {
      const int i = tile.row_start + lane + kWarp * q;
      fetched.row_factors[q] = i < space.num_rows ? matrix.row_factors[i] : 0.0f;
    }
#pragma unroll
    for (int q = 0; q < kWidth / kWarp; ++q) {
      const int j = tile.col_start + lane + kWarp * q;
      fetched.col_factors[q] = j < space.num_cols ? matrix.col_factors[j] : 0.0f;
    }
    fetched.scale = load_scale(matrix.scale, matrix.scale_is_double);
    const float* largest = params.largest == nullptr ? nullptr : params.largest + tile.matrix;
    fetched.shift = constant_shift(fetched.scale, largest, matrix.biased, params.headroom);
    return fetched;
  }

  __device__ static void prepare(const Params& params, const TileSpace&, const Item& tile, const Fetched& fetched,
                                 Prepared& prepared, int lane) {
    const bool biased = params.matrices[tile.matrix].biased;
#pragma unroll
    for (int q = 0; q < kTile / kWarp; ++q) {
      const float factor = fetched.row_factors[q];
      prepared.row_terms[lane + kWarp * q] =
          biased ? row_term<true>(factor, fetched.scale) : row_term<false>(factor, fetched.scale);
    }
#pragma unroll
    for (int q = 0; q < kWidth / kWarp; ++q) prepared.col_factors[lane + kWarp * q] = fetched.col_factors[q];
    if (lane != 0) return;
    prepared.scale = fetched.scale;
    prepared.shift = fetched.shift;
    prepared.biased = biased;
  }

  __device__ StatsEpilogue(const Params& params, const TileSpace& space, Scratch& scratch, int thread, int barrier)
      : params_(params), space_(space), scratch_(scratch), thread_(thread), barrier_(kGroupThreads, barrier) {}

  static bool encoded(const Params&) { return true; }

  // Calls `release` when it needs nothing more of `prepared`.
  template <class Accumulators, class Release>
  __device__ void finish(const Item& tile, const Prepared& prepared, const Accumulators& accumulators,
                         Release release) {
    const Mask mask = mask_of(tile);
    const bool masked = mask.needed(tile.row_start, tile.col_start, kWidth);
    float col_sums[kColsPerThread];
    if (prepared.biased) {
      if (masked) add_up<true, true, false>(tile, prepared, accumulators, mask, col_sums);
      else add_up<true, false, false>(tile, prepared, accumulators, mask, col_sums);
    } else if (params_.matrices[tile.matrix].kept.entries != nullptr) {
      if (masked) add_up<false, true, true>(tile, prepared, accumulators, mask, col_sums);
      else add_up<false, false, true>(tile, prepared, accumulators, mask, col_sums);
    } else {
      if (masked) add_up<false, true, false>(tile, prepared, accumulators, mask, col_sums);
      else add_up<false, false, false>(tile, prepared, accumulators, mask, col_sums);
    }
    release();
    if (tile.left <= kConsumers) store_rows(tile);  // the next ones of these rows, if any, are the other consumer's
    store_cols(tile, col_sums);
  }

  __device__ void end() {}

 private:
  __device__ Mask mask_of(const Item& tile) const {
    return {space_.num_rows, space_.num_cols, params_.diagonal, space_.is_symmetric(tile.matrix)};
  }

  template <bool kBiased, bool kMasked, bool kKept, class Accumulators>
  __device__ void add_up(const Item& tile, const Prepared& prepared, const Accumulators& accumulators, const Mask& mask,
                         float (&col_sums)[kColsPerThread]) {
    const float scale = prepared.scale, shift = prepared.shift;
    float row_terms[kRowsPerThread];
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) row_terms[r] = prepared.row_terms[fragment_row(thread_, r / 2, r % 2)];
    uint32_t words[kRowsPerThread][QuadTranspose::kWords];
    RowMask counted[kRowsPerThread];
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      counted[r] = mask.row(tile.row_start + fragment_row(thread_, r / 2, r % 2),
                            tile.col_start + fragment_col(thread_, 0, 0));
    }
#pragma unroll
    for (int n = 0; n < kColsPerThread / 2; ++n) {
      float entries[kRowsPerThread][2];
      const float2 factors = *reinterpret_cast<const float2*>(&prepared.col_factors[fragment_col(thread_, n, 0)]);
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        float total = 0.0f;
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
          const float product = accumulators(cute::make_coord(b, r % 2, n), r / 2, 0);
          const float x = exponent<kBiased>(product, row_terms[r], b == 0 ? factors.x : factors.y, scale, shift);
          float entry = fast_exp2(x);
          if (kMasked) entry = counted[r].counts(fragment_col(0, n, b)) ? entry : 0.0f;
          row_sums_[r] += entry;
          total += entry;
          entries[r][b] = entry;
        }
        col_sums[2 * n + b] = total;
      }
      if constexpr (kKept) {
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) words[r][n % 4] = pack_bfloat16(entries[r][0], entries[r][1]);
        if (n % 4 == 3) {
#pragma unroll
          for (int r = 0; r < kRowsPerThread; ++r) keep(tile, r, n / 4, words[r]);
        }
      }
    }
  }

  // What the quad has of a row and of 32 columns: eight for each lane.
  __device__ void keep(const Item& tile, int r, int columns, uint32_t (&words)[QuadTranspose::kWords]) const {
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t given = QuadTranspose::give(words, thread_, distance, e);
        QuadTranspose::take(words, thread_, distance, e, __shfl_xor_sync(0xffffffff, given, distance));
      }
    }
    const Kept& kept = params_.matrices[tile.matrix].kept;
    const int i = tile.row_start + fragment_row(thread_, r / 2, r % 2);
    const int j = tile.col_start + 32 * columns + 8 * (thread_ % 4);
    if (i >= space_.num_rows || j >= space_.num_cols) return;
    auto* place = static_cast<uint16_t*>(kept.entries) + i * kept.stride + j;
    *reinterpret_cast<uint4*>(place) = {words[0], words[1], words[2], words[3]};
  }

  __device__ void store_rows(const Item& tile) {
    float sums[kRowsPerThread];
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      sums[r] = row_sums_[r] + __shfl_xor_sync(0xffffffff, row_sums_[r], 1);
      sums[r] += __shfl_xor_sync(0xffffffff, sums[r], 2);
      row_sums_[r] = 0.0f;
    }
    // Each lane of a quad adds one of the rows that all of it now know, as long as there are any.
    const int r = thread_ % 4;
    float sum = sums[0];
#pragma unroll
    for (int other = 1; other < kRowsPerThread; ++other) sum = r == other ? sums[other] : sum;
    const int i = tile.row_start + fragment_row(thread_, r / 2, r % 2);
    if (r < kRowsPerThread && i < space_.num_rows) atomicAdd(params_.row_sums + offset(tile, space_.num_rows) + i, sum);
  }

  __device__ void store_cols(const Item& tile, float (&sums)[kColsPerThread]) {
    const int lane = thread_ % kWarp, warp_of_group = thread_ % kGroupThreads / kWarp;
    // A thread that is fast may be here with the next tile while another still reads the sums of this one; with the tile
    // after that it cannot, for the barrier in between.
    auto& of_warps = scratch_.col_sums[parity_];
    parity_ ^= 1;
    exchange<kColsPerThread / 2>(sums, lane, 16);
    exchange<kColsPerThread / 4>(sums, lane, 8);
    exchange<kColsPerThread / 8>(sums, lane, 4);
#pragma unroll
    for (int q = 0; q < Reduction::kLeft; ++q) of_warps[warp_of_group][Reduction::col(lane, q)] = sums[q];
    barrier_.arrive_and_wait();
    float* totals = space_.is_symmetric(tile.matrix) ? params_.row_sums : params_.col_sums;
#pragma unroll
    for (int q = 0; q < kWidth / kGroupThreads; ++q) {
      const int col = thread_ % kGroupThreads + kGroupThreads * q;
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < 4; ++warp) sum += of_warps[warp][col];
      const int j = tile.col_start + col;
      if (j < space_.num_cols) atomicAdd(totals + offset(tile, space_.num_cols) + j, sum);
    }
  }

  template <int kHalf>
  __device__ static void exchange(float (&sums)[kColsPerThread], int lane, int distance) {
    float sent[kHalf];
    Reduction::split(sums, sent, lane, distance);
#pragma unroll
    for (int q = 0; q < kHalf; ++q) sums[q] += __shfl_xor_sync(0xffffffff, sent[q], distance);
  }

  __device__ static int64_t offset(const Item& tile, int length) { return static_cast<int64_t>(tile.matrix) * length; }

  const Params& params_;
  const TileSpace& space_;
  Scratch& scratch_;
  int thread_;
  mutable cutlass::arch::NamedBarrier barrier_;
  int parity_ = 0;
  float row_sums_[kRowsPerThread] = {};  // of this consumer's tiles of the rows at hand
};

template <template <class, int, int> class Feed, int kWidth, class ElementType>
const char* run(const StatsArguments& arguments, void* stream) {
  using Kernel = Persistent<ElementType, StatsEpilogue<kWidth>, Feed>;
  typename Kernel::Params params;
  TileSpace space{arguments.num_rows, arguments.num_cols, arguments.num_matrices, 0};
  params.dim = arguments.dim;
  params.epilogue.diagonal = arguments.diagonal;
  params.epilogue.headroom = arguments.headroom;
  params.epilogue.largest = arguments.largest;
  params.epilogue.row_sums = arguments.row_sums;
  params.epilogue.col_sums = arguments.col_sums;
  for (int m = 0; m < arguments.num_matrices; ++m) {
    const Matrix& matrix = arguments.matrices[m];
    params.operands[m] = Kernel::operand_params(matrix, arguments.num_rows, arguments.num_cols, arguments.dim);
    params.epilogue.matrices[m] = {matrix.row_factors, matrix.col_factors, matrix.scale, matrix.scale_is_double,
                                   matrix.biased, arguments.kept[m]};
    space.symmetric |= static_cast<unsigned>(matrix.symmetric) << m;
  }
  params.order = Kernel::Order::of(space);
  return launch<Kernel>(params, stream);
}

template <template <class, int, int> class Feed, int kWidth>
const char* run(const StatsArguments& arguments, void* stream) {
  if (const char* problem = machine_problem()) return problem;
  return arguments.element == Element::kBFloat16 ? run<Feed, kWidth, cutlass::bfloat16_t>(arguments, stream)
                                                 : run<Feed, kWidth, cutlass::half_t>(arguments, stream);
}

}  // namespace gapkernels
