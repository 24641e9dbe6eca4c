// Which tile comes when. Plain integer arithmetic: the kernels and the tests on the CPU run the same code.
//
// Work is dealt out in items: one column of tiles, kTile wide, as many tiles high as a cluster has blocks. Items of all
// matrices of a launch are numbered through; cluster c of C takes c, c + C, c + 2C, …
//
//     item numbers   | matrix 0 | matrix 1 | … | triangle |
//     in a matrix    groups of kGroup items walk along the columns together, so that what runs at one time shares
//                    operands in the L2 cache
//     in a triangle  as many columns as a group is high meet the diagonal: there a column from the left and the one as
//                    far from the right hold kGroup + 1 items together; what is right of them is whole. The group g
//                    from above and the one g from below together have one length, so that a number becomes a tile by
//                    divisions. The last group, perhaps incomplete, comes at the end; its missing items are skipped.
#pragma once

#if defined(__CUDACC__)
#define GAPKERNELS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GAPKERNELS_HOST_DEVICE inline
#endif

namespace gapkernels {

constexpr int kTile = 128;  // rows and columns of a tile
constexpr int kGroup = 8;

GAPKERNELS_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// What a launch walks over: matrices of one shape, some of them symmetric.
struct TileSpace {
  int num_rows;
  int num_cols;
  int num_matrices;
  unsigned symmetric;  // bit m: matrix m is walked above its diagonal only
};

struct Item {
  int matrix;
  int row_start;  // of the first tile of the cluster; tile r begins at row_start + r·kTile
  int col_start;
};

template <int kCluster>
struct TileOrder {
  static constexpr int kHeight = kCluster * kTile;             // rows of an item
  static constexpr int kColsPerGroup = kGroup * kCluster;      // column tiles as wide as a group is high

  static constexpr int kDiagonalItems = (kGroup + 1) * kColsPerGroup / 2;  // of a group, where it meets the diagonal

  GAPKERNELS_HOST_DEVICE static int items_of_matrix(const TileSpace& space, int matrix) {
    const int cols = ceil_div(space.num_cols, kTile);
    if (!(space.symmetric >> matrix & 1)) return ceil_div(space.num_rows, kHeight) * cols;
    const int groups = ceil_div(space.num_rows, kHeight * kGroup);
    return groups * kDiagonalItems + kGroup * ((groups - 1) * cols - kColsPerGroup * (groups * (groups - 1) / 2));
  }

  GAPKERNELS_HOST_DEVICE static int num_items(const TileSpace& space) {
    int total = 0;
    for (int m = 0; m < space.num_matrices; ++m) total += items_of_matrix(space, m);
    return total;
  }

  GAPKERNELS_HOST_DEVICE static Item whole(const TileSpace& space, int matrix, int number) {
    const int cols = ceil_div(space.num_cols, kTile), rows = ceil_div(space.num_rows, kHeight);
    const int first = number / (kGroup * cols) * kGroup;
    const int height = rows - first < kGroup ? rows - first : kGroup;
    const int inside = number - first * cols;
    return {matrix, (first + inside % height) * kHeight, inside / height * kTile};
  }

  GAPKERNELS_HOST_DEVICE static Item triangle(const TileSpace& space, int matrix, int number) {
    const int cols = ceil_div(space.num_rows, kTile), groups = ceil_div(space.num_rows, kHeight * kGroup);
    const int full = groups - 1;
    const int per_fold = 2 * kDiagonalItems + kGroup * (2 * cols - kColsPerGroup * groups);
    const int in_folds = full * kDiagonalItems + kGroup * (full * cols - kColsPerGroup * (groups * full / 2));
    int group = full, inside = number - in_folds;
    if (number < in_folds) {
      group = number / per_fold;
      inside = number - group * per_fold;
      const int in_first = kDiagonalItems + kGroup * (cols - kColsPerGroup * (group + 1));
      if (inside >= in_first) {
        inside -= in_first;
        group = full - 1 - group;
      }
    }
    int row, col;  // in items and tiles, from the group's place on the diagonal
    if (inside < kDiagonalItems) {
      const int pair = inside / (kGroup + 1), position = inside % (kGroup + 1), in_left = pair / kCluster + 1;
      row = position < in_left ? position : position - in_left;
      col = position < in_left ? pair : kColsPerGroup - 1 - pair;
    } else {
      row = (inside - kDiagonalItems) % kGroup;
      col = kColsPerGroup + (inside - kDiagonalItems) / kGroup;
    }
    return {matrix, (group * kGroup + row) * kHeight, (kColsPerGroup * group + col) * kTile};
  }

  // Only the last group of a triangle has items that do not.
  GAPKERNELS_HOST_DEVICE static bool exists(const TileSpace& space, const Item& item) {
    return item.row_start < space.num_rows && item.col_start < space.num_cols;
  }
};

// The items of one cluster, in order. Everyone in a cluster, whoever loads and whoever computes, walks the same way.
template <int kCluster>
class TileWalk {
 public:
  GAPKERNELS_HOST_DEVICE TileWalk(const TileSpace& space, int cluster, int num_clusters)
      : space_(space), next_(cluster), step_(num_clusters), matrix_(0), first_(0) {
    advance();
  }

  GAPKERNELS_HOST_DEVICE bool valid() const { return matrix_ < space_.num_matrices; }
  GAPKERNELS_HOST_DEVICE const Item& item() const { return item_; }

  GAPKERNELS_HOST_DEVICE void advance() {
    using Order = TileOrder<kCluster>;
    while (matrix_ < space_.num_matrices) {
      const int items = Order::items_of_matrix(space_, matrix_);
      if (next_ - first_ >= items) {
        first_ += items;
        ++matrix_;
        continue;
      }
      const bool symmetric = space_.symmetric >> matrix_ & 1;
      const int number = next_ - first_;
      item_ = symmetric ? Order::triangle(space_, matrix_, number) : Order::whole(space_, matrix_, number);
      next_ += step_;
      if (Order::exists(space_, item_)) return;
    }
  }

 private:
  const TileSpace& space_;
  int next_;
  int step_;
  int matrix_;
  int first_;
  Item item_;
};

}  // namespace gapkernels
