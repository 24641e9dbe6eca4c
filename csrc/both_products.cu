// Both products of a block of the gradient in one persistent launch; shares.h says which cluster computes what.
//
//     warpgroup 0   one warp copies operands into shared memory (TMA); a cluster of two blocks, with 128 rows of the total
//                   each, shares 256 columns of the right operand
//     warpgroup 1   64×256 of a tile: wgmma │ added to the total │ wgmma …
//     warpgroup 2      64×256 of a tile: wgmma │ added to the total │ wgmma …     behind by two steps, see follow()
//
// wgmma reads H with its contiguous numbers along the depth for H·cols and along the rows of the total for Hᵀ·rows;
// that is a bit of the instruction, so there are two loops of products, with one pipeline. A warp's sixteen rows leave
// in pieces of 32 columns, by turns through two places in shared memory that are the warp's own, and the copy engine
// adds them.
#include "products.h"
#include "streamed_sm90.cuh"

namespace gapkernels {
namespace {

template <class ElementType>
struct BothProducts {
  static constexpr int kMembers = Teams<kWideTile>::kMembers;
  static constexpr int kThreads = (1 + kConsumers) * kGroupThreads;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = (3 * 168 - kProducerRegisters) / 2;
  static_assert(kMembers == kConsumers, "all consumers compute one tile");

  static constexpr int kPieceRows = 16;  // of a warp
  static constexpr int kPieceCols = 32;  // of one row of the swizzle's pattern
  using PieceLayout = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<float>{},
                                                   cute::Shape<cute::Int<kPieceRows>, cute::Int<kPieceCols>>{}));
  struct alignas(1024) Pieces {
    float values[2][kPieceRows * kPieceCols];
  };
  static constexpr int kPieceBytes = kConsumers * kGroupThreads / kWarp * static_cast<int>(sizeof(Pieces));
  static_assert(cute::cosize_v<PieceLayout> == kPieceRows * kPieceCols);

  template <class LeftLayout>
  using MainloopWith =
      MainloopOf<ElementType, kWideTile, cutlass::gemm::collective::StageCountAutoCarveout<kPieceBytes + kBarrierBytes>,
                 LeftLayout, cutlass::layout::RowMajor>;
  using OfRows = MainloopWith<cutlass::layout::RowMajor>;
  using OfCols = MainloopWith<cutlass::layout::ColumnMajor>;
  using Pipeline = typename OfRows::MainloopPipeline;
  using State = typename OfRows::PipelineState;
  using TiledMma = typename OfRows::TiledMma;
  static_assert(cute::is_same_v<Pipeline, typename OfCols::MainloopPipeline>);
  static_assert(sizeof(typename OfRows::TensorStorage) == sizeof(typename OfCols::TensorStorage));

  using Order = ShareOrder<kCluster>;
  using Walk = ShareWalk<kCluster>;
  using TotalStride = cute::Stride<int64_t, cute::_1>;
  using AddToTotal = decltype(cute::make_tma_copy(
      cute::SM90_TMA_REDUCE_ADD{},
      cute::make_tensor(cute::make_gmem_ptr(static_cast<float*>(nullptr)), cute::Shape<int, int>{}, TotalStride{}),
      PieceLayout{}));
  // One instruction takes a piece, at coordinates of a column and a row.
  static_assert(AddToTotal::NumValSrc == kPieceRows * kPieceCols);
  static_assert(cute::is_same_v<decltype(AddToTotal{}.get_tma_tensor(cute::Shape<int, int>{}).stride()),
                                cute::tuple<cute::E<1>, cute::E<0>>>);

  struct Params {
    typename OfRows::Params of_rows;
    typename OfCols::Params of_cols;
    AddToTotal totals[kProducts];
    Order order;
    ProductSpace space;
    int dim;
    bool overwrites[kProducts];  // of a product whose items are not split
  };

  struct SharedStorage {
    alignas(1024) char operands[sizeof(typename OfRows::TensorStorage)];
    Pieces pieces[kConsumers * kGroupThreads / kWarp];
    alignas(16) typename OfRows::PipelineStorage pipeline;
  };
  static_assert(sizeof(SharedStorage) <= cutlass::gemm::collective::detail::sm90_smem_capacity_bytes);

  static int shared_bytes(int) { return sizeof(SharedStorage); }

  static bool operands_encoded(const Params& params) {
    const auto encoded = [&](const auto& operands, int p) {
      return params.space.heights[p] == 0 ||
             (descriptor_encoded(operands.tma_load_a) && descriptor_encoded(operands.tma_load_b) &&
              descriptor_encoded(params.totals[p]));
    };
    return encoded(params.of_rows, 0) && encoded(params.of_cols, 1);
  }

  static Params params_of(const ProductArguments& arguments) {
    Params params;
    params.space = arguments.space();
    params.order = Order::of(params.space);
    params.dim = arguments.dim;
    const auto* h = static_cast<const ElementType*>(arguments.h);
    const auto* cols = static_cast<const ElementType*>(arguments.cols);
    const auto* rows = static_cast<const ElementType*>(arguments.rows);
    const int64_t none = 0;
    if (arguments.totals[0] != nullptr) {
      params.of_rows = OfRows::to_underlying_arguments(
          cute::make_shape(arguments.num_rows, arguments.dim, arguments.num_cols, 1),
          {h, {arguments.h_stride, cute::_1{}, none}, cols, {cute::_1{}, arguments.col_stride, none}}, nullptr);
    }
    if (arguments.totals[1] != nullptr) {
      params.of_cols = OfCols::to_underlying_arguments(
          cute::make_shape(arguments.num_cols, arguments.dim, arguments.num_rows, 1),
          {h, {cute::_1{}, arguments.h_stride, none}, rows, {cute::_1{}, arguments.row_stride, none}}, nullptr);
    }
    for (int p = 0; p < kProducts; ++p) {
      if (arguments.totals[p] == nullptr) continue;
      auto total = cute::make_tensor(cute::make_gmem_ptr(arguments.totals[p]),
                                     cute::make_shape(params.space.heights[p], arguments.dim),
                                     TotalStride{arguments.total_strides[p], {}});
      params.totals[p] = cute::make_tma_copy(cute::SM90_TMA_REDUCE_ADD{}, total, PieceLayout{});
    }
    return params;
  }

  __device__ static void run(const Params& params, char* shared_memory) {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(shared_memory);
    const int warpgroup = cutlass::canonical_warp_group_idx();
    const bool producer = warpgroup == 0;
    const int block_in_cluster = kCluster > 1 ? static_cast<int>(cute::block_rank_in_cluster()) : 0;
    Pipeline pipeline(shared.pipeline, pipeline_params<OfRows, kMembers>(producer, threadIdx.x % kGroupThreads),
                      ClusterShape{});
    // Barriers are initialised before anyone, in any block of the cluster, uses them.
    if constexpr (kCluster > 1) {
      cute::cluster_arrive_relaxed();
      cute::cluster_wait();
    } else {
      __syncthreads();
    }
    Walk walk(params.order, blockIdx.x / kCluster);
    if (producer) {
      cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
      if (cutlass::canonical_warp_idx_sync() == 0) load(params, shared, pipeline, walk, block_in_cluster);
    } else {
      cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
      multiply(params, shared, pipeline, walk, block_in_cluster, threadIdx.x - kGroupThreads);
    }
  }

 private:
  __device__ static void load(const Params& params, SharedStorage& shared, Pipeline& pipeline, Walk& walk,
                              int block_in_cluster) {
    auto state = cutlass::make_producer_start_state<Pipeline>();
    for (; walk.valid(); walk.advance()) {
      const Part& part = walk.part();
      const auto load_part = [&](auto mainloop, const auto& operands) {
        using Operands = typename decltype(mainloop)::TensorStorage;
        const int height = params.space.heights[part.product], depth = params.space.depths[part.product];
        auto inputs = mainloop.load_init(cute::make_shape(height, params.dim, depth, 1), operands);
        auto tile = cute::make_coord(part.row_start / kTile + block_in_cluster, part.col_start / kWideTile, cute::_, 0);
        mainloop.load(operands, pipeline, state, inputs, tile,
                      cute::make_coord_iterator(part.first_step, ceil_div(depth, kDepth)), part.steps,
                      threadIdx.x % kWarp, block_in_cluster, *reinterpret_cast<Operands*>(shared.operands));
      };
      if (part.product == 0) load_part(OfRows{}, params.of_rows);
      else load_part(OfCols{}, params.of_cols);
      state.advance(part.steps);
    }
    OfRows{}.load_tail(pipeline, state);  // no block leaves while another of its cluster may still write to it
  }

  __device__ static void multiply(const Params& params, SharedStorage& shared, Pipeline& pipeline, Walk& walk,
                                  int block_in_cluster, int thread) {
    Pieces& pieces = shared.pieces[thread / kWarp];
    State state;
    int place = 0;
    for (; walk.valid(); walk.advance()) {
      const Part part = walk.part();
      auto accumulators = cute::partition_fragment_C(TiledMma{}, cute::take<0, 2>(TileShape<kWideTile>{}));
      const auto multiply_part = [&](auto mainloop, const auto& operands) {
        using Operands = typename decltype(mainloop)::TensorStorage;
        mainloop.mma(pipeline, state, accumulators, part.steps, thread,
                     *reinterpret_cast<Operands*>(shared.operands), operands);
        mainloop.mma_tail(pipeline, state, part.steps);
        cute::warpgroup_fence_operand(accumulators);  // complete from here on, for the compiler too
      };
      if (thread >= kGroupThreads) follow(pipeline, state, part.steps);
      if (part.product == 0) multiply_part(OfRows{}, params.of_rows);
      else multiply_part(OfCols{}, params.of_cols);
      state.advance(part.steps);
      const int row = part.row_start + block_in_cluster * kTile + thread / kWarp * kPieceRows;
      if (row < params.space.heights[part.product]) add(params, part, row, accumulators, pieces, place);
    }
    if (thread % kWarp == 0) cute::tma_store_wait<0>();  // before the block gives shared memory back
  }

  // A warp's rows of a tile to their total.
  template <class Accumulators>
  __device__ static void add(const Params& params, const Part& part, int row, const Accumulators& accumulators,
                             Pieces& pieces, int& place) {
    const int lane = threadIdx.x % kWarp;
    const cute::TmaDescriptor* total = params.totals[part.product].get_tma_descriptor();
    const bool overwrite = params.overwrites[part.product];
#pragma unroll
    for (int piece = 0; piece < kWideTile / kPieceCols; ++piece) {
      const int col = part.col_start + piece * kPieceCols;
      if (col >= params.dim) break;
      float* values = pieces.values[place];
      if (lane == 0) cute::tma_store_wait<1>();  // what left this place before has been read
      __syncwarp();
#pragma unroll
      for (int n = 0; n < kPieceCols / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int group = piece * (kPieceCols / 8) + n;
          const int index = PieceLayout{}(fragment_row(lane, 0, half), fragment_col(lane, n, 0));
          *reinterpret_cast<float2*>(&values[index]) = {accumulators(cute::make_coord(0, half, group), 0, 0),
                                                        accumulators(cute::make_coord(1, half, group), 0, 0)};
        }
      }
      cute::tma_store_fence();
      __syncwarp();
      if (lane == 0) {
        if (overwrite) cute::SM90_TMA_STORE_2D::copy(total, values, col, row);
        else cute::SM90_TMA_REDUCE_ADD_2D::copy(total, values, col, row);
        cute::tma_store_arrive();
      }
      place ^= 1;
    }
  }
};

template <class ElementType>
const char* run(const ProductArguments& arguments, void* stream) {
  using Kernel = BothProducts<ElementType>;
  auto params = Kernel::params_of(arguments);
  return launch<Kernel>(params, stream, [&] {
    const bool splits = params.order.splits();
    cudaError_t error = cudaSuccess;
    for (int p = 0; p < kProducts && error == cudaSuccess; ++p) {
      params.overwrites[p] = arguments.overwrites(p, splits);
      if (!arguments.zeroes(p, splits)) continue;
      error = cudaMemset2DAsync(arguments.totals[p], arguments.total_strides[p] * sizeof(float), 0,
                                arguments.dim * sizeof(float), params.space.heights[p],
                                static_cast<cudaStream_t>(stream));
    }
    return error;
  });
}

}  // namespace

const char* both_products(const ProductArguments& arguments, void* stream) {
  if (const char* problem = machine_problem()) return problem;
  return arguments.element == Element::kBFloat16 ? run<cutlass::bfloat16_t>(arguments, stream)
                                                 : run<cutlass::half_t>(arguments, stream);
}

}  // namespace gapkernels
