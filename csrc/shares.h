// Which part of two products, total[height, dim] += left[height, depth]·right[depth, dim], comes when. Plain integer
// arithmetic: the kernel and the tests on the CPU run the same code.
//
// An item is one tile of 256 columns, as many tiles high as a cluster has blocks, over its whole depth, 64 at a time.
// The steps of all items are numbered through, and cluster c of C has those between c/C and (c + 1)/C of them:
//
//     steps      | item 0 of rows | item 1 | … | item 0 of columns | item 1 | …
//     shares     | cluster 0   | cluster 1   | cluster 2   | …
//     parts      |             |..|          |.....|       |        what a cluster has of an item, added by itself
//
// Adding a part costs time as well. So limits of shares move to the nearest limit of an item: those that are a few
// steps away, or all, so that no item is split. The launch takes of both what is shorter by count.
#pragma once

#include "tiles.h"

namespace gapkernels {

constexpr int kProducts = 2;

// What it takes to add a tile, in steps of 1,024 clocks: 128 KiB through the L2 cache at 32 bytes a clock.
constexpr int kStoreSteps = 4;

// H·cols comes first, then Hᵀ·rows.
struct ProductSpace {
  int heights[kProducts];  // zero where a product is not wanted
  int depths[kProducts];
  int dim;
};

struct Part {
  int product;
  int row_start;  // of the first tile of the cluster; tile r begins at row_start + r·kTile
  int col_start;
  int first_step;
  int steps;  // zero after the last part
};

template <int kCluster>
struct ShareOrder {
  static constexpr int kHeight = kCluster * kTile;

  Divisor rows[kProducts];   // items in a column
  Divisor steps[kProducts];  // of an item
  int of_first;              // steps of the first product
  int total;                 // of both
  int clusters = 1;
  int share;  // of a cluster; one more for the first `longer`
  int longer;
  int reach;  // how many steps a limit may move

  static ShareOrder of(const ProductSpace& space) {
    ShareOrder order{};
    for (int p = 0; p < kProducts; ++p) {
      const int rows = ceil_div(space.heights[p], kHeight), steps = ceil_div(space.depths[p], kDepth);
      order.rows[p] = Divisor::of(rows);
      order.steps[p] = Divisor::of(steps);
      order.of_first = order.total;
      order.total += rows * ceil_div(space.dim, kWideTile) * steps;
    }
    return order;
  }

  // As many clusters as can have work.
  int num_items() const { return total; }

  void deal(int num_clusters) {
    clusters = num_clusters;
    share = total / clusters;
    longer = total % clusters;
    reach = kStoreSteps;
    const int split = longest();
    reach = total;
    if (split < longest()) reach = kStoreSteps;
  }

  bool splits() const { return reach < total; }

  // Steps of the cluster that has most of them, what adding its parts takes included.
  int longest() const;

  // The first step of a cluster, which is the last one's end.
  GAPKERNELS_HOST_DEVICE int begin(int cluster) const {
    const int step = cluster * share + (cluster < longer ? cluster : longer);
    if (step >= total) return total;
    const int product = step >= of_first, length = static_cast<int>(steps[product].divisor);
    const int inside = step - product * of_first;
    const int before = inside - steps[product].divide(inside) * length, after = length - before;
    if (before <= after) return before <= reach ? step - before : step;
    return after <= reach ? step + after : step;
  }

  // From this step on, up to `end` at most.
  GAPKERNELS_HOST_DEVICE Part part(int step, int end) const {
    if (step >= end) return {};
    const int product = step >= of_first, length = static_cast<int>(steps[product].divisor);
    const int inside = step - product * of_first;
    const int item = steps[product].divide(inside), first = inside - item * length;
    const int col = rows[product].divide(item), row = item - col * static_cast<int>(rows[product].divisor);
    const int left = length - first;
    return {product, row * kHeight, col * kWideTile, first, left < end - step ? left : end - step};
  }
};

// The parts of one cluster, in order. Everyone in a cluster walks the same way.
template <int kCluster>
class ShareWalk {
 public:
  GAPKERNELS_HOST_DEVICE ShareWalk(const ShareOrder<kCluster>& order, int cluster)
      : order_(order), next_(order.begin(cluster)), end_(order.begin(cluster + 1)) {
    advance();
  }

  GAPKERNELS_HOST_DEVICE bool valid() const { return part_.steps > 0; }
  GAPKERNELS_HOST_DEVICE const Part& part() const { return part_; }

  GAPKERNELS_HOST_DEVICE void advance() {
    part_ = order_.part(next_, end_);
    next_ += part_.steps;
  }

 private:
  const ShareOrder<kCluster>& order_;
  int next_;
  int end_;
  Part part_;
};

template <int kCluster>
int ShareOrder<kCluster>::longest() const {
  int most = 0;
  for (int cluster = 0; cluster < clusters; ++cluster) {
    int count = 0;
    for (ShareWalk<kCluster> walk(*this, cluster); walk.valid(); walk.advance()) {
      count += walk.part().steps + kStoreSteps;
    }
    most = count > most ? count : most;
  }
  return most;
}

}  // namespace gapkernels
