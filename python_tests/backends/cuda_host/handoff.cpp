// The blocks of one cluster that copy both operands of every tile, without their arithmetic: the kernels' own walk,
// what is prepared for consumers in the kernels' own order (handoff.h), and the pipeline of operands as CUTLASS's
// collective does it, written out. Two teams of one consumer that take turns, or one team of two that share their
// tiles, of which the second stays behind.
//
// What is looked for: operands or prepared factors of another tile, or overwritten while they are read; a barrier that
// receives more than it expects; an arrival at a block that has ended; a wait without end.
#include "handoff.h"

#include "interleaving.h"

namespace gapkernels {
namespace {

template <int kCluster, int kWidth>
class StreamedCluster : Simulation {
  using Tiling = Teams<kWidth>;
  using Walk = TileWalk<kCluster, kWidth>;
  static constexpr int kTeams = Tiling::kTeams, kMembers = Tiling::kMembers;

 public:
  using Simulation::run;

  // careless: a place is free when one of two has said so.
  StreamedCluster(const TileSpace& space, int num_clusters, int cluster, int steps, int stages, bool careless,
                  unsigned seed)
      : Simulation(seed), steps_(steps), stages_(stages), order_(TileOrder<kCluster, kWidth>::of(space)) {
    order_.deal(num_clusters);
    for (Block& block : blocks_) {
      block.stages.resize(stages);
      for (Stage& stage : block.stages) {
        stage.full.init(1);
        stage.empty.init(kCluster * kMembers);
      }
      for (Team& team : block.teams) {
        for (Prepared& prepared : team.prepared) {
          prepared.ready.init(1);
          prepared.free.init((careless ? 1 : kMembers) * kWarps);
        }
        team.turn.init(1);
      }
    }
    for (int b = 0; b < kCluster; ++b) {
      fibers_.add([this, b, cluster] { load(b, cluster); });
      for (int t = 0; t < kTeams; ++t) {
        fibers_.add([this, b, t, cluster] {
          Walk walk(order_, cluster);
          Preparation preparation{*this, blocks_[b].teams[t], b};
          prepare_tiles(walk, t, kTeams, preparation);
        });
        for (int m = 0; m < kMembers; ++m) fibers_.add([this, b, t, m, cluster] { compute(b, t, m, cluster); });
      }
    }
  }

 private:
  struct Stage {
    Contents rows;
    Contents cols[kCluster];  // by the block that copies the part
    Mbarrier full;
    Mbarrier empty;
  };

  struct Prepared {
    Item tile{};
    int version = 0;
    Mbarrier ready;
    Mbarrier free;
  };

  struct Team {
    Prepared prepared[kPlaces];
    Mbarrier turn;
  };

  struct Block {
    std::vector<Stage> stages;
    Team teams[kTeams];
    int roles_alive = 1 + kConsumers;
  };

  struct Preparation {
    StreamedCluster& cluster;
    Team& team;
    int b;

    Item own(Item tile) const {
      tile.row_start += b * kTile;
      return tile;
    }

    int fetch(const Item&) const { return 0; }

    void wait_free(int place, uint32_t phase) const { cluster.wait(team.prepared[place].free, phase); }

    void prepare(int place, const Item& tile, int) const { write(place, tile); }

    void prepare_end(int place) const { write(place, {-1, 0, 0}); }

    void write(int place, const Item& tile) const {
      Prepared& prepared = team.prepared[place];
      ++prepared.version;
      prepared.tile = {-2, 0, 0};
      cluster.fibers_.dawdle();
      prepared.tile = tile;
    }

    void ready(int place) const { cluster.change(team.prepared[place].ready, 1, 0); }
  };

  struct Computation {
    StreamedCluster& cluster;
    int b;
    int t;
    int member;
    Walk walk;
    Place stage;
    uint32_t turn;

    Team& team() { return cluster.blocks_[b].teams[t]; }
    Stage& at(const Place& place) { return cluster.blocks_[b].stages[place.index]; }

    void skip() { stage.advance(cluster.steps_, cluster.stages_); }

    void wait_ready(int place, uint32_t phase) {
      cluster.wait(team().prepared[place].ready, phase);
      cluster.fibers_.dawdle();
    }

    bool compute(int place) {
      const Prepared& prepared = team().prepared[place];
      const int version = prepared.version;
      const Item tile = prepared.tile;
      if (tile.matrix == -1) {
        if (walk.valid()) cluster.fail("the end before the last tile");
        return false;
      }
      const Item& own = walk.item();
      if (!walk.valid() || tile.matrix != own.matrix || tile.row_start != own.row_start + b * kTile ||
          tile.col_start != own.col_start) {
        cluster.fail("factors of another tile");
        return false;
      }
      if (kTeams > 1) cluster.wait(team().turn, turn);
      multiply(tile);
      if (kTeams > 1) skip();
      cluster.fibers_.dawdle();  // exponentials
      if (prepared.version != version) cluster.fail("factors overwritten while they are read");
      for (int warp = 0; warp < kWarps; ++warp) {
        cluster.change(team().prepared[place].free, 1, 0);
        cluster.fibers_.dawdle();
      }
      for (int i = 0; i < kTeams && walk.valid(); ++i) walk.advance();
      cluster.tiles_ += member == 0;
      return true;
    }

    void multiply(const Item& tile) {
      if (member > 0) {
        Place ahead = stage;
        ahead.advance(step_to_wait_for(cluster.steps_), cluster.stages_);
        cluster.wait(at(ahead).full, ahead.phase);
      }
      Place before = stage;
      for (int k = 0; k < cluster.steps_; ++k) {
        cluster.wait(at(stage).full, stage.phase);
        check(tile, k, stage);
        if (k > 0) {  // the step before is complete
          cluster.fibers_.dawdle();
          check(tile, k - 1, before);
          release(before);
        }
        before = stage;
        stage.advance(1, cluster.stages_);
      }
      if (kTeams > 1) {
        cluster.change(cluster.blocks_[b].teams[1 - t].turn, 1, 0);
        turn ^= 1;
      }
      cluster.fibers_.dawdle();
      check(tile, cluster.steps_ - 1, before);
      release(before);
    }

    // When products begin and when they are complete. A stage is marked as soon as a copy to it begins.
    void check(const Item& tile, int k, const Place& place) {
      bool right = at(place).rows.is(tile.matrix, tile.row_start, k);
      for (const Contents& part : at(place).cols) right = right && part.is(tile.matrix, tile.col_start, k);
      if (!right) cluster.fail("operands of another tile");
    }

    void release(const Place& place) {
      for (Block& to : cluster.blocks_) {
        if (to.roles_alive == 0) cluster.fail("an arrival at a block that has ended");
        cluster.change(to.stages[place.index].empty, 1, 0);
        cluster.fibers_.dawdle();
      }
    }
  };

  void load(int b, int cluster) {
    Place place;
    for (Walk walk(order_, cluster); walk.valid(); walk.advance()) {
      const Item tile = walk.item();
      for (int k = 0; k < steps_; ++k, place.advance(1, stages_)) {
        Stage& own = blocks_[b].stages[place.index];
        wait(own.empty, place.phase ^ 1);
        fibers_.dawdle();
        change(own.full, 1, 1 + kCluster);
        copy(own.rows, {tile.matrix, tile.row_start + b * kTile, k}, own.full);
        for (Block& to : blocks_) {
          Stage& stage = to.stages[place.index];
          copy(stage.cols[b], {tile.matrix, tile.col_start, k}, stage.full);
        }
      }
    }
    for (int s = 0; s < stages_; ++s, place.advance(1, stages_)) {
      wait(blocks_[b].stages[place.index].empty, place.phase ^ 1);
    }
    --blocks_[b].roles_alive;
  }

  void compute(int b, int t, int member, int cluster) {
    Computation computation{*this, b, t, member, Walk(order_, cluster), {}, t == 0};
    for (int i = 0; i < t && computation.walk.valid(); ++i) computation.walk.advance();
    if (t > 0) computation.skip();
    take_tiles(computation);
    --blocks_[b].roles_alive;
  }

  int steps_;
  int stages_;
  TileOrder<kCluster, kWidth> order_;
  Block blocks_[kCluster];
};

template <int kCluster, int kWidth>
std::string run_cluster(const TileSpace& space, int num_clusters, int cluster, int steps, int stages, bool careless,
                        unsigned seed, int& tiles) {
  return StreamedCluster<kCluster, kWidth>(space, num_clusters, cluster, steps, stages, careless, seed).run(tiles);
}

}  // namespace
}  // namespace gapkernels

// Runs one of `num_clusters` clusters of one or two blocks with tiles of either width; returns what went wrong, or
// null, valid until the next call.
extern "C" const char* gapkernels_handoff(int num_rows, int num_cols, int num_matrices, unsigned symmetric, int cluster,
                                          int num_clusters, int height, bool wide, int steps, int stages, bool careless,
                                          unsigned seed, int* tiles) {
  using namespace gapkernels;
  static std::string problem;
  const auto run = height == 1 ? (wide ? run_cluster<1, kWideTile> : run_cluster<1, kTile>)
                               : (wide ? run_cluster<2, kWideTile> : run_cluster<2, kTile>);
  const TileSpace space{num_rows, num_cols, num_matrices, symmetric};
  problem = run(space, num_clusters, cluster, steps, stages, careless, seed, *tiles);
  return problem.empty() ? nullptr : problem.c_str();
}
