// Both products in plain C++: parts in the kernel's own order, loops in place of the tensor cores and the copy engine.
#include "products.h"

#include <algorithm>
#include <vector>

#include "sixteen_bits.h"

namespace gapkernels {
namespace {

constexpr int kCluster = 2;
constexpr int kClusters = 7;

// A tile of a part: as the copy engine reads operands and writes totals, nothing beyond an edge.
void add_tile(const ProductArguments& arguments, const ProductSpace& space, const Part& part, int row_start,
              bool overwrite) {
  const int p = part.product, row_end = std::min(row_start + kTile, space.heights[p]);
  const int col_end = std::min(part.col_start + kWideTile, space.dim);
  const int begin = part.first_step * kDepth, end = std::min(begin + part.steps * kDepth, space.depths[p]);
  const void* right = p == 0 ? arguments.cols : arguments.rows;
  const int64_t right_stride = p == 0 ? arguments.col_stride : arguments.row_stride;
  std::vector<float> sums(kWideTile);
  for (int i = row_start; i < row_end; ++i) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int k = begin; k < end; ++k) {
      const int64_t place = p == 0 ? i * arguments.h_stride + k : k * arguments.h_stride + i;
      const float left = load(arguments.h, place, arguments.element);
      for (int j = part.col_start; j < col_end; ++j) {
        sums[j - part.col_start] += left * load(right, k * right_stride + j, arguments.element);
      }
    }
    float* total = arguments.totals[p] + i * arguments.total_strides[p];
    for (int j = part.col_start; j < col_end; ++j) {
      total[j] = overwrite ? sums[j - part.col_start] : total[j] + sums[j - part.col_start];
    }
  }
}

template <class Visit>
void walk_all(const ShareOrder<kCluster>& order, Visit visit) {
  // The last cluster first: parts of an item may be added in any order.
  for (int cluster = order.clusters - 1; cluster >= 0; --cluster) {
    for (ShareWalk<kCluster> walk(order, cluster); walk.valid(); walk.advance()) visit(walk.part());
  }
}

}  // namespace

const char* both_products(const ProductArguments& arguments, void*) {
  const ProductSpace space = arguments.space();
  auto order = ShareOrder<kCluster>::of(space);
  order.deal(std::min(kClusters, order.num_items()));
  bool overwrites[kProducts];
  for (int p = 0; p < kProducts; ++p) {
    overwrites[p] = arguments.overwrites(p, order.splits());
    for (int i = 0; arguments.zeroes(p, order.splits()) && i < space.heights[p]; ++i) {
      std::fill_n(arguments.totals[p] + i * arguments.total_strides[p], space.dim, 0.0f);
    }
  }
  walk_all(order, [&](const Part& part) {
    for (int block = 0; block < kCluster; ++block) {
      add_tile(arguments, space, part, part.row_start + block * kTile, overwrites[part.product]);
    }
  });
  return nullptr;
}

}  // namespace gapkernels

// ---- for the test of the order of parts alone -----------------------------------------------------------------------

namespace {

template <int kCluster>
int shares_of(const gapkernels::ProductSpace& space, int clusters, int* out, int room, int* longest, bool* splits) {
  auto order = gapkernels::ShareOrder<kCluster>::of(space);
  order.deal(clusters);
  *longest = order.longest();
  *splits = order.splits();
  int count = 0;
  for (int cluster = 0; cluster < clusters; ++cluster) {
    for (gapkernels::ShareWalk<kCluster> walk(order, cluster); walk.valid(); walk.advance(), ++count) {
      if (count >= room) continue;
      const gapkernels::Part& part = walk.part();
      const int values[] = {cluster, part.product, part.row_start, part.col_start, part.first_step, part.steps};
      std::copy(std::begin(values), std::end(values), out + 6 * count);
    }
  }
  return count;
}

}  // namespace

// Writes six numbers of each part, at most `room` parts; returns how many there are.
extern "C" int gapkernels_shares(int rows, int cols, int dim, bool of_rows, bool of_cols, int clusters, int height,
                                 int* out, int room, int* longest, bool* splits) {
  const gapkernels::ProductSpace space{{of_rows ? rows : 0, of_cols ? cols : 0}, {cols, rows}, dim};
  return height == 1 ? shares_of<1>(space, clusters, out, room, longest, splits)
                     : shares_of<2>(space, clusters, out, room, longest, splits);
}
