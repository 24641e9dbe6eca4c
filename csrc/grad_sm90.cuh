// A block of the gradient with respect to the inner products, rounded to the operands' type, for the products with them.
//
// A tile leaves in pieces of 64 rows, of which each warp has sixteen: through shared memory that is the warp's own, and
// the copy engine, which also cuts it off at the edges of the block.
//
//     128×128   a warpgroup has two pieces, one below the other, of all columns
//     128×256   each of two has four, side by side, so that the pipeline keeps its four stages
#pragma once

#include "entries.h"
#include "persistent_sm90.cuh"

namespace gapkernels {

template <class ElementType, int kTileWidth>
struct GradEpilogue {
  static constexpr int kWidth = kTileWidth;
  using Tiling = Teams<kWidth>;
  // What is read ahead for a wide tile takes 24 numbers a lane, 16 otherwise.
  static constexpr int kProducerRegisters = Tiling::kMembers == 1 ? 40 : 56;
  static constexpr int kPieceRows = 64;          // of an instruction
  static constexpr int kPieceCols = Tiling::kMembers == 1 ? kWidth : 64;
  static constexpr int kPartRows = 16;           // of a warp's share of a piece
  static constexpr int kPartCols = 64;           // of one row of the swizzle's pattern
  using PieceShape = cute::Shape<cute::Int<kPieceRows>, cute::Int<kPieceCols>>;
  using Atom = cute::GMMA::Layout_K_SW128_Atom<ElementType>;
  using PieceLayout = decltype(cute::tile_to_shape(Atom{}, PieceShape{}));
  // What leaves the same accumulators with each thread as a piece of the tile's own instruction.
  using PieceMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<ElementType, ElementType, float,
                                 cute::Shape<cute::Int<kPieceRows>, cute::Int<kPieceCols>, cute::Int<kDepth>>>()));
  using PartLayout = decltype(cute::tile_to_shape(Atom{}, cute::Shape<cute::Int<kPartRows>, cute::Int<kPartCols>>{}));
  using OutStride = cute::Stride<int64_t, cute::_1>;
  using StoreOut = decltype(cute::make_tma_copy(
      cute::SM90_TMA_STORE{},
      cute::make_tensor(cute::make_gmem_ptr(static_cast<ElementType*>(nullptr)), cute::Shape<int, int>{}, OutStride{}),
      PartLayout{}));

  // Where the part of a warp and of 64 columns begins in a piece.
  static constexpr int part_offset(int warp, int part) {
    return PieceLayout{}(warp * kPartRows, part * kPartCols);
  }

  static constexpr bool parts_lie_in_one_piece() {
    for (int warp = 0; warp < kPieceRows / kPartRows; ++warp) {
      for (int part = 0; part < kPieceCols / kPartCols; ++part) {
        for (int i = 0; i < kPartRows; i += 3) {
          for (int j = 0; j < kPartCols; j += 9) {
            const int whole = PieceLayout{}(warp * kPartRows + i, part * kPartCols + j);
            if (whole != part_offset(warp, part) + PartLayout{}(i, j)) return false;
          }
        }
      }
    }
    // So that their swizzles agree.
    return part_offset(1, 0) * sizeof(ElementType) % 1024 == 0 && part_offset(0, 1) * sizeof(ElementType) % 1024 == 0;
  }
  static_assert(parts_lie_in_one_piece());

  struct Params {
    StoreOut store_out;
    const float* row_factors;
    const float* col_factors;
    const float* row_log_sums;
    const float* col_log_sums;
    const float* reference;
    const void* scale;
    double* scale_partials;
    float unit;
    int diagonal;
    bool scale_is_double;
    bool biased;
  };

  struct Prepared {
    Item tile;
    float scale;
    float reference;
    float middle;
    Form form;
    float row_terms[kTile];    // of the exponent
    float row_shares[kTile];   // of the soft-max weight, see Form
    float row_factors[kTile];  // of the gradient
    alignas(16) float2 cols[kWidth];  // factor, share
  };

  struct Scratch {
    cute::array_aligned<ElementType, cute::cosize_v<PieceLayout>, 1024> out;  // as large as the swizzle's pattern
    float moments[2][4];  // of every other tile, of each warp
  };

  static constexpr int kRowsPerLane = kTile / kWarp, kColsPerLane = kWidth / kWarp;

  struct Fetched {
    float row_factors[kRowsPerLane];  // of rows lane, lane + 32, …
    float col_factors[kColsPerLane];
    float row_logs[kRowsPerLane];
    float col_logs[kColsPerLane];
  };

  // Reads device memory for prepare(), which is called once its place is free.
  __device__ static Fetched fetch(const Params& params, const TileSpace& space, const Item& tile, int lane) {
    Fetched fetched;
#pragma unroll
    for (int q = 0; q < kRowsPerLane; ++q) {
      const int i = tile.row_start + lane + kWarp * q;
      fetched.row_factors[q] = i < space.num_rows ? params.row_factors[i] : 0.0f;
      fetched.row_logs[q] = i < space.num_rows && !params.biased ? params.row_log_sums[i] : INFINITY;
    }
#pragma unroll
    for (int q = 0; q < kColsPerLane; ++q) {
      const int j = tile.col_start + lane + kWarp * q;
      fetched.col_factors[q] = j < space.num_cols ? params.col_factors[j] : 0.0f;
      fetched.col_logs[q] = j < space.num_cols && !params.biased ? params.col_log_sums[j] : INFINITY;
    }
    return fetched;
  }

  __device__ static void prepare(const Params& params, const TileSpace& space, const Item& tile,
                                 const Fetched& fetched, Prepared& prepared, int lane) {
    const float scale = load_scale(params.scale, params.scale_is_double);
    if (lane == 0) {
      prepared.scale = scale;
      prepared.reference = *params.reference;
    }
    if (params.biased) {
#pragma unroll
      for (int q = 0; q < kRowsPerLane; ++q) {
        prepared.row_terms[lane + kWarp * q] = row_term<true>(fetched.row_factors[q], scale);
      }
#pragma unroll
      for (int q = 0; q < kColsPerLane; ++q) prepared.cols[lane + kWarp * q] = {fetched.col_factors[q], 0.0f};
      return;
    }
    LogSumRange range{INFINITY, -INFINITY};
#pragma unroll
    for (int q = 0; q < kRowsPerLane; ++q) {
      range.smallest = fminf(range.smallest, fetched.row_logs[q]);
      if (tile.row_start + lane + kWarp * q < space.num_rows) range.largest = fmaxf(range.largest, fetched.row_logs[q]);
    }
#pragma unroll
    for (int q = 0; q < kColsPerLane; ++q) {
      range.smallest = fminf(range.smallest, fetched.col_logs[q]);
      if (tile.col_start + lane + kWarp * q < space.num_cols) range.largest = fmaxf(range.largest, fetched.col_logs[q]);
    }
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      range.smallest = fminf(range.smallest, __shfl_xor_sync(0xffffffff, range.smallest, distance));
      range.largest = fmaxf(range.largest, __shfl_xor_sync(0xffffffff, range.largest, distance));
    }
    const float middle = range.middle();
    const Mask mask{space.num_rows, space.num_cols, params.diagonal, false};
    const Form form =
        form_of(range, mask.needed(tile.row_start, tile.col_start, kWidth), params.scale_partials != nullptr);
#pragma unroll
    for (int q = 0; q < kRowsPerLane; ++q) {
      const int place = lane + kWarp * q;
      const float factor = fetched.row_factors[q], weight = factor * params.unit;
      prepared.row_terms[place] = row_term<false>(factor, scale);
      prepared.row_factors[place] = weight;
      prepared.row_shares[place] = share_of(form, fetched.row_logs[q], middle, weight);
    }
#pragma unroll
    for (int q = 0; q < kColsPerLane; ++q) {
      const float factor = fetched.col_factors[q];
      prepared.cols[lane + kWarp * q] = {factor, share_of(form, fetched.col_logs[q], middle, factor)};
    }
    if (lane != 0) return;
    prepared.middle = middle;
    prepared.form = form;
  }

  __device__ GradEpilogue(const Params& params, const TileSpace& space, Scratch& scratch, int thread, int barrier)
      : params_(params), space_(space), scratch_(scratch), thread_(thread), barrier_(kGroupThreads, barrier) {}

  static bool encoded(const Params& params) { return descriptor_encoded(params.store_out); }

  // Calls `release` when it needs nothing more of `prepared`.
  template <class Accumulators, class Release>
  __device__ void finish(const Item& tile, const Prepared& prepared, const Accumulators& products, Release release) {
    if (params_.biased) {
      if (mask().needed(tile.row_start, tile.col_start, kWidth)) centroid_gradients<true>(tile, prepared, products);
      else centroid_gradients<false>(tile, prepared, products);
      release();
      return;
    }
    float moment = 0.0f;
    switch (prepared.form) {
      case Form::kFactored: pair_gradients<Form::kFactored>(tile, prepared, products, moment); break;
      case Form::kMoment: pair_gradients<Form::kMoment>(tile, prepared, products, moment); break;
      default: pair_gradients<Form::kTwo>(tile, prepared, products, moment);
    }
    release();
    if (params_.scale_partials != nullptr) add_moment(tile, moment);
  }

  __device__ void end() { wait_for_store(); }

 private:
  __device__ static float share_of(Form form, float log_sum, float middle, float factor) {
    switch (form) {
      case Form::kFactored: return share<Form::kFactored>(log_sum, middle, factor);
      case Form::kMoment: return share<Form::kMoment>(log_sum, middle, factor);
      default: return share<Form::kTwo>(log_sum, middle, factor);
    }
  }

  __device__ Mask mask() const { return {space_.num_rows, space_.num_cols, params_.diagonal, false}; }

  static constexpr int kRowsPerHalf = 2;  // of a thread

  // What a thread needs of its two rows of an instruction, in registers.
  struct Rows {
    RowMask counted[kRowsPerHalf];
    float terms[kRowsPerHalf];
  };

  __device__ Rows load_rows(const Item& tile, const Prepared& prepared, int half) const {
    Rows rows;
#pragma unroll
    for (int r = 0; r < kRowsPerHalf; ++r) {
      const int row = fragment_row(thread_, half, r);
      rows.counted[r] = mask().row(tile.row_start + row, tile.col_start + fragment_col(thread_, 0, 0));
      rows.terms[r] = prepared.row_terms[row];
    }
    return rows;
  }

  // value(product, which of the thread's rows of the half, column from its first, factor and share of the column), for
  // all entries of a half, which is stored piece by piece.
  template <class Products, class Value>
  __device__ void fill(const Item& tile, const Prepared& prepared, const Products& products, int half,
                       Value value) const {
    constexpr int kPieceGroups = kPieceCols / 8;  // of eight columns, numbered by n
#pragma unroll
    for (int piece = 0; piece < kWidth / kPieceCols; ++piece) {
      auto rounded = cute::make_tensor<ElementType>(cute::partition_shape_C(PieceMma{}, PieceShape{}));
#pragma unroll
      for (int group = 0; group < kPieceGroups; ++group) {
        const int n = piece * kPieceGroups + group;
        const float4 cols = *reinterpret_cast<const float4*>(&prepared.cols[fragment_col(thread_, n, 0)]);
#pragma unroll
        for (int r = 0; r < kRowsPerHalf; ++r) {
          const float left = products(cute::make_coord(0, r, n), half, 0);
          const float right = products(cute::make_coord(1, r, n), half, 0);
          rounded(cute::make_coord(0, r, group), 0, 0) =
              static_cast<ElementType>(value(left, r, fragment_col(0, n, 0), cols.x, cols.y));
          rounded(cute::make_coord(1, r, group), 0, 0) =
              static_cast<ElementType>(value(right, r, fragment_col(0, n, 1), cols.z, cols.w));
        }
      }
      store(tile, rounded, half, piece);
    }
  }

  template <bool kMasked, class Products>
  __device__ void centroid_gradients(const Item& tile, const Prepared& prepared, const Products& products) const {
    const float scale = prepared.scale, reference = prepared.reference;
#pragma unroll
    for (int half = 0; half < Tiling::kHalves; ++half) {
      const Rows rows = load_rows(tile, prepared, half);
      fill(tile, prepared, products, half, [&](float product, int r, int col, float bias, float) {
        const float x = exponent<true>(product, rows.terms[r], bias, scale, reference);
        return kMasked && !rows.counted[r].counts(col) ? 0.0f : fast_exp2(x);
      });
    }
  }

  template <Form kForm, class Products>
  __device__ void pair_gradients(const Item& tile, const Prepared& prepared, const Products& products,
                                 float& moment) const {
    const float scale = prepared.scale, middle = prepared.middle;
    const float shift = prepared.reference + (kForm == Form::kTwo ? 0.0f : middle);
#pragma unroll
    for (int half = 0; half < Tiling::kHalves; ++half) {
      const Rows rows = load_rows(tile, prepared, half);
      float row_shares[kRowsPerHalf], row_factors[kRowsPerHalf];
#pragma unroll
      for (int r = 0; r < kRowsPerHalf; ++r) {
        row_shares[r] = prepared.row_shares[fragment_row(thread_, half, r)];
        row_factors[r] = prepared.row_factors[fragment_row(thread_, half, r)];
      }
      fill(tile, prepared, products, half,
           [&](float product, int r, int col, float col_factor, float col_share) {
             float x = exponent<false>(product, rows.terms[r], col_factor, scale, shift);
             if (kForm == Form::kTwo && !rows.counted[r].counts(col)) x = -INFINITY;
             return pair_gradient<kForm>(x, middle, row_shares[r], row_factors[r], col_share, col_factor, moment);
           });
    }
  }

  // Each warpgroup's part of a tile has a place of its own, and launches follow one another: no atomics, always the
  // same bits.
  __device__ void add_moment(const Item& tile, float total) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      total += __shfl_xor_sync(0xffffffff, total, distance);
    }
    // As the column sums of similarity_stats.cu: by the time that a place is written again all have passed a barrier.
    float(&moments)[4] = scratch_.moments[parity_];
    parity_ ^= 1;
    if (thread_ % kWarp == 0) moments[thread_ % kGroupThreads / kWarp] = total;
    barrier_.arrive_and_wait();
    const int row = tile.row_start + first_row();
    if (thread_ % kGroupThreads == 0 && row < space_.num_rows) {
      const float* m = moments;
      const int number = part_number<kWidth>(row, tile.col_start, space_.num_cols);
      params_.scale_partials[number] += static_cast<double>(m[0]) + m[1] + m[2] + m[3];
    }
  }

  // A warp's sixteen rows of a piece. No other warp reads or writes its part of shared memory.
  template <class Rounded>
  __device__ void store(const Item& tile, const Rounded& rounded, int half, int piece) const {
    using namespace cute;
    wait_for_store();
    Tensor shared = make_tensor(make_smem_ptr(scratch_.out.data()), PieceLayout{});
    auto to_shared = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, ElementType>{}, PieceMma{});
    auto of_thread = to_shared.get_thread_slice(thread_ % kGroupThreads);
    copy(to_shared, of_thread.retile_S(rounded), of_thread.partition_D(shared));
    tma_store_fence();
    __syncwarp();
    const int warp = thread_ % kGroupThreads / kWarp;
    const int row = tile.row_start + first_row() + half * kPieceRows + warp * kPartRows;
    const int col = tile.col_start + piece * kPieceCols;
    // A warp past the edge, as in the lower tile of a cluster's last, has nothing to store.
    if (thread_ % kWarp == 0 && row < space_.num_rows) {
      auto store_out = params_.store_out.get_slice(Int<0>{});
      Tensor whole = params_.store_out.get_tma_tensor(make_shape(space_.num_rows, space_.num_cols));
#pragma unroll
      for (int part = 0; part < kPieceCols / kPartCols; ++part) {
        Tensor from = make_tensor(make_smem_ptr(scratch_.out.data() + part_offset(0, part) + warp * part_offset(1, 0)),
                                  PartLayout{});
        Tensor to = local_tile(whole, Shape<Int<kPartRows>, Int<kPartCols>>{},
                               make_coord(row / kPartRows, col / kPartCols + part));
        copy(params_.store_out, store_out.partition_S(from), store_out.partition_D(to));
      }
      tma_store_arrive();
    }
  }

  // Of this warpgroup's in the tile.
  __device__ int first_row() const { return thread_ / kGroupThreads * Tiling::kGroupRows; }

  // Before a warp writes to its part of shared memory again, or the block gives it back.
  __device__ void wait_for_store() const {
    if (thread_ % kWarp == 0) cute::tma_store_wait<0>();
    __syncwarp();
  }

  const Params& params_;
  const TileSpace& space_;
  Scratch& scratch_;
  int thread_;
  mutable cutlass::arch::NamedBarrier barrier_;
  int parity_ = 0;
};

template <template <class, int, int> class Feed, int kWidth, class ElementType>
const char* run(const GradArguments& arguments, void* stream) {
  using Epilogue = GradEpilogue<ElementType, kWidth>;
  using Kernel = Persistent<ElementType, Epilogue, Feed>;
  const Matrix& matrix = arguments.matrix;
  typename Kernel::Params params;
  params.order = Kernel::Order::of({arguments.num_rows, arguments.num_cols, 1, 0});
  params.dim = arguments.dim;
  params.operands[0] = Kernel::operand_params(matrix, arguments.num_rows, arguments.num_cols, arguments.dim);
  auto out = cute::make_tensor(cute::make_gmem_ptr(static_cast<ElementType*>(arguments.out)),
                               cute::make_shape(arguments.num_rows, arguments.num_cols),
                               typename Epilogue::OutStride{arguments.out_stride, {}});
  params.epilogue = {cute::make_tma_copy(cute::SM90_TMA_STORE{}, out, typename Epilogue::PartLayout{}),
                     matrix.row_factors,
                     matrix.col_factors,
                     arguments.row_log_sums,
                     arguments.col_log_sums,
                     arguments.reference,
                     matrix.scale,
                     arguments.scale_partials,
                     arguments.unit,
                     arguments.diagonal,
                     matrix.scale_is_double,
                     matrix.biased};
  return launch<Kernel>(params, stream);
}

template <template <class, int, int> class Feed, int kWidth>
const char* run(const GradArguments& arguments, void* stream) {
  if (const char* problem = machine_problem()) return problem;
  return arguments.element == Element::kBFloat16 ? run<Feed, kWidth, cutlass::bfloat16_t>(arguments, stream)
                                                 : run<Feed, kWidth, cutlass::half_t>(arguments, stream);
}

}  // namespace gapkernels
