// A feed that copies both operands of every tile: CUTLASS's collective, 64 deep at a time, any length of rows.
//
//     per step of 64 of a tile       tensor cores     rows, for this block    columns, half of which a cluster of two
//                                                                             reads each and sends to both
//     128×128                        512 clocks       16 KiB                  16 KiB
//     128×256                        1,024 clocks     16 KiB                  32 KiB
#pragma once

#include "persistent_sm90.cuh"

namespace gapkernels {

// Of a collective's pipeline whose operands as many warpgroups read.
template <class Mainloop, int kMembers>
__device__ typename Mainloop::MainloopPipeline::Params pipeline_params(bool producer, int thread) {
  using Pipeline = typename Mainloop::MainloopPipeline;
  typename Pipeline::Params params;
  params.role = producer ? Pipeline::ThreadCategory::Producer : Pipeline::ThreadCategory::Consumer;
  params.is_leader = thread == 0;
  params.num_consumers = kMembers * kGroupThreads;
  params.num_producers = 1;
  params.transaction_bytes = Mainloop::TmaTransactionBytes;
  return params;
}

// The second of two that share a tile begins when the operands are there of a step that the first will have come to.
// In the time that this one takes for two steps alone, 1,024 clocks, the first is in its epilogue. They stay apart: what
// one falls behind in its own epilogue it makes up for in the other's. The step is one of the same tile, since there
// may be no other tile, and of the stages behind this one's, which are copied without it giving anything back.
template <class Pipeline, class State>
__device__ void follow(Pipeline& pipeline, State state, int steps) {
  static_assert(State::Stages >= kStepsBehind + 2, "the first needs a stage to go on to");
  state.advance(step_to_wait_for(steps));
  pipeline.consumer_wait(state);
}

template <class ElementType, int kWidth, int kOtherBytes>
class Streamed {
 public:
  using Order = TileOrder<kCluster, kWidth>;
  using Walk = TileWalk<kCluster, kWidth>;
  using Mainloop = MainloopOf<ElementType, kWidth, cutlass::gemm::collective::StageCountAutoCarveout<kOtherBytes>>;
  using Operands = typename Mainloop::TensorStorage;
  using Pipeline = typename Mainloop::MainloopPipeline;
  using Barriers = typename Mainloop::PipelineStorage;

  static_assert(sizeof(Operands) + kOtherBytes <= cutlass::gemm::collective::detail::sm90_smem_capacity_bytes);

  static constexpr int operand_bytes(int) { return sizeof(Operands); }

  __device__ Streamed(Barriers& barriers, char* operands, int steps, int block_in_cluster, bool producer, int thread)
      : operands_(*reinterpret_cast<Operands*>(operands)),
        pipeline_(barriers, pipeline_params<Mainloop, kMembers>(producer, thread), ClusterShape{}),
        steps_(steps),
        block_in_cluster_(block_in_cluster) {}

  __device__ void load(const typename Mainloop::Params* matrices, const TileSpace& space, int dim, Walk& walk) {
    Mainloop mainloop;
    auto state = cutlass::make_producer_start_state<Pipeline>();
    for (; walk.valid(); walk.advance()) {
      const Item& item = walk.item();
      const auto& matrix = matrices[item.matrix];
      auto inputs = mainloop.load_init(cute::make_shape(space.num_rows, space.num_cols, dim, 1), matrix);
      auto tile = cute::make_coord(item.row_start / kTile + block_in_cluster_, item.col_start / kWidth, cute::_, 0);
      mainloop.load(matrix, pipeline_, state, inputs, tile, cute::make_coord_iterator(steps_), steps_,
                    threadIdx.x % kWarp, block_in_cluster_, operands_);
      state.advance(steps_);
    }
    mainloop.load_tail(pipeline_, state);  // no block leaves while another of its cluster may still write to it
  }

  template <class Accumulators, class Issued>
  __device__ void multiply(const Item&, const typename Mainloop::Params& matrix, Accumulators& accumulators, int thread,
                           Issued issued) {
    if constexpr (kMembers > 1) {
      if (thread >= kGroupThreads) follow(pipeline_, state_, steps_);
    }
    Mainloop mainloop;
    mainloop.mma(pipeline_, state_, accumulators, steps_, thread, operands_, matrix);
    issued();
    mainloop.mma_tail(pipeline_, state_, steps_);
    cute::warpgroup_fence_operand(accumulators);  // complete from here on, for the compiler too
    state_.advance(steps_);
  }

  // A tile that the other consumer multiplies.
  __device__ void skip() { state_.advance(steps_); }

 private:
  static constexpr int kMembers = Teams<kWidth>::kMembers;

  Operands& operands_;
  Pipeline pipeline_;
  typename Mainloop::PipelineState state_;
  int steps_;
  int block_in_cluster_;
};

}  // namespace gapkernels
