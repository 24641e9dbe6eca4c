// A feed that keeps a panel of 128 rows, up to 512 long, in shared memory while it walks along the columns.
//
//     panel    16 KiB for each 64 of D, copied once for all tiles of these rows
//     ring     column tiles of 16 KiB, of which a cluster of two reads half each and sends it to both: 8 KiB come from
//              the L2 cache in 512 clocks of the tensor cores
//
// residency.h says who waits for whom.
#pragma once

#include "persistent_sm90.cuh"
#include "residency.h"
#include "strips.h"

namespace gapkernels {

template <class ElementType, int kWidth, int kOtherBytes>
class Resident {
  static_assert(kWidth == kTile, "in turns only");
  static constexpr int kMaxSteps = kLargestResidentDim / kDepth;
  static constexpr int kMaxPlaces = 12;
  static constexpr int kBlockBytes = kTile * kDepth * sizeof(ElementType);
  static constexpr int kCapacity = cutlass::gemm::collective::detail::sm90_smem_capacity_bytes - kOtherBytes;
  static constexpr int kWarps = kGroupThreads / kWarp;
  using Arrivals = cutlass::arch::ClusterBarrier;
  using Bytes = cutlass::arch::ClusterTransactionBarrier;

 public:
  using Order = StripOrder<kCluster>;
  using Walk = StripWalk<kCluster>;
  // Its layouts only: one block after the other, of the panel or of the ring.
  using Mainloop = MainloopOf<ElementType, kWidth, cutlass::gemm::collective::StageCount<kMaxPlaces>>;
  static_assert(kMaxSteps <= kMaxPlaces && Mainloop::TmaTransactionBytesMK == kBlockBytes &&
                Mainloop::TmaTransactionBytesNK == kBlockBytes);
  static_assert(kCapacity / kBlockBytes - kMaxSteps >= 3, "copies need somewhere to go while products run");

  struct Barriers {
    uint64_t row_full[kMaxSteps];
    uint64_t row_empty[kMaxSteps];
    uint64_t col_full[kMaxPlaces];
    uint64_t col_empty[kMaxPlaces];
  };

  // Places of the ring beside a panel.
  GAPKERNELS_HOST_DEVICE static int places(int steps) {
    const int room = kCapacity / kBlockBytes - steps;
    return room < kMaxPlaces ? room : kMaxPlaces;
  }

  static int operand_bytes(int steps) { return (steps + places(steps)) * kBlockBytes; }

  __device__ Resident(Barriers& barriers, char* operands, int steps, int block_in_cluster, bool, int)
      : barriers_(barriers),
        panel_(reinterpret_cast<ElementType*>(operands)),
        ring_(reinterpret_cast<ElementType*>(operands + steps * kBlockBytes)),
        steps_(steps),
        places_(places(steps)),
        block_in_cluster_(block_in_cluster) {
    if (threadIdx.x != 0) return;
    for (int k = 0; k < kMaxSteps; ++k) {
      Bytes::init(&barriers_.row_full[k], 1);
      Arrivals::init(&barriers_.row_empty[k], kConsumers * kWarps);
    }
    for (int r = 0; r < kMaxPlaces; ++r) {
      Bytes::init(&barriers_.col_full[r], 1);
      Arrivals::init(&barriers_.col_empty[r], kCluster * kWarps);
    }
    cutlass::arch::fence_barrier_init();
  }

  __device__ void load(const typename Mainloop::Params* matrices, const TileSpace& space, int dim, Walk& walk) {
    using namespace cute;
    if (!elect_one_sync()) return;
    Mainloop mainloop;
    Place place;
    for (; walk.valid(); walk.advance()) {
      const Item item = walk.item();
      const auto& matrix = matrices[item.matrix];
      auto inputs = mainloop.load_init(make_shape(space.num_rows, space.num_cols, dim, 1), matrix);
      Tensor rows = get<0>(inputs)(_, _, item.row_start / kTile + block_in_cluster_, _, 0);  // [tile, depth, steps]
      Tensor cols = get<1>(inputs)(_, _, item.col_start / kTile, _, 0);
      auto copies = copies_of(matrix, matrix.tma_load_a.get_slice(0).partition_S(rows),
                              matrix.tma_load_b.get_slice(block_in_cluster_).partition_S(cols));
      load_tile(item, steps_, places_, place, copies);
    }
    Waits waits{barriers_};
    drain(places_, place, waits);
  }

  template <class Accumulators, class HandOver>
  __device__ void multiply(const Item& tile, const typename Mainloop::Params&, Accumulators& accumulators, int thread,
                           HandOver hand_over) {
    Products<Accumulators, HandOver> products{{barriers_}, *this, accumulators, thread % kWarp, hand_over, {}};
    multiply_tile(tile, steps_, places_, place_, products);
  }

  // A tile that the other consumer multiplies.
  __device__ void skip() { place_.advance(steps_, places_); }

 private:
  struct Waits {
    Barriers& barriers;

    __device__ void wait(Barrier barrier, int index, uint32_t phase) const {
      switch (barrier) {
        case Barrier::kRowFull: return Bytes::wait(&barriers.row_full[index], phase);
        case Barrier::kRowEmpty: return Arrivals::wait(&barriers.row_empty[index], phase);
        case Barrier::kColFull: return Bytes::wait(&barriers.col_full[index], phase);
        case Barrier::kColEmpty: return Arrivals::wait(&barriers.col_empty[index], phase);
      }
    }
  };

  template <class Rows, class Cols>
  struct Copies : Waits {
    const Resident& feed;
    const typename Mainloop::Params& matrix;
    Rows rows;  // […, steps], where they are in device memory
    Cols cols;

    __device__ void copy_rows(int k) const {
      auto& barrier = this->barriers.row_full[k];
      Bytes::arrive_and_expect_tx(&barrier, kBlockBytes);
      auto panel = matrix.tma_load_a.get_slice(0).partition_D(feed.panel());
      cute::copy(matrix.tma_load_a.with(barrier, 0), rows(cute::_, cute::_, cute::_, k),
                 panel(cute::_, cute::_, cute::_, k));
    }

    // This block's part, to every block.
    __device__ void copy_cols(int k, int place) const {
      const uint16_t every_block = kCluster > 1 ? (1 << kCluster) - 1 : 0;
      auto& barrier = this->barriers.col_full[place];
      Bytes::arrive_and_expect_tx(&barrier, kBlockBytes);
      auto ring = matrix.tma_load_b.get_slice(feed.block_in_cluster_).partition_D(feed.ring());
      cute::copy(matrix.tma_load_b.with(barrier, every_block), cols(cute::_, cute::_, cute::_, k),
                 ring(cute::_, cute::_, cute::_, place));
    }
  };

  template <class Rows, class Cols>
  __device__ Copies<Rows, Cols> copies_of(const typename Mainloop::Params& matrix, Rows rows, Cols cols) const {
    return {{barriers_}, *this, matrix, rows, cols};
  }

  // Fences, commits and waits as in CUTLASS's collective.
  template <class Accumulators, class HandOver>
  struct Products : Waits {
    const Resident& feed;
    Accumulators& accumulators;
    int lane;
    HandOver hand_over;
    typename Mainloop::TiledMma tiled_mma;

    __device__ auto rows() const {
      auto of_group = tiled_mma.get_slice(0);  // descriptors are the same for all its threads
      return of_group.make_fragment_A(of_group.partition_A(feed.panel()));
    }

    __device__ auto cols() const {
      auto of_group = tiled_mma.get_slice(0);
      return of_group.make_fragment_B(of_group.partition_B(feed.ring()));
    }

    __device__ void first_step(int place) {
      cute::warpgroup_fence_operand(accumulators);
      cute::warpgroup_arrive();
      tiled_mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
      CUTLASS_PRAGMA_UNROLL
      for (int part = 0; part < kDepth / kInstructionDepth; ++part) {
        cute::gemm(tiled_mma, rows()(cute::_, cute::_, part, 0), cols()(cute::_, cute::_, part, place), accumulators);
        tiled_mma.accumulate_ = cute::GMMA::ScaleOut::One;
      }
      cute::warpgroup_commit_batch();
      cute::warpgroup_fence_operand(accumulators);
    }

    __device__ void step(int k, int place) {
      cute::warpgroup_fence_operand(accumulators);
      cute::warpgroup_arrive();
      cute::gemm(tiled_mma, rows()(cute::_, cute::_, cute::_, k), cols()(cute::_, cute::_, cute::_, place),
                 accumulators);
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<1>();
      cute::warpgroup_fence_operand(accumulators);
    }

    __device__ void complete() {
      cute::warpgroup_wait<0>();
      cute::warpgroup_fence_operand(accumulators);
    }

    __device__ void release(int k, int place, int row_arrivals) const {
      Arrivals::arrive(&this->barriers.col_empty[place], lane, lane < kCluster);
      if (lane == 0 && row_arrivals >= 1) Arrivals::arrive(&this->barriers.row_empty[k]);
      if (lane == 0 && row_arrivals == kConsumers) Arrivals::arrive(&this->barriers.row_empty[k]);
    }
  };

  // [128, 64, blocks]
  __device__ auto panel() const {
    return cute::make_tensor(cute::make_smem_ptr(panel_), typename Mainloop::SmemLayoutA{});
  }

  // [128, 64, places]
  __device__ auto ring() const {
    return cute::make_tensor(cute::make_smem_ptr(ring_), typename Mainloop::SmemLayoutB{});
  }

  static constexpr int kInstructionDepth = 16;

  Barriers& barriers_;
  ElementType* panel_;
  ElementType* ring_;
  Place place_;
  int steps_;
  int places_;
  int block_in_cluster_;
};

}  // namespace gapkernels
