// The part of a Hopper kernel that all kernels here share: inner products of tiles, and what happens to a tile left to
// an epilogue. Persistent, one block per processor.
//
//     warpgroup 0   warp 0: copies operands into shared memory (TMA; a cluster of two blocks shares the column tile)
//                   warps 1, 2: for a team of consumers each, which tile is next, and all that it needs besides products
//
// Tiles of 128×128, in turns: each consumer is a team. One multiplies while the other is in its epilogue, so
// exponentials cost no time as long as they take less than the products.
//
//     warpgroup 1   tile 0: products │ epilogue          │ tile 2: products │ epilogue …
//     warpgroup 2                    │ tile 1: products  │ epilogue         │ tile 3: products …
//
// Tiles of 128×256, together: both consumers are one team, and each has 64 rows. The second stays a few steps behind,
// and multiplies these while the first is in its epilogue.
//
//     warpgroup 1   tile 0: products         │ epilogue │ tile 1: products         │ epilogue │ …
//     warpgroup 2      tile 0: products         │ epilogue │ tile 1: products         │ epilogue │ …
//
// Where the operands of a product come from is a feed's affair: streamed_sm90.cuh copies both for every tile,
// resident_sm90.cuh keeps the rows in shared memory.
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
#include "handoff.h"
#include "launch_checks.h"
#include "similarity.h"
#include "tiles.h"

// Blocks that share a column tile: 2 halves what column tiles take from the L2 cache, 1 has nobody to wait for.
#ifndef GAPKERNELS_CLUSTER
#define GAPKERNELS_CLUSTER 2
#endif

namespace gapkernels {

constexpr int kCluster = GAPKERNELS_CLUSTER;
constexpr int kWarp = 32;
constexpr int kBarrierBytes = 2048;  // of shared memory, with what alignment costs

static_assert(kGroupThreads == cutlass::NumThreadsPerWarpGroup);

template <int kWidth>
using TileShape = cute::Shape<cute::Int<kTile>, cute::Int<kWidth>, cute::Int<kDepth>>;
using ClusterShape = cute::Shape<cute::Int<kCluster>, cute::_1, cute::_1>;

// The collective whose copies, layouts and instruction all feeds use.
template <class ElementType, int kWidth, class StageCount, class LeftLayout = cutlass::layout::RowMajor,
          class RightLayout = cutlass::layout::ColumnMajor>
using MainloopOf = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, ElementType, LeftLayout, 8, ElementType, RightLayout, 8, float,
    TileShape<kWidth>, ClusterShape, StageCount,
    cute::conditional_t<Teams<kWidth>::kMembers == 1, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                        cutlass::gemm::KernelTmaWarpSpecializedCooperative>>::CollectiveOp;

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

// A barrier in shared memory that whole warps wait for and arrive at. Neither the compiler nor the lanes of a warp
// carry reads or writes of shared memory across.
struct WarpBarrier {
  __device__ void init(int warps) { barrier().init(warps); }

  __device__ void wait(uint32_t phase) const {
    barrier().wait(phase);
    __syncwarp();
  }

  __device__ void arrive() const {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) barrier().arrive();
  }

 private:
  __device__ const cutlass::arch::ClusterBarrier& barrier() const {
    return reinterpret_cast<const cutlass::arch::ClusterBarrier&>(value_);
  }

  uint64_t value_;
};

// What a warp prepares for the tiles of a team; handoff.h says who waits for whom.
template <class Prepared, int kMembers>
struct Handoff {
  alignas(16) Prepared places[kPlaces];
  WarpBarrier ready[kPlaces];
  WarpBarrier free[kPlaces];

  __device__ void init() {
    for (int p = 0; p < kPlaces; ++p) {
      ready[p].init(1);
      free[p].init(kMembers * kGroupThreads / kWarp);
    }
  }
};

template <class ElementType, class Epilogue, template <class, int, int> class FeedOf>
struct Persistent {
  static constexpr int kWidth = Epilogue::kWidth;
  using Tiling = Teams<kWidth>;
  static constexpr int kTeams = Tiling::kTeams, kMembers = Tiling::kMembers;
  using Prepared = typename Epilogue::Prepared;
  static constexpr int kThreads = (1 + kConsumers) * kGroupThreads;
  // In steps of eight, of the 384·168 registers that a block begins with: 128·(40 + 2·232). 128 of a consumer's hold
  // accumulators.
  static constexpr int kProducerRegisters = Epilogue::kProducerRegisters;
  static constexpr int kConsumerRegisters = (3 * 168 - kProducerRegisters) / 2;
  using HandoffOfTeam = Handoff<Prepared, kMembers>;
  static constexpr int kOtherBytes = kConsumers * static_cast<int>(sizeof(typename Epilogue::Scratch)) +
                                     kTeams * static_cast<int>(sizeof(HandoffOfTeam)) + kBarrierBytes;
  using Feed = FeedOf<ElementType, kWidth, kOtherBytes>;
  using Order = typename Feed::Order;
  using Walk = typename Feed::Walk;
  using TiledMma = typename Feed::Mainloop::TiledMma;
  using OrderBarrier = cutlass::OrderedSequenceBarrier<1, kConsumers>;
  static_assert(cute::size(TiledMma{}) == kMembers * kGroupThreads, "a team computes a tile");

  struct Params {
    typename Feed::Mainloop::Params operands[kMaxMatrices];
    Order order;
    int dim;
    typename Epilogue::Params epilogue;
  };

  // What does not depend on the number of steps; operands follow.
  struct alignas(1024) SharedStorage {
    typename Epilogue::Scratch scratch[kConsumers];
    HandoffOfTeam handoffs[kTeams];
    alignas(16) typename OrderBarrier::SharedStorage order;
    alignas(16) typename Feed::Barriers feed;
  };
  static_assert(sizeof(SharedStorage) <= kOtherBytes, "feeds take the rest for operands");

  // The layout that fragments.h describes, checked against the instruction's own.
  static constexpr bool fragments_agree() {
    auto layout = TiledMma{}.get_layoutC_TV();
    constexpr int kRows = 64 * kMembers;  // of one instruction of every warpgroup; m repeats it below
    for (int t : {0, 1, 5, 31, 32, 77, 127, kMembers * kGroupThreads - 3}) {
      for (int n : {0, 7, Tiling::kColsPerThread / 2 - 1}) {
        for (int m = 0; m < Tiling::kHalves; ++m) {
          for (int half = 0; half < 2; ++half) {
            for (int b = 0; b < 2; ++b) {
              const int index = layout(t, b + 2 * half + 4 * n);
              const int row = index % kRows + kRows * m, col = index / kRows;
              if (row != fragment_row(t, m, half) || col != fragment_col(t, n, b)) return false;
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

  static typename Feed::Mainloop::Params operand_params(const Matrix& matrix, int num_rows, int num_cols, int dim) {
    const typename Feed::Mainloop::Arguments arguments{
        static_cast<const ElementType*>(matrix.rows), {matrix.row_stride, cute::_1{}, int64_t{0}},
        static_cast<const ElementType*>(matrix.cols), {matrix.col_stride, cute::_1{}, int64_t{0}}};
    return Feed::Mainloop::to_underlying_arguments(cute::make_shape(num_rows, num_cols, dim, 1), arguments, nullptr);
  }

  static int shared_bytes(int dim) {
    return static_cast<int>(sizeof(SharedStorage)) + Feed::operand_bytes(ceil_div(dim, kDepth));
  }

  __device__ static void run(const Params& params, char* shared_memory) {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(shared_memory);
    const int warpgroup = cutlass::canonical_warp_group_idx();
    const int thread = threadIdx.x % kGroupThreads;
    const bool producer = warpgroup == 0;
    const int consumer = warpgroup - 1;
    const TileSpace& space = params.order.space;
    if (threadIdx.x < space.num_matrices) Feed::Mainloop::prefetch_tma_descriptors(params.operands[threadIdx.x]);

    const int block_in_cluster = kCluster > 1 ? static_cast<int>(cute::block_rank_in_cluster()) : 0;
    Feed feed(shared.feed, shared_memory + sizeof(SharedStorage), ceil_div(params.dim, kDepth), block_in_cluster,
              producer, thread);
    typename OrderBarrier::Params order_params;
    order_params.group_id = consumer;
    order_params.group_size = kGroupThreads;
    OrderBarrier order(shared.order, order_params);
    if (threadIdx.x == 0) {
      for (HandoffOfTeam& handoff : shared.handoffs) handoff.init();
      cutlass::arch::fence_barrier_init();
    }

    // Barriers are initialised before anyone, in any block of the cluster, uses them.
    if constexpr (kCluster > 1) {
      cute::cluster_arrive_relaxed();
      cute::cluster_wait();
    } else {
      __syncthreads();
    }

    if (producer) {
      cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
      const int warp = cutlass::canonical_warp_idx_sync();
      Walk walk(params.order, blockIdx.x / kCluster);
      if (warp == 0) {
        feed.load(params.operands, space, params.dim, walk);
      } else if (warp <= kTeams) {
        Preparation preparation{params, shared.handoffs[warp - 1], block_in_cluster, thread % kWarp};
        prepare_tiles(walk, warp - 1, kTeams, preparation);
      }
    } else {
      cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
      const int team = consumer / kMembers, in_team = consumer % kMembers * kGroupThreads + thread;
      Computation computation{params,
                              feed,
                              order,
                              shared.handoffs[team],
                              Epilogue(params.epilogue, space, shared.scratch[consumer], in_team, 1 + consumer),
                              in_team};
      if (team > 0) feed.skip();
      take_tiles(computation);
      computation.epilogue.end();
    }
  }

 private:
  static constexpr int kNoMatrix = -1;  // after the last tile

  // Everything that a team's tiles need besides products, so that consumers neither walk nor wait for device memory.
  struct Preparation {
    const Params& params;
    HandoffOfTeam& handoff;
    int block_in_cluster;
    int lane;

    __device__ Item own(Item tile) const {
      tile.row_start += block_in_cluster * kTile;
      return tile;
    }

    __device__ auto fetch(const Item& tile) const {
      return Epilogue::fetch(params.epilogue, params.order.space, tile, lane);
    }

    __device__ void wait_free(int place, uint32_t phase) const { handoff.free[place].wait(phase); }

    template <class Fetched>
    __device__ void prepare(int place, const Item& tile, const Fetched& fetched) const {
      Epilogue::prepare(params.epilogue, params.order.space, tile, fetched, handoff.places[place], lane);
      if (lane == 0) handoff.places[place].tile = tile;
    }

    __device__ void prepare_end(int place) const {
      if (lane == 0) handoff.places[place].tile.matrix = kNoMatrix;
    }

    __device__ void ready(int place) const { handoff.ready[place].arrive(); }
  };

  struct Computation {
    const Params& params;
    Feed& feed;
    OrderBarrier& order;
    HandoffOfTeam& handoff;
    Epilogue epilogue;
    int thread;  // of the team
    TiledMma tiled_mma = {};

    __device__ void wait_ready(int place, uint32_t phase) const { handoff.ready[place].wait(phase); }

    __device__ bool compute(int place) {
      const Prepared& prepared = handoff.places[place];
      const Item tile = prepared.tile;
      if (tile.matrix == kNoMatrix) return false;
      auto accumulators = cute::partition_fragment_C(tiled_mma, cute::take<0, 2>(TileShape<kWidth>{}));
      if constexpr (kTeams > 1) order.wait();
      feed.multiply(tile, params.operands[0], accumulators, thread, [&] {
        if constexpr (kTeams > 1) order.arrive();
      });
      if constexpr (kTeams > 1) feed.skip();
      epilogue.finish(tile, prepared, accumulators, [&] { handoff.free[place].arrive(); });
      return true;
    }
  };
};

// The kernel. Descriptors for the copy engine are read where the argument lies, so it must not be copied.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1)
    persistent_kernel(const __grid_constant__ typename Kernel::Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared_memory[];
  Kernel::run(params, shared_memory);
#endif
}

// `before` is called when the work has been dealt out, and may enqueue something ahead of it.
template <class Kernel, class Before>
const char* launch(typename Kernel::Params& params, void* stream, Before before) {
  if (!Kernel::operands_encoded(params)) return "the driver refused to describe an operand to the copy engine";
  const int shared_bytes = Kernel::shared_bytes(params.dim);
  const void* kernel = reinterpret_cast<const void*>(&persistent_kernel<Kernel>);
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    // All there is, whatever this launch takes: another thread may be about to launch with more.
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 cutlass::gemm::collective::detail::sm90_smem_capacity_bytes);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int items = params.order.num_items();
  const int clusters = items < processors / kCluster ? items : processors / kCluster;
  params.order.deal(clusters);
  error = before();
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(clusters * kCluster);
  config.blockDim = dim3(Kernel::kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  void* arguments[] = {&params};
  error = cudaLaunchKernelExC(&config, kernel, arguments);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here, not once more by whoever asks next
  return cudaGetErrorString(error);
}

template <class Kernel>
const char* launch(typename Kernel::Params& params, void* stream) {
  return launch<Kernel>(params, stream, [] { return cudaSuccess; });
}

}  // namespace gapkernels
