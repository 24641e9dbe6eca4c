// Which tile comes when. Plain integer arithmetic: the kernels and the tests on the CPU run the same code.
//
// Work is dealt out in items: one column of tiles, as many tiles high as a cluster has blocks. Items of all matrices of
// a launch are numbered through; cluster c of C takes c, c + C, c + 2C, …
//
//     item numbers   | matrix 0 | matrix 1 | … | triangle |
//     in a matrix    groups of kGroup items walk along the columns together, so that what runs at one time shares
//                    operands in the L2 cache
//     in a triangle  as many columns as a group is high meet the diagonal: there a column from the left and the one as
//                    far from the right hold one number of items together; what is right of them is whole. The group g
//                    from above and the one g from below together have one length, so that a number becomes a tile by
//                    divisions. The last group, perhaps incomplete, comes at the end; its missing items are skipped.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GAPKERNELS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GAPKERNELS_HOST_DEVICE inline
#endif

namespace gapkernels {

constexpr int kTile = 128;      // rows of a tile, and its columns unless it is wide
constexpr int kWideTile = 256;  // columns of a wide one
constexpr int kDepth = 64;      // of a step of the products: a row of the swizzle's pattern, 128 bytes
constexpr int kGroup = 8;
constexpr int kConsumers = 2;  // warpgroups of a block that compute
constexpr int kGroupThreads = 128;

GAPKERNELS_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Who computes a tile: a team of one warpgroup, or of two where it is wide. Each thread has 128 accumulators.
//
//     128×128   two instructions of 64 rows, one below the other
//     128×256   one instruction of 64 rows for each of two warpgroups
template <int kWidth>
struct Teams {
  static constexpr int kMembers = kWidth / kTile;  // warpgroups of a team
  static constexpr int kTeams = kConsumers / kMembers;
  static constexpr int kHalves = 2 / kMembers;     // instructions for each warpgroup
  static constexpr int kGroupRows = 64 * kHalves;  // of a warpgroup
  static constexpr int kRowsPerThread = 2 * kHalves;
  static constexpr int kColsPerThread = kWidth / 4;
};

// The number of a warpgroup's part of a tile, which begins at these entries, among all of a matrix; how many there are.
template <int kWidth>
GAPKERNELS_HOST_DEVICE int part_number(int row_start, int col_start, int num_cols) {
  return row_start / Teams<kWidth>::kGroupRows * ceil_div(num_cols, kWidth) + col_start / kWidth;
}

template <int kWidth>
int64_t num_parts(int num_rows, int num_cols) {
  return static_cast<int64_t>(ceil_div(num_rows, Teams<kWidth>::kGroupRows)) * ceil_div(num_cols, kWidth);
}

// Division by a number that is known before the launch, as a multiplication: for 0 ≤ n < 2^31, b = ⌈log2 d⌉ and
// m = ⌈2^(31 + b) / d⌉ the quotient n / d is n·m / 2^(31 + b), rounded down. A division by a variable costs a device about
// forty instructions one after the other.
struct Divisor {
  unsigned divisor;
  unsigned multiplier;
  unsigned shift;

  static Divisor of(int number) {
    const uint64_t divisor = static_cast<uint64_t>(number);
    unsigned bits = 0;
    while (uint64_t{1} << bits < divisor) ++bits;
    if (bits == 0) return {1, 0, 0};
    return {static_cast<unsigned>(divisor),
            static_cast<unsigned>(((uint64_t{1} << (31 + bits)) + divisor - 1) / divisor), bits - 1};
  }

  GAPKERNELS_HOST_DEVICE int divide(int number) const {
    const unsigned high = static_cast<unsigned>(static_cast<uint64_t>(static_cast<unsigned>(number)) * multiplier >> 32);
    return divisor == 1 ? number : static_cast<int>(high >> shift);
  }
};

// What a launch walks over: matrices of one shape, some of them symmetric.
struct TileSpace {
  int num_rows;
  int num_cols;
  int num_matrices;
  unsigned symmetric;  // bit m: matrix m is walked above its diagonal only

  GAPKERNELS_HOST_DEVICE bool is_symmetric(int matrix) const { return symmetric >> matrix & 1; }
};

struct Item {
  int matrix;
  int row_start;  // of the first tile of the cluster; tile r begins at row_start + r·kTile
  int col_start;
  // What a walk along rows that stay (strips.h) adds: which panel of rows the item has, counted by the cluster from
  // zero, whether it is the panel's first item, and how many of the panel's items are left, this one included.
  int panel = 0;
  bool first = true;
  int left = 1;
};

// The numbering of a space, with everything that does not depend on the item found out before the launch.
template <int kCluster, int kWidth>
struct TileOrder {
  static constexpr int kHeight = kCluster * kTile;                 // rows of an item
  static constexpr int kColsPerGroup = kGroup * kHeight / kWidth;  // column tiles as wide as a group is high
  // Items of a column that meets the diagonal and of its counterpart: one more than a group has, or two where an item
  // is twice as wide as high.
  static constexpr int kPairItems = kGroup + (kWidth > kHeight ? kWidth / kHeight : 1);
  static constexpr int kDiagonalItems = kPairItems * kColsPerGroup / 2;  // of a group, where it meets the diagonal

  TileSpace space;
  int cols;            // tiles in a row
  int rows;            // items in a column
  int whole_items;     // of a matrix
  int triangle_items;  // of a symmetric one
  int full_groups;     // of a triangle: all but the last
  int fold_items;      // of a triangle: those of the full groups
  Divisor group_width;   // items of a group of a matrix
  Divisor last_height;   // of the last group of a matrix
  Divisor fold_width;    // items of two groups of a triangle that have one length together
  int clusters = 1;      // that share the items

  static TileOrder of(const TileSpace& space) {
    TileOrder order{};
    order.space = space;
    order.cols = ceil_div(space.num_cols, kWidth);
    order.rows = ceil_div(space.num_rows, kHeight);
    order.whole_items = order.rows * order.cols;
    const int full = ceil_div(space.num_rows, kHeight * kGroup) - 1, side = ceil_div(space.num_rows, kWidth);
    order.full_groups = full;
    order.fold_items = full * kDiagonalItems + kGroup * (full * side - kColsPerGroup * ((full + 1) * full / 2));
    order.triangle_items = order.fold_items + kDiagonalItems;
    order.group_width = Divisor::of(kGroup * order.cols);
    order.last_height = Divisor::of(order.rows - (order.rows - 1) / kGroup * kGroup);
    order.fold_width = Divisor::of(2 * kDiagonalItems + kGroup * (2 * side - kColsPerGroup * (full + 1)));
    return order;
  }

  GAPKERNELS_HOST_DEVICE int items_of_matrix(int matrix) const {
    return space.is_symmetric(matrix) ? triangle_items : whole_items;
  }

  GAPKERNELS_HOST_DEVICE int num_items() const {
    int total = 0;
    for (int m = 0; m < space.num_matrices; ++m) total += items_of_matrix(m);
    return total;
  }

  void deal(int num_clusters) { clusters = num_clusters; }

  GAPKERNELS_HOST_DEVICE Item whole(int matrix, int number) const {
    const int first = group_width.divide(number) * kGroup;
    const int inside = number - first * cols;
    const bool is_full = rows - first >= kGroup;
    const int height = is_full ? kGroup : static_cast<int>(last_height.divisor);
    const int col = is_full ? inside / kGroup : last_height.divide(inside);
    return {matrix, (first + inside - col * height) * kHeight, col * kWidth};
  }

  GAPKERNELS_HOST_DEVICE Item triangle(int matrix, int number) const {
    int group = full_groups, inside = number - fold_items;
    if (number < fold_items) {
      group = fold_width.divide(number);
      inside = number - group * static_cast<int>(fold_width.divisor);
      const int in_first = kDiagonalItems + kGroup * (cols - kColsPerGroup * (group + 1));
      if (inside >= in_first) {
        inside -= in_first;
        group = full_groups - 1 - group;
      }
    }
    int row, col;  // in items and tiles, from the group's place on the diagonal
    if (inside < kDiagonalItems) {
      const int pair = inside / kPairItems, position = inside % kPairItems;
      const int in_left = ceil_div((pair + 1) * kWidth, kHeight);  // what begins above the column's last entry
      row = position < in_left ? position : position - in_left;
      col = position < in_left ? pair : kColsPerGroup - 1 - pair;
    } else {
      row = (inside - kDiagonalItems) % kGroup;
      col = kColsPerGroup + (inside - kDiagonalItems) / kGroup;
    }
    return {matrix, (group * kGroup + row) * kHeight, (kColsPerGroup * group + col) * kWidth};
  }

  // Only the last group of a triangle has items that do not.
  GAPKERNELS_HOST_DEVICE bool exists(const Item& item) const {
    return item.row_start < space.num_rows && item.col_start < space.num_cols;
  }
};

// The items of one cluster, in order. Everyone in a cluster, whoever loads and whoever computes, walks the same way.
template <int kCluster, int kWidth>
class TileWalk {
 public:
  GAPKERNELS_HOST_DEVICE TileWalk(const TileOrder<kCluster, kWidth>& order, int cluster)
      : order_(order), number_(cluster - order.clusters), step_(order.clusters), matrix_(0) {
    advance();
  }

  GAPKERNELS_HOST_DEVICE bool valid() const { return matrix_ < order_.space.num_matrices; }
  GAPKERNELS_HOST_DEVICE const Item& item() const { return item_; }

  GAPKERNELS_HOST_DEVICE void advance() {
    do {
      number_ += step_;
      while (valid() && number_ >= order_.items_of_matrix(matrix_)) number_ -= order_.items_of_matrix(matrix_++);
      if (!valid()) return;
      item_ = order_.space.is_symmetric(matrix_) ? order_.triangle(matrix_, number_) : order_.whole(matrix_, number_);
    } while (!order_.exists(item_));
  }

 private:
  const TileOrder<kCluster, kWidth>& order_;
  int number_;  // within the matrix
  int step_;
  int matrix_;
  Item item_;
};

}  // namespace gapkernels
