// The blocks of one cluster that keep their rows in shared memory, without their arithmetic: producers and consumers run
// the kernels' own walk and the kernels' own order of waits, copies, products and arrivals (residency.h), as fibers that
// take turns at random. Barriers count arrivals and bytes as those of the hardware do; copies land at a random time after
// they were issued, for each block on its own; products read their operands until they are waited for.
//
// What is looked for: an operand that is not the one wanted when products begin, or that a copy has begun to overwrite
// before they are complete; a barrier that receives more than it expects; an arrival at a block that has ended; a wait
// without end.
#include "residency.h"

#include "interleaving.h"
#include "strips.h"

namespace gapkernels {
namespace {

struct Block {
  std::vector<Contents> panel;
  std::vector<std::vector<Contents>> ring;  // by place and block that copies the part
  std::vector<Mbarrier> barriers[4];
  Mbarrier turns[kConsumers];
  int roles_alive = 1 + kConsumers;
};

template <int kCluster>
class Cluster : Simulation {
 public:
  using Simulation::run;

  Cluster(const TileSpace& space, int num_clusters, int cluster, int steps, int places, bool careless, unsigned seed)
      : Simulation(seed), steps_(steps), places_(places), careless_(careless), order_(StripOrder<kCluster>::of(space)) {
    order_.deal(num_clusters);
    for (Block& block : blocks_) {
      block.panel.resize(steps);
      block.ring.assign(places, std::vector<Contents>(kCluster));
      const int counts[4] = {1, (careless ? 1 : kConsumers) * kWarps, 1, kCluster * kWarps};
      for (int b = 0; b < 4; ++b) {
        block.barriers[b].resize(b < 2 ? steps : places);
        for (Mbarrier& barrier : block.barriers[b]) barrier.init(counts[b]);
      }
      for (Mbarrier& turn : block.turns) turn.init(1);
    }
    for (int b = 0; b < kCluster; ++b) {
      fibers_.add([this, b, cluster] { produce(b, cluster); });
      for (int c = 0; c < kConsumers; ++c) fibers_.add([this, b, c, cluster] { consume(b, c, cluster); });
    }
  }

 private:
  struct Operations {
    Cluster& cluster;
    int b;
    Item tile;
    int consumer = 0;
    uint32_t* turn = nullptr;
    struct Reading {
      const Contents* operand;
      int version;
    };
    std::vector<Reading> reading = {};

    Block& block() { return cluster.blocks_[b]; }

    void wait(Barrier barrier, int index, uint32_t phase) {
      cluster.Simulation::wait(block().barriers[static_cast<int>(barrier)][index], phase);
      cluster.fibers_.dawdle();
    }

    Mbarrier& barrier(Block& of, Barrier kind, int index) { return of.barriers[static_cast<int>(kind)][index]; }

    void copy_rows(int k) {
      cluster.change(barrier(block(), Barrier::kRowFull, k), 1, 1);
      cluster.copy(block().panel[k], {tile.matrix, tile.row_start + b * kTile, k}, barrier(block(), Barrier::kRowFull, k));
    }

    void copy_cols(int k, int place) {
      cluster.change(barrier(block(), Barrier::kColFull, place), 1, kCluster);
      for (Block& to : cluster.blocks_) {
        cluster.copy(to.ring[place][b], {tile.matrix, tile.col_start, k}, barrier(to, Barrier::kColFull, place));
      }
    }

    void read(int k, int place) {
      if (!block().panel[k].is(tile.matrix, tile.row_start + b * kTile, k)) cluster.fail("rows of another tile");
      reading.push_back({&block().panel[k], block().panel[k].version});
      for (const Contents& part : block().ring[place]) {
        if (!part.is(tile.matrix, tile.col_start, k)) cluster.fail("columns of another tile");
        reading.push_back({&part, part.version});
      }
    }

    void finish(size_t operands) {
      cluster.fibers_.dawdle();
      for (size_t i = 0; i < operands; ++i) {
        if (reading[i].operand->version != reading[i].version) cluster.fail("overwritten while it is read");
      }
      reading.erase(reading.begin(), reading.begin() + operands);
    }

    void first_step(int place) { read(0, place); }

    void step(int k, int place) {
      read(k, place);
      finish(reading.size() / 2);
    }

    void complete() { finish(reading.size()); }

    void hand_over() {
      cluster.change(block().turns[1 - consumer], 1, 0);
      *turn ^= 1;
    }

    void release(int k, int place, int arrivals) {
      if (cluster.careless_) arrivals = tile.left == 1;
      for (int warp = 0; warp < kWarps; ++warp) {
        for (Block& to : cluster.blocks_) {
          if (to.roles_alive == 0) cluster.fail("an arrival at a block that has ended");
          cluster.change(barrier(to, Barrier::kColEmpty, place), 1, 0);
        }
        for (int i = 0; i < arrivals; ++i) cluster.change(barrier(block(), Barrier::kRowEmpty, k), 1, 0);
        cluster.fibers_.dawdle();
      }
    }
  };

  void produce(int b, int cluster) {
    Place place;
    for (StripWalk<kCluster> walk(order_, cluster); walk.valid(); walk.advance()) {
      Operations operations{*this, b, walk.item()};
      load_tile(operations.tile, steps_, places_, place, operations);
    }
    Operations operations{*this, b, {}};
    drain(places_, place, operations);
    --blocks_[b].roles_alive;
  }

  void consume(int b, int consumer, int cluster) {
    Place place;
    uint32_t turn = consumer == 0;  // as CUTLASS's OrderedSequenceBarrier
    if (consumer == 1) place.advance(steps_, places_);
    int number = 0;
    for (StripWalk<kCluster> walk(order_, cluster); walk.valid(); walk.advance()) {
      if (number++ % kConsumers != consumer) continue;
      wait(blocks_[b].turns[consumer], turn);
      Operations operations{*this, b, walk.item(), consumer, &turn};
      multiply_tile(operations.tile, steps_, places_, place, operations);
      place.advance(steps_, places_);
      fibers_.dawdle();  // exponentials
      ++tiles_;
    }
    --blocks_[b].roles_alive;
  }

  int steps_;
  int places_;
  bool careless_;
  StripOrder<kCluster> order_;
  Block blocks_[kCluster];
};

}  // namespace
}  // namespace gapkernels

// Runs one of `num_clusters` clusters of one or two blocks; returns what went wrong, or null, valid until the next call.
// careless: the last tile of a panel alone gives it back.
extern "C" const char* gapkernels_residency(int num_rows, int num_cols, int num_matrices, unsigned symmetric, int cluster,
                                            int num_clusters, int height, int steps, int places, bool careless,
                                            unsigned seed, int* tiles) {
  using namespace gapkernels;
  static std::string problem;
  const TileSpace space{num_rows, num_cols, num_matrices, symmetric};
  problem = height == 1 ? Cluster<1>(space, num_clusters, cluster, steps, places, careless, seed).run(*tiles)
                        : Cluster<2>(space, num_clusters, cluster, steps, places, careless, seed).run(*tiles);
  return problem.empty() ? nullptr : problem.c_str();
}
