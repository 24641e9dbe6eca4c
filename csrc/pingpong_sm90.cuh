// The part of a Hopper kernel that all kernels here share: inner products of 128×128 tiles, and what happens to a tile
// left to an epilogue.
//
//     warpgroup 0   copies operand tiles into shared memory (TMA; a cluster of two blocks shares the column tile)
//     warpgroup 1   tile 0: products │ epilogue          │ tile 2: products │ epilogue …
//     warpgroup 2                    │ tile 1: products  │ epilogue         │ tile 3: products …
//
// One warpgroup multiplies while the other is in its epilogue: the exponentials cost no time as long as they take less
// than the products. The products come from CUTLASS's collective; persistent, one block per processor.
#pragma once

#include <cuda_runtime.h>

#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>
#include <cutlass/pipeline/pipeline.hpp>
// Of all collectives the one that is used: collective_builder.hpp has them all and takes a fifth longer to compile.
#include <cutlass/gemm/collective/builders/sm90_gmma_builder.inl>
#include <cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized.hpp>

#include "fragments.h"
#include "launch_checks.h"
#include "similarity.h"
#include "tiles.h"

// Blocks that share a column tile: 2 takes a quarter off what comes from the L2 cache, 1 has nobody to wait for.
#ifndef GAPKERNELS_CLUSTER
#define GAPKERNELS_CLUSTER 2
#endif

namespace gapkernels {

template <class TiledCopy>
bool descriptor_encoded(const TiledCopy& copy) {
  return is_encoded(copy.get_tma_descriptor(), sizeof(cute::TmaDescriptor));
}

// Why nothing can be launched on this machine, asked before descriptors are encoded; null if nothing is known.
inline const char* machine_problem() {
  int version = 0;
  const cudaError_t error = cudaDriverGetVersion(&version);
  return error == cudaSuccess ? driver_problem(version) : cudaGetErrorString(error);
}

template <class ElementType, class Epilogue>
struct PingPong {
  static constexpr int kCluster = GAPKERNELS_CLUSTER;
  using TileShape = cute::Shape<cute::Int<kTile>, cute::Int<kTile>, cute::_64>;
  using ClusterShape = cute::Shape<cute::Int<kCluster>, cute::_1, cute::_1>;
  static constexpr int kConsumers = 2;
  static constexpr int kGroupThreads = cutlass::NumThreadsPerWarpGroup;
  static constexpr int kThreads = (1 + kConsumers) * kGroupThreads;
  // Of 65,536 registers, in steps of eight: 128·(40 + 2·232). 128 of a consumer's hold accumulators.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kBarrierBytes = 2048;  // with what alignment costs

  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, ElementType, cutlass::layout::RowMajor, 8, ElementType,
      cutlass::layout::ColumnMajor, 8, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<
          static_cast<int>(kConsumers * sizeof(typename Epilogue::Storage)) + kBarrierBytes>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Pipeline = typename Mainloop::MainloopPipeline;
  using OrderBarrier = cutlass::OrderedSequenceBarrier<1, kConsumers>;
  using TiledMma = typename Mainloop::TiledMma;
  static_assert(cute::size(TiledMma{}) == kGroupThreads, "a warpgroup computes a whole tile");

  struct Params {
    typename Mainloop::Params operands[kMaxMatrices];
    TileOrder<kCluster> order;
    int dim;
    typename Epilogue::Params epilogue;
  };

  struct SharedStorage {
    // The swizzle that copies and products share repeats every 1024 bytes, counted from address zero.
    alignas(1024) typename Mainloop::TensorStorage operands;
    alignas(1024) typename Epilogue::Storage epilogue[kConsumers];
    alignas(16) typename Mainloop::PipelineStorage pipeline;
    alignas(16) typename OrderBarrier::SharedStorage order;
  };
  static_assert(sizeof(SharedStorage) <= cutlass::gemm::collective::detail::sm90_smem_capacity_bytes);

  // The layout that fragments.h describes, checked against the instruction's own.
  static constexpr bool fragments_agree() {
    auto layout = TiledMma{}.get_layoutC_TV();
    for (int t : {0, 1, 5, 31, 32, 77, 127}) {
      for (int n : {0, 7, 15}) {
        for (int m = 0; m < 2; ++m) {
          for (int half = 0; half < 2; ++half) {
            for (int b = 0; b < 2; ++b) {
              // Of one 64-row instruction; the second half of the tile repeats it 64 rows below.
              const int index = layout(t, b + 2 * half + 4 * n);
              if (index % 64 + 64 * m != fragment_row(t, m, half) || index / 64 != fragment_col(t, n, b)) return false;
            }
          }
        }
      }
    }
    return true;
  }
  static_assert(fragments_agree());

  static bool operands_encoded(const Params& params) {
    for (int m = 0; m < params.order.space.num_matrices; ++m) {
      const auto& operands = params.operands[m];
      if (!descriptor_encoded(operands.tma_load_a) || !descriptor_encoded(operands.tma_load_b)) return false;
    }
    return Epilogue::encoded(params.epilogue);
  }

  static typename Mainloop::Params operand_params(const Matrix& matrix, int num_rows, int num_cols, int dim) {
    const typename Mainloop::Arguments arguments{
        static_cast<const ElementType*>(matrix.rows), {matrix.row_stride, cute::_1{}, int64_t{0}},
        static_cast<const ElementType*>(matrix.cols), {matrix.col_stride, cute::_1{}, int64_t{0}}};
    return Mainloop::to_underlying_arguments(cute::make_shape(num_rows, num_cols, dim, 1), arguments, nullptr);
  }

  __device__ static void run(const Params& params, char* shared_memory) {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(shared_memory);
    const int warpgroup = cutlass::canonical_warp_group_idx();
    const int thread = threadIdx.x % kGroupThreads;
    const bool producer = warpgroup == 0;
    if (threadIdx.x < params.order.space.num_matrices) Mainloop::prefetch_tma_descriptors(params.operands[threadIdx.x]);

    typename Pipeline::Params pipeline_params;
    pipeline_params.role = producer ? Pipeline::ThreadCategory::Producer : Pipeline::ThreadCategory::Consumer;
    pipeline_params.is_leader = thread == 0;
    pipeline_params.num_consumers = kGroupThreads;
    pipeline_params.num_producers = 1;
    pipeline_params.transaction_bytes = Mainloop::TmaTransactionBytes;
    Pipeline pipeline(shared.pipeline, pipeline_params, ClusterShape{});

    typename OrderBarrier::Params order_params;
    order_params.group_id = warpgroup - 1;
    order_params.group_size = kGroupThreads;
    OrderBarrier order(shared.order, order_params);

    // Barriers are initialised before anyone, in any block of the cluster, uses them.
    if constexpr (kCluster > 1) {
      cute::cluster_arrive_relaxed();
      cute::cluster_wait();
    } else {
      __syncthreads();
    }

    const int block_in_cluster = kCluster > 1 ? static_cast<int>(cute::block_rank_in_cluster()) : 0;
    const int row_offset = block_in_cluster * kTile;
    const int k_tiles = ceil_div(params.dim, cute::get<2>(TileShape{}));
    TileWalk<kCluster> walk(params.order, blockIdx.x / kCluster, gridDim.x / kCluster);

    if (producer) {
      cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
      if (thread < 32) load(params, walk, pipeline, shared, k_tiles, row_offset, block_in_cluster);
    } else {
      cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
      compute(params, walk, pipeline, order, shared, k_tiles, row_offset, warpgroup - 1, thread);
    }
  }

 private:
  __device__ static void load(const Params& params, TileWalk<kCluster>& walk, Pipeline& pipeline,
                              SharedStorage& shared, int k_tiles, int row_offset, int block_in_cluster) {
    Mainloop mainloop;
    auto state = cutlass::make_producer_start_state<Pipeline>();
    for (; walk.valid(); walk.advance()) {
      const Item& item = walk.item();
      const auto& operands = params.operands[item.matrix];
      auto inputs = mainloop.load_init(
          cute::make_shape(params.order.space.num_rows, params.order.space.num_cols, params.dim, 1), operands);
      auto tile = cute::make_coord((item.row_start + row_offset) / kTile, item.col_start / kTile, cute::_, 0);
      mainloop.load(operands, pipeline, state, inputs, tile, cute::make_coord_iterator(k_tiles),
                    k_tiles, threadIdx.x % 32, block_in_cluster, shared.operands);
      state.advance(k_tiles);
    }
    mainloop.load_tail(pipeline, state);  // no block leaves while another of its cluster may still write to it
  }

  __device__ static void compute(const Params& params, TileWalk<kCluster>& walk, Pipeline& pipeline,
                                 OrderBarrier& order, SharedStorage& shared, int k_tiles, int row_offset, int consumer,
                                 int thread) {
    Mainloop mainloop;
    TiledMma tiled_mma;
    typename Mainloop::PipelineState state;
    if (consumer == 1) {
      if (walk.valid()) walk.advance();
      state.advance(k_tiles);
    }
    Epilogue epilogue(params.epilogue, params.order.space, shared.epilogue[consumer], thread, 1 + consumer);
    const auto own_tile = [&] {
      Item tile = walk.item();
      tile.row_start += row_offset;
      return tile;
    };
    if (walk.valid()) epilogue.fetch(own_tile());
    while (walk.valid()) {
      const Item tile = own_tile();
      epilogue.prepare(tile);
      auto accumulators = cute::partition_fragment_C(tiled_mma, cute::take<0, 2>(TileShape{}));
      order.wait();
      mainloop.mma(pipeline, state, accumulators, k_tiles, thread, shared.operands, params.operands[tile.matrix]);
      order.arrive();
      mainloop.mma_tail(pipeline, state, k_tiles);
      cute::warpgroup_fence_operand(accumulators);  // complete from here on, for the compiler too
      state.advance(k_tiles * kConsumers);
      // What the next tile needs of device memory travels while this one is finished.
      for (int i = 0; i < kConsumers && walk.valid(); ++i) walk.advance();
      if (walk.valid()) epilogue.fetch(own_tile());
      epilogue.finish(tile, accumulators, tiled_mma);
    }
    epilogue.end();
  }
};

// The kernel. Descriptors for the copy engine are read where the argument lies, so it must not be copied.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1)
    pingpong_kernel(const __grid_constant__ typename Kernel::Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared_memory[];
  Kernel::run(params, shared_memory);
#endif
}

template <class Kernel>
const char* launch(const typename Kernel::Params& params, void* stream) {
  constexpr int kCluster = Kernel::kCluster;
  constexpr int kSharedBytes = sizeof(typename Kernel::SharedStorage);
  if (!Kernel::operands_encoded(params)) return "the driver refused to describe an operand to the copy engine";
  const void* kernel = reinterpret_cast<const void*>(&pingpong_kernel<Kernel>);
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int items = params.order.num_items();
  const int clusters = items < processors / kCluster ? items : processors / kCluster;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(clusters * kCluster);
  config.blockDim = dim3(Kernel::kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  void* arguments[] = {const_cast<typename Kernel::Params*>(&params)};
  error = cudaLaunchKernelExC(&config, kernel, arguments);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here, not once more by whoever asks next
  return cudaGetErrorString(error);
}

}  // namespace gapkernels
