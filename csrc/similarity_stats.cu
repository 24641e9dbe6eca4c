// Row and column sums of matrices of exponentials, nothing of size N×N stored.
//
// A thread adds up its four rows and 32 columns in registers; quads finish the rows, a butterfly over the warp and
// shared memory finish the columns, and each sum of a tile reaches device memory by one atomic addition.
#include "entries.h"
#include "pingpong_sm90.cuh"

namespace gapkernels {
namespace {

struct StatsEpilogue {
  struct MatrixParams {
    const float* row_factors;
    const float* col_factors;
    const void* scale;
    bool scale_is_double;
    bool biased;
  };

  struct Params {
    MatrixParams matrices[kMaxMatrices];
    int diagonal;
    float headroom;
    const float* largest;
    float* row_sums;
    float* col_sums;
  };

  struct Storage {
    float row_terms[kTile];
    alignas(16) float col_factors[kTile];
    float col_sums[4][kTile];  // of each warp
  };

  __device__ StatsEpilogue(const Params& params, const TileSpace& space, Storage& storage, int thread, int barrier)
      : params_(params), space_(space), storage_(storage), thread_(thread), barrier_(kTile, barrier) {}

  static bool encoded(const Params&) { return true; }

  // Starts to read what prepare() needs of a tile; nothing is done with it yet, so that nobody waits.
  __device__ void fetch(const Item& tile) {
    const MatrixParams& matrix = params_.matrices[tile.matrix];
    const int i = tile.row_start + thread_, j = tile.col_start + thread_;
    row_factor_ = i < space_.num_rows ? matrix.row_factors[i] : 0.0f;
    col_factor_ = j < space_.num_cols ? matrix.col_factors[j] : 0.0f;
  }

  __device__ void prepare(const Item& tile) {
    const MatrixParams& matrix = params_.matrices[tile.matrix];
    if (tile.matrix != matrix_) {
      matrix_ = tile.matrix;
      scale_ = load_scale(matrix.scale, matrix.scale_is_double);
      const float* largest = params_.largest == nullptr ? nullptr : params_.largest + tile.matrix;
      shift_ = constant_shift(scale_, largest, matrix.biased, params_.headroom);
    }
    storage_.row_terms[thread_] =
        matrix.biased ? row_term<true>(row_factor_, scale_) : row_term<false>(row_factor_, scale_);
    storage_.col_factors[thread_] = col_factor_;
    barrier_.arrive_and_wait();
  }

  template <class Accumulators, class TiledMma>
  __device__ void finish(const Item& tile, const Accumulators& accumulators, const TiledMma&) {
    const Mask mask = mask_of(tile);
    const bool masked = mask.needed(tile.row_start, tile.col_start);
    float row_sums[kRowsPerThread] = {}, col_sums[kColsPerThread];
    if (params_.matrices[tile.matrix].biased) {
      if (masked) add_up<true, true>(tile, accumulators, mask, row_sums, col_sums);
      else add_up<true, false>(tile, accumulators, mask, row_sums, col_sums);
    } else {
      if (masked) add_up<false, true>(tile, accumulators, mask, row_sums, col_sums);
      else add_up<false, false>(tile, accumulators, mask, row_sums, col_sums);
    }
    store_rows(tile, row_sums);
    store_cols(tile, col_sums);
  }

  __device__ void end() {}

 private:
  __device__ Mask mask_of(const Item& tile) const {
    return {space_.num_rows, space_.num_cols, params_.diagonal, space_.is_symmetric(tile.matrix)};
  }

  template <bool kBiased, bool kMasked, class Accumulators>
  __device__ void add_up(const Item& tile, const Accumulators& accumulators, const Mask& mask,
                         float (&row_sums)[kRowsPerThread], float (&col_sums)[kColsPerThread]) const {
    float row_terms[kRowsPerThread];
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) row_terms[r] = storage_.row_terms[fragment_row(thread_, r / 2, r % 2)];
    RowMask counted[kRowsPerThread];
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      counted[r] = mask.row(tile.row_start + fragment_row(thread_, r / 2, r % 2),
                            tile.col_start + fragment_col(thread_, 0, 0));
    }
#pragma unroll
    for (int n = 0; n < kColsPerThread / 2; ++n) {
      const float2 factors = *reinterpret_cast<const float2*>(&storage_.col_factors[fragment_col(thread_, n, 0)]);
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        float total = 0.0f;
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
          const float product = accumulators(cute::make_coord(b, r % 2, n), r / 2, 0);
          const float x = exponent<kBiased>(product, row_terms[r], b == 0 ? factors.x : factors.y, scale_, shift_);
          float entry = fast_exp2(x);
          if (kMasked) entry = counted[r].counts(fragment_col(0, n, b)) ? entry : 0.0f;
          row_sums[r] += entry;
          total += entry;
        }
        col_sums[2 * n + b] = total;
      }
    }
  }

  __device__ void store_rows(const Item& tile, float (&sums)[kRowsPerThread]) const {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      sums[r] += __shfl_xor_sync(0xffffffff, sums[r], 1);
      sums[r] += __shfl_xor_sync(0xffffffff, sums[r], 2);
    }
    // Each lane of a quad adds one of the four rows that all of it now know.
    const int r = thread_ % 4;
    const float sum = r == 0 ? sums[0] : r == 1 ? sums[1] : r == 2 ? sums[2] : sums[3];
    const int i = tile.row_start + fragment_row(thread_, r / 2, r % 2);
    if (i < space_.num_rows) atomicAdd(params_.row_sums + offset(tile, space_.num_rows) + i, sum);
  }

  __device__ void store_cols(const Item& tile, float (&sums)[kColsPerThread]) const {
    const int lane = thread_ % 32;
    exchange<16>(sums, lane, 16);
    exchange<8>(sums, lane, 8);
    exchange<4>(sums, lane, 4);
#pragma unroll
    for (int q = 0; q < 4; ++q) storage_.col_sums[thread_ / 32][ColumnReduction::col(lane, q)] = sums[q];
    barrier_.arrive_and_wait();
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < 4; ++warp) sum += storage_.col_sums[warp][thread_];
    const int j = tile.col_start + thread_;
    if (j < space_.num_cols) {
      atomicAdd((space_.is_symmetric(tile.matrix) ? params_.row_sums : params_.col_sums) + offset(tile, space_.num_cols) + j, sum);
    }
  }

  template <int kHalf>
  __device__ static void exchange(float (&sums)[kColsPerThread], int lane, int distance) {
    float sent[kHalf];
    ColumnReduction::split(sums, sent, lane, distance);
#pragma unroll
    for (int q = 0; q < kHalf; ++q) sums[q] += __shfl_xor_sync(0xffffffff, sent[q], distance);
  }

  __device__ static int64_t offset(const Item& tile, int length) { return static_cast<int64_t>(tile.matrix) * length; }

  const Params& params_;
  const TileSpace& space_;
  Storage& storage_;
  int thread_;
  mutable cutlass::arch::NamedBarrier barrier_;
  int matrix_ = -1;  // that scale and shift are of
  float scale_;
  float shift_;
  float row_factor_;  // of the tile fetched last
  float col_factor_;
};

template <class ElementType>
const char* run(const StatsArguments& arguments, void* stream) {
  using Kernel = PingPong<ElementType, StatsEpilogue>;
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
                                   matrix.biased};
    space.symmetric |= static_cast<unsigned>(matrix.symmetric) << m;
  }
  params.order = TileOrder<Kernel::kCluster>::of(space);
  return launch<Kernel>(params, stream);
}

}  // namespace

const char* similarity_stats(const StatsArguments& arguments, void* stream) {
  if (const char* problem = machine_problem()) return problem;
  return arguments.element == Element::kBFloat16 ? run<cutlass::bfloat16_t>(arguments, stream)
                                                 : run<cutlass::half_t>(arguments, stream);
}

}  // namespace gapkernels
