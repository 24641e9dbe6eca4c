// A block of the gradient with respect to the inner products, rounded to the operands' type, for library products.
//
// A tile leaves through shared memory and the copy engine, which also cuts it off at the edges of the block.
#include "entries.h"
#include "pingpong_sm90.cuh"

namespace gapkernels {
namespace {

template <class ElementType>
struct GradEpilogue {
  using OutLayout = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<ElementType>{},
                                                 cute::Shape<cute::Int<kTile>, cute::Int<kTile>>{}));
  using OutStride = cute::Stride<int64_t, cute::_1>;
  using StoreOut = decltype(cute::make_tma_copy(
      cute::SM90_TMA_STORE{},
      cute::make_tensor(cute::make_gmem_ptr(static_cast<ElementType*>(nullptr)), cute::Shape<int, int>{}, OutStride{}),
      OutLayout{}));

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

  struct Storage {
    cute::array_aligned<ElementType, cute::cosize_v<OutLayout>, 1024> out;  // as large as the swizzle's pattern
    float row_terms[kTile];    // of the exponent
    float row_shares[kTile];   // of the soft-max weight, see Form
    float row_factors[kTile];  // of the gradient
    alignas(16) float2 cols[kTile];  // factor, share
    LogSumRange ranges[4];     // of each warp
    float moments[4];
  };

  __device__ GradEpilogue(const Params& params, const TileSpace& space, Storage& storage, int thread, int barrier)
      : params_(params),
        space_(space),
        storage_(storage),
        thread_(thread),
        barrier_(kTile, barrier),
        scale_(load_scale(params.scale, params.scale_is_double)),
        reference_(*params.reference) {}

  static bool encoded(const Params& params) { return descriptor_encoded(params.store_out); }

  // Starts to read what prepare() needs of a tile; nothing is done with it yet, so that nobody waits.
  __device__ void fetch(const Item& tile) {
    const int i = tile.row_start + thread_, j = tile.col_start + thread_;
    const bool i_exists = i < space_.num_rows, j_exists = j < space_.num_cols;
    row_factor_ = i_exists ? params_.row_factors[i] : 0.0f;
    col_factor_ = j_exists ? params_.col_factors[j] : 0.0f;
    if (params_.biased) return;
    row_log_ = i_exists ? params_.row_log_sums[i] : INFINITY;
    col_log_ = j_exists ? params_.col_log_sums[j] : INFINITY;
  }

  __device__ void prepare(const Item& tile) {
    if (params_.biased) {
      wait_for_store();
      storage_.row_terms[thread_] = row_term<true>(row_factor_, scale_);
      storage_.cols[thread_] = {col_factor_, 0.0f};
      barrier_.arrive_and_wait();
      return;
    }
    const bool i_exists = tile.row_start + thread_ < space_.num_rows;
    const bool j_exists = tile.col_start + thread_ < space_.num_cols;
    LogSumRange range{fminf(row_log_, col_log_),
                      fmaxf(i_exists ? row_log_ : -INFINITY, j_exists ? col_log_ : -INFINITY)};
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      range.smallest = fminf(range.smallest, __shfl_xor_sync(0xffffffff, range.smallest, distance));
      range.largest = fmaxf(range.largest, __shfl_xor_sync(0xffffffff, range.largest, distance));
    }
    if (thread_ % 32 == 0) storage_.ranges[thread_ / 32] = range;
    wait_for_store();
    barrier_.arrive_and_wait();
    range = storage_.ranges[0];
#pragma unroll
    for (int warp = 1; warp < 4; ++warp) {
      range.smallest = fminf(range.smallest, storage_.ranges[warp].smallest);
      range.largest = fmaxf(range.largest, storage_.ranges[warp].largest);
    }
    middle_ = range.middle();
    form_ = form_of(range, mask().needed(tile.row_start, tile.col_start), params_.scale_partials != nullptr);
    const float weight = row_factor_ * params_.unit;
    storage_.row_terms[thread_] = row_term<false>(row_factor_, scale_);
    storage_.row_factors[thread_] = weight;
    storage_.row_shares[thread_] = share(row_log_, weight);
    storage_.cols[thread_] = {col_factor_, share(col_log_, col_factor_)};
    barrier_.arrive_and_wait();
  }

  template <class Accumulators, class TiledMma>
  __device__ void finish(const Item& tile, const Accumulators& products, const TiledMma& tiled_mma) {
    auto rounded = cute::make_tensor_like<ElementType>(products);
    if (params_.biased) {
      if (mask().needed(tile.row_start, tile.col_start)) centroid_gradients<true>(tile, products, rounded);
      else centroid_gradients<false>(tile, products, rounded);
    } else {
      float moment = 0.0f;
      switch (form_) {
        case Form::kFactored: pair_gradients<Form::kFactored>(tile, products, rounded, moment); break;
        case Form::kMoment: pair_gradients<Form::kMoment>(tile, products, rounded, moment); break;
        default: pair_gradients<Form::kTwo>(tile, products, rounded, moment);
      }
      if (params_.scale_partials != nullptr) add_moment(tile, moment);
    }
    store(tile, rounded, tiled_mma);
  }

  __device__ void end() { wait_for_store(); }

 private:
  __device__ Mask mask() const { return {space_.num_rows, space_.num_cols, params_.diagonal, false}; }

  __device__ float share(float log_sum, float factor) const {
    switch (form_) {
      case Form::kFactored: return gapkernels::share<Form::kFactored>(log_sum, middle_, factor);
      case Form::kMoment: return gapkernels::share<Form::kMoment>(log_sum, middle_, factor);
      default: return gapkernels::share<Form::kTwo>(log_sum, middle_, factor);
    }
  }

  // What a thread needs of its four rows, in registers.
  struct Rows {
    RowMask counted[kRowsPerThread];
    float terms[kRowsPerThread];
  };

  __device__ Rows load_rows(const Item& tile) const {
    Rows rows;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int row = fragment_row(thread_, r / 2, r % 2);
      rows.counted[r] = mask().row(tile.row_start + row, tile.col_start + fragment_col(thread_, 0, 0));
      rows.terms[r] = storage_.row_terms[row];
    }
    return rows;
  }

  // value(product, which of the thread's rows, column from its first, factor and share of the column), for all entries.
  template <class Products, class Rounded, class Value>
  __device__ void fill(const Products& products, Rounded& rounded, Value value) const {
#pragma unroll
    for (int n = 0; n < kColsPerThread / 2; ++n) {
      const float4 cols = *reinterpret_cast<const float4*>(&storage_.cols[fragment_col(thread_, n, 0)]);
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        const auto left = cute::make_coord(0, r % 2, n), right = cute::make_coord(1, r % 2, n);
        rounded(left, r / 2, 0) = static_cast<ElementType>(
            value(products(left, r / 2, 0), r, fragment_col(0, n, 0), cols.x, cols.y));
        rounded(right, r / 2, 0) = static_cast<ElementType>(
            value(products(right, r / 2, 0), r, fragment_col(0, n, 1), cols.z, cols.w));
      }
    }
  }

  template <bool kMasked, class Products, class Rounded>
  __device__ void centroid_gradients(const Item& tile, const Products& products, Rounded& rounded) const {
    const Rows rows = load_rows(tile);
    fill(products, rounded, [&](float product, int r, int col, float bias, float) {
      const float x = exponent<true>(product, rows.terms[r], bias, scale_, reference_);
      return kMasked && !rows.counted[r].counts(col) ? 0.0f : fast_exp2(x);
    });
  }

  template <Form kForm, class Products, class Rounded>
  __device__ void pair_gradients(const Item& tile, const Products& products, Rounded& rounded, float& moment) const {
    const float shift = reference_ + (kForm == Form::kTwo ? 0.0f : middle_);
    const Rows rows = load_rows(tile);
    float row_shares[kRowsPerThread], row_factors[kRowsPerThread];
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      row_shares[r] = storage_.row_shares[fragment_row(thread_, r / 2, r % 2)];
      row_factors[r] = storage_.row_factors[fragment_row(thread_, r / 2, r % 2)];
    }
    fill(products, rounded, [&](float product, int r, int col, float col_factor, float col_share) {
      float x = exponent<false>(product, rows.terms[r], col_factor, scale_, shift);
      if (kForm == Form::kTwo && !rows.counted[r].counts(col)) x = -INFINITY;
      return pair_gradient<kForm>(x, middle_, row_shares[r], row_factors[r], col_share, col_factor, moment);
    });
  }

  // Each tile has a place of its own, and launches follow one another: no atomics, always the same bits.
  __device__ void add_moment(const Item& tile, float total) const {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(0xffffffff, total, distance);
    if (thread_ % 32 == 0) storage_.moments[thread_ / 32] = total;
    barrier_.arrive_and_wait();
    if (thread_ == 0 && tile.row_start < space_.num_rows) {
      const float* m = storage_.moments;
      const int number = tile.row_start / kTile * ceil_div(space_.num_cols, kTile) + tile.col_start / kTile;
      params_.scale_partials[number] += static_cast<double>(m[0]) + m[1] + m[2] + m[3];
    }
  }

  template <class Rounded, class TiledMma>
  __device__ void store(const Item& tile, const Rounded& rounded, const TiledMma& tiled_mma) const {
    using namespace cute;
    Tensor shared = make_tensor(make_smem_ptr(storage_.out.data()), OutLayout{});
    auto to_shared = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, ElementType>{}, tiled_mma);
    auto of_thread = to_shared.get_thread_slice(thread_);
    copy(to_shared, of_thread.retile_S(rounded), of_thread.partition_D(shared));
    tma_store_fence();
    barrier_.arrive_and_wait();
    // A tile past the edge, the lower one of a cluster's, has nothing to store.
    if (thread_ == 0 && tile.row_start < space_.num_rows) {
      auto store_out = params_.store_out.get_slice(Int<0>{});
      Tensor whole = params_.store_out.get_tma_tensor(make_shape(space_.num_rows, space_.num_cols));
      Tensor part = local_tile(whole, Shape<Int<kTile>, Int<kTile>>{},
                               make_coord(tile.row_start / kTile, tile.col_start / kTile));
      copy(params_.store_out, store_out.partition_S(shared), store_out.partition_D(part));
      tma_store_arrive();
    }
  }

  // Before shared memory is written again, or given back. Others learn of it at the next barrier.
  __device__ void wait_for_store() const {
    if (thread_ == 0) cute::tma_store_wait<0>();
  }

  const Params& params_;
  const TileSpace& space_;
  Storage& storage_;
  int thread_;
  mutable cutlass::arch::NamedBarrier barrier_;
  float scale_;
  float reference_;
  float middle_ = 0.0f;
  Form form_ = Form::kFactored;
  float row_factor_;  // of the tile fetched last
  float col_factor_;
  float row_log_;
  float col_log_;
};

template <class ElementType>
const char* run(const GradArguments& arguments, void* stream) {
  using Epilogue = GradEpilogue<ElementType>;
  using Kernel = PingPong<ElementType, Epilogue>;
  const Matrix& matrix = arguments.matrix;
  typename Kernel::Params params;
  params.order = TileOrder<Kernel::kCluster>::of({arguments.num_rows, arguments.num_cols, 1, 0});
  params.dim = arguments.dim;
  params.operands[0] = Kernel::operand_params(matrix, arguments.num_rows, arguments.num_cols, arguments.dim);
  auto out = cute::make_tensor(cute::make_gmem_ptr(static_cast<ElementType*>(arguments.out)),
                               cute::make_shape(arguments.num_rows, arguments.num_cols),
                               typename Epilogue::OutStride{arguments.out_stride, {}});
  params.epilogue = {cute::make_tma_copy(cute::SM90_TMA_STORE{}, out, typename Epilogue::OutLayout{}),
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

}  // namespace

const char* similarity_grad(const GradArguments& arguments, void* stream) {
  if (const char* problem = machine_problem()) return problem;
  return arguments.element == Element::kBFloat16 ? run<cutlass::bfloat16_t>(arguments, stream)
                                                 : run<cutlass::half_t>(arguments, stream);
}

}  // namespace gapkernels
