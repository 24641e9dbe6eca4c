// Which tile comes when, where the rows of a tile stay in shared memory: along the columns as far as possible, since
// every change of rows loads a panel of them. Plain integer arithmetic like tiles.h, for the kernels and for the CPU.
//
//     strip in a matrix      one item high, from the first column tile to the last
//     strip in a triangle    the item row r from above and the one r from below, each from the diagonal on: all have one
//                            length together; an odd number of rows leaves a middle one, half as long
//     order                  all strips of all matrices, numbered through; C clusters take a whole strip each, in step,
//                            so that what they read of the columns at one time is the same; when fewer than C strips
//                            are left these are cut into C shares of one length
#pragma once

#include "tiles.h"

namespace gapkernels {

template <int kCluster>
struct StripOrder {
  static constexpr int kHeight = kCluster * kTile;  // rows of an item

  TileSpace space;
  int cols;          // tiles in a row
  int rows;          // items in a column
  int clusters = 1;  // that share the items
  int rounds = 0;    // of whole strips, one for each cluster
  int share = 0;     // items of the strips that are left: so many for a cluster, and one more for the first `larger`
  int larger = 0;

  static StripOrder of(const TileSpace& space) {
    StripOrder order{};
    order.space = space;
    order.cols = ceil_div(space.num_cols, kTile);
    order.rows = ceil_div(space.num_rows, kHeight);
    return order;
  }

  void deal(int num_clusters) {
    clusters = num_clusters;
    rounds = num_strips() / clusters;
    const int rest = num_items() - items_of_first(rounds * clusters);
    share = rest / clusters;
    larger = rest % clusters;
  }

  GAPKERNELS_HOST_DEVICE int strips(int matrix) const { return space.is_symmetric(matrix) ? (rows + 1) / 2 : rows; }

  // Where a row begins: in a triangle at the diagonal.
  GAPKERNELS_HOST_DEVICE int first_col(int matrix, int row) const {
    return space.is_symmetric(matrix) ? kCluster * row : 0;
  }

  // The other row of a triangle's strip; the same one if there is none.
  GAPKERNELS_HOST_DEVICE int second_row(int matrix, int strip) const {
    return space.is_symmetric(matrix) ? rows - 1 - strip : strip;
  }

  GAPKERNELS_HOST_DEVICE int length(int matrix, int strip) const {
    const int second = second_row(matrix, strip), first_length = cols - first_col(matrix, strip);
    return second == strip ? first_length : first_length + cols - first_col(matrix, second);
  }

  int num_strips() const {
    int total = 0;
    for (int m = 0; m < space.num_matrices; ++m) total += strips(m);
    return total;
  }

  int num_items() const { return items_of_first(num_strips()); }

 private:
  // All strips of a matrix but the last, the middle one of a triangle, have one length.
  int items_of_first(int number) const {
    int total = 0;
    for (int m = 0; m < space.num_matrices && number > 0; ++m) {
      const int taken = number < strips(m) ? number : strips(m);
      total += (taken - 1) * length(m, 0) + length(m, taken - 1);
      number -= taken;
    }
    return total;
  }
};

// The items of one cluster, in order. Everyone in a cluster walks the same way.
template <int kCluster>
class StripWalk {
 public:
  GAPKERNELS_HOST_DEVICE StripWalk(const StripOrder<kCluster>& order, int cluster)
      : order_(order), cluster_(cluster), round_(-1) {
    take();
  }

  GAPKERNELS_HOST_DEVICE bool valid() const { return matrix_ < order_.space.num_matrices; }

  GAPKERNELS_HOST_DEVICE Item item() const {
    const int to_end = order_.cols - col_, left = to_end < left_ ? to_end : left_;
    return {matrix_, row_ * StripOrder<kCluster>::kHeight, col_ * kTile, panel_, first_, left};
  }

  GAPKERNELS_HOST_DEVICE void advance() {
    first_ = false;
    ++col_;
    if (--left_ == 0) {
      take();
    } else if (col_ == order_.cols) {
      const int second = order_.second_row(matrix_, strip_);
      if (row_ != second) {
        begin(second, 0);
      } else {
        next_strip();
        begin(strip_, 0);
      }
    }
  }

 private:
  // The next whole strip, or the share of what is left, or nothing.
  GAPKERNELS_HOST_DEVICE void take() {
    ++round_;
    matrix_ = 0;
    left_ = order_.share + (cluster_ < order_.larger);
    if (round_ > order_.rounds || (round_ == order_.rounds && left_ == 0)) {
      matrix_ = order_.space.num_matrices;
      return;
    }
    strip_ = round_ * order_.clusters + (round_ < order_.rounds ? cluster_ : 0);
    skip_matrices();
    if (round_ < order_.rounds) {
      left_ = order_.length(matrix_, strip_);
      begin(strip_, 0);
      return;
    }
    int before = cluster_ * order_.share + (cluster_ < order_.larger ? cluster_ : order_.larger);
    while (before >= order_.length(matrix_, strip_)) {
      before -= order_.length(matrix_, strip_);
      next_strip();
    }
    const int first_length = order_.cols - order_.first_col(matrix_, strip_);
    if (before < first_length) begin(strip_, before);
    else begin(order_.second_row(matrix_, strip_), before - first_length);
  }

  GAPKERNELS_HOST_DEVICE void begin(int row, int after) {
    row_ = row;
    col_ = order_.first_col(matrix_, row) + after;
    ++panel_;
    first_ = true;
  }

  GAPKERNELS_HOST_DEVICE void next_strip() {
    ++strip_;
    skip_matrices();
  }

  GAPKERNELS_HOST_DEVICE void skip_matrices() {
    while (strip_ >= order_.strips(matrix_)) strip_ -= order_.strips(matrix_++);
  }

  const StripOrder<kCluster>& order_;
  int cluster_;
  int round_;       // how many strips or shares were taken before
  int matrix_ = 0;
  int strip_ = 0;   // within the matrix
  int row_ = 0;     // items
  int col_ = 0;     // tiles
  int left_ = 0;    // items of what was taken
  int panel_ = -1;  // rows begun so far, less one
  bool first_ = true;
};

}  // namespace gapkernels
