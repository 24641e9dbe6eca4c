// The two kernels in plain C++: what runs around the tensor cores, on the CPU. Order of tiles, masks, formulas of the
// entries, fragments of a warpgroup and the reduction of columns are the kernels' own code; only inner products are
// plain loops, and the threads of a block take turns.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "entries.h"
#include "fragments.h"
#include "launch_checks.h"
#include "similarity.h"
#include "sixteen_bits.h"
#include "strips.h"

namespace gapkernels {
namespace {

constexpr int kCluster = 2;

// ⟨a_i, b_j⟩ of a tile, zero past the edges, as the copy engine fills operands there.
template <int kWidth>
struct Products {
  std::vector<float> values;

  Products(const Matrix& matrix, Element element, int num_rows, int num_cols, int dim, int row_start, int col_start)
      : values(kTile * kWidth) {
    const std::vector<float> a = read(matrix.rows, matrix.row_stride, element, row_start, kTile, num_rows, dim);
    const std::vector<float> b = read(matrix.cols, matrix.col_stride, element, col_start, kWidth, num_cols, dim);
    for (int i = 0; i < kTile; ++i) {
      for (int j = 0; j < kWidth; ++j) {
        float sum = 0.0f;
        for (int k = 0; k < dim; ++k) sum += a[i * dim + k] * b[j * dim + k];
        values[i * kWidth + j] = sum;
      }
    }
  }

  static std::vector<float> read(const void* data, int64_t stride, Element element, int start, int count, int end,
                                 int dim) {
    std::vector<float> operand(static_cast<size_t>(count) * dim);
    for (int i = 0; i < count && start + i < end; ++i) {
      for (int k = 0; k < dim; ++k) operand[i * dim + k] = load(data, (start + i) * stride + k, element);
    }
    return operand;
  }

  float operator()(int i, int j) const { return values[i * kWidth + j]; }
};

// Sums of the columns of a tile, from what each of a warp's lanes holds.
template <int kCols>
void reduce_columns(float (&sums)[32][kCols], float* out) {
  using Reduction = ColumnReduction<kCols>;
  auto exchange = [&](auto half, int distance) {
    constexpr int kHalf = decltype(half)::value;
    float sent[32][kHalf];
    for (int lane = 0; lane < 32; ++lane) Reduction::split(sums[lane], sent[lane], lane, distance);
    for (int lane = 0; lane < 32; ++lane) {
      for (int q = 0; q < kHalf; ++q) sums[lane][q] += sent[lane ^ distance][q];
    }
  };
  exchange(std::integral_constant<int, kCols / 2>{}, 16);
  exchange(std::integral_constant<int, kCols / 4>{}, 8);
  exchange(std::integral_constant<int, kCols / 8>{}, 4);
  for (int lane = 0; lane < 32; ++lane) {
    for (int q = 0; q < Reduction::kLeft; ++q) out[Reduction::col(lane, q)] += sums[lane][q];
  }
}

// Of 32 columns and the eight rows that a warp has of them, from what each lane holds.
void keep_entries(const Kept& kept, const StatsArguments& arguments, int row, int col, const uint32_t (*packed)[32]) {
  uint32_t words[32][QuadTranspose::kWords], given[32];
  for (int lane = 0; lane < 32; ++lane) {
    for (int k = 0; k < QuadTranspose::kWords; ++k) words[lane][k] = packed[k][lane];
  }
  for (int distance : {1, 2}) {
    for (int e = 0; e < 2; ++e) {
      for (int lane = 0; lane < 32; ++lane) given[lane] = QuadTranspose::give(words[lane], lane, distance, e);
      for (int lane = 0; lane < 32; ++lane) QuadTranspose::take(words[lane], lane, distance, e, given[lane ^ distance]);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int i = row + lane / 4, j = col + 8 * (lane % 4);
    if (i >= arguments.num_rows || j >= arguments.num_cols) continue;
    std::memcpy(static_cast<uint16_t*>(kept.entries) + i * kept.stride + j, words[lane], sizeof(words[lane]));
  }
}

template <int kWidth, bool kBiased>
void stats_tile(const StatsArguments& arguments, const Matrix& matrix, int m, int row_start, int col_start) {
  using Tiling = Teams<kWidth>;
  const Products<kWidth> products(matrix, arguments.element, arguments.num_rows, arguments.num_cols, arguments.dim,
                                  row_start, col_start);
  const float scale = load_scale(matrix.scale, matrix.scale_is_double);
  const float* largest = arguments.largest == nullptr ? nullptr : arguments.largest + m;
  const float shift = constant_shift(scale, largest, kBiased, arguments.headroom);
  const Mask mask{arguments.num_rows, arguments.num_cols, arguments.diagonal, matrix.symmetric};
  const bool masked = mask.needed(row_start, col_start, kWidth);
  const Kept& kept = arguments.kept[m];
  float row_sums[kTile] = {}, col_sums[kWidth] = {};
  for (int warp = 0; warp < Tiling::kMembers * kGroupThreads / 32; ++warp) {
    float of_lanes[32][Tiling::kColsPerThread] = {};
    uint32_t words[Tiling::kRowsPerThread][Tiling::kColsPerThread / 2][32];
    for (int lane = 0; lane < 32; ++lane) {
      const int thread = 32 * warp + lane;
      for (int r = 0; r < Tiling::kRowsPerThread; ++r) {
        const int row = fragment_row(thread, r / 2, r % 2), i = row_start + row;
        const float term = row_term<kBiased>(i < arguments.num_rows ? matrix.row_factors[i] : 0.0f, scale);
        const RowMask counted = mask.row(i, col_start + fragment_col(thread, 0, 0));
        for (int n = 0; n < Tiling::kColsPerThread / 2; ++n) {
          float entries[2];
          for (int b = 0; b < 2; ++b) {
            const int col = fragment_col(thread, n, b), j = col_start + col;
            const float factor = j < arguments.num_cols ? matrix.col_factors[j] : 0.0f;
            float entry = fast_exp2(exponent<kBiased>(products(row, col), term, factor, scale, shift));
            if (masked && !counted.counts(fragment_col(0, n, b))) entry = 0.0f;
            row_sums[row] += entry;
            of_lanes[lane][2 * n + b] += entry;
            entries[b] = entry;
          }
          words[r][n][lane] = pack_bfloat16(entries[0], entries[1]);
        }
      }
    }
    reduce_columns(of_lanes, col_sums);
    if (kept.entries == nullptr) continue;
    for (int r = 0; r < Tiling::kRowsPerThread; ++r) {
      for (int n = 0; n < Tiling::kColsPerThread / 2; n += 4) {
        const int row = row_start + fragment_row(32 * warp, r / 2, r % 2), col = col_start + fragment_col(0, n, 0);
        keep_entries(kept, arguments, row, col, &words[r][n]);
      }
    }
  }
  float* rows = arguments.row_sums + static_cast<int64_t>(m) * arguments.num_rows;
  float* cols = matrix.symmetric ? rows : arguments.col_sums + static_cast<int64_t>(m) * arguments.num_cols;
  for (int i = 0; i < kTile && row_start + i < arguments.num_rows; ++i) rows[row_start + i] += row_sums[i];
  for (int j = 0; j < kWidth && col_start + j < arguments.num_cols; ++j) cols[col_start + j] += col_sums[j];
}

// One tile of H; kBiased: of centroids.
template <int kWidth, bool kBiased, Form kForm>
void grad_tile_of(const GradArguments& arguments, int row_start, int col_start, float middle) {
  const Matrix& matrix = arguments.matrix;
  const Products<kWidth> products(matrix, arguments.element, arguments.num_rows, arguments.num_cols, arguments.dim,
                                  row_start, col_start);
  const float scale = load_scale(matrix.scale, matrix.scale_is_double);
  const float shift = *arguments.reference + (kBiased || kForm == Form::kTwo ? 0.0f : middle);
  const Mask mask{arguments.num_rows, arguments.num_cols, arguments.diagonal, false};
  const bool masked = mask.needed(row_start, col_start, kWidth);
  for (int i = row_start; i < std::min(row_start + kTile, arguments.num_rows); ++i) {
    float moment = 0.0f;  // of as many entries as a thread of the kernel adds up
    const RowMask counted = mask.row(i, col_start);
    const float term = row_term<kBiased>(matrix.row_factors[i], scale);
    const float row_factor = matrix.row_factors[i] * arguments.unit;
    for (int j = col_start; j < std::min(col_start + kWidth, arguments.num_cols); ++j) {
      const float col_factor = matrix.col_factors[j];
      float x = exponent<kBiased>(products(i - row_start, j - col_start), term, col_factor, scale, shift);
      if (masked && !counted.counts(j - col_start)) x = -INFINITY;
      float value = fast_exp2(x);
      if (!kBiased) {
        value = pair_gradient<kForm>(x, middle, share<kForm>(arguments.row_log_sums[i], middle, row_factor), row_factor,
                                     share<kForm>(arguments.col_log_sums[j], middle, col_factor), col_factor, moment);
      }
      store(arguments.out, i * arguments.out_stride + j, arguments.element, value);
    }
    if (arguments.scale_partials == nullptr) continue;
    arguments.scale_partials[part_number<kWidth>(i, col_start, arguments.num_cols)] += moment;
  }
}

template <int kWidth>
void grad_tile(const GradArguments& arguments, int row_start, int col_start) {
  if (arguments.matrix.biased) {
    grad_tile_of<kWidth, true, Form::kFactored>(arguments, row_start, col_start, 0.0f);
    return;
  }
  LogSumRange range{INFINITY, -INFINITY};
  auto widen = [&](float log_sum) {
    range.smallest = std::fmin(range.smallest, log_sum);
    range.largest = std::fmax(range.largest, log_sum);
  };
  for (int i = row_start; i < std::min(row_start + kTile, arguments.num_rows); ++i) widen(arguments.row_log_sums[i]);
  for (int j = col_start; j < std::min(col_start + kWidth, arguments.num_cols); ++j) widen(arguments.col_log_sums[j]);
  const Mask mask{arguments.num_rows, arguments.num_cols, arguments.diagonal, false};
  const Form form = form_of(range, mask.needed(row_start, col_start, kWidth), arguments.scale_partials != nullptr);
  const auto tile_of = form == Form::kTwo      ? grad_tile_of<kWidth, false, Form::kTwo>
                       : form == Form::kMoment ? grad_tile_of<kWidth, false, Form::kMoment>
                                               : grad_tile_of<kWidth, false, Form::kFactored>;
  tile_of(arguments, row_start, col_start, range.middle());
}

// All tiles as three clusters on the device would walk them, one cluster after the other.
template <class Order, class Walk, class Visit>
void walk_all(const TileSpace& space, Visit visit) {
  constexpr int kClusters = 3;
  Order order = Order::of(space);
  order.deal(kClusters);
  for (int cluster = 0; cluster < kClusters; ++cluster) {
    for (Walk walk(order, cluster); walk.valid(); walk.advance()) {
      for (int block = 0; block < kCluster; ++block) {
        const Item item = walk.item();
        visit(item.matrix, item.row_start + block * kTile, item.col_start);
      }
    }
  }
}

// visit(width of a tile as a type, matrix, its first row and column)
template <class Visit>
void walk_all(const TileSpace& space, Variant variant, Visit visit) {
  auto of_width = [&](auto width) {
    return [&visit, width](int matrix, int row, int col) { visit(width, matrix, row, col); };
  };
  const auto usual = of_width(std::integral_constant<int, kTile>{});
  switch (variant) {
    case Variant::kResident: return walk_all<StripOrder<kCluster>, StripWalk<kCluster>>(space, usual);
    case Variant::kWide:
      return walk_all<TileOrder<kCluster, kWideTile>, TileWalk<kCluster, kWideTile>>(
          space, of_width(std::integral_constant<int, kWideTile>{}));
    default: return walk_all<TileOrder<kCluster, kTile>, TileWalk<kCluster, kTile>>(space, usual);
  }
}

}  // namespace

const char* similarity_stats(const StatsArguments& arguments, void*) {
  TileSpace space{arguments.num_rows, arguments.num_cols, arguments.num_matrices, 0};
  for (int m = 0; m < arguments.num_matrices; ++m) {
    space.symmetric |= static_cast<unsigned>(arguments.matrices[m].symmetric) << m;
  }
  walk_all(space, arguments.variant, [&](auto width, int m, int row_start, int col_start) {
    constexpr int kWidth = decltype(width)::value;
    const Matrix& matrix = arguments.matrices[m];
    const auto tile = matrix.biased ? stats_tile<kWidth, true> : stats_tile<kWidth, false>;
    tile(arguments, matrix, m, row_start, col_start);
  });
  return nullptr;
}

const char* similarity_grad(const GradArguments& arguments, void*) {
  const TileSpace space{arguments.num_rows, arguments.num_cols, 1, 0};
  walk_all(space, arguments.variant, [&](auto width, int, int row_start, int col_start) {
    if (row_start < arguments.num_rows) grad_tile<decltype(width)::value>(arguments, row_start, col_start);
  });
  return nullptr;
}

}  // namespace gapkernels

// ---- for the test of the order of tiles alone -----------------------------------------------------------------------

namespace {

struct WalkRequest {
  gapkernels::TileSpace space;
  gapkernels::Variant variant;
  int cluster;
  int num_clusters;
  int* out;
  int room;

  template <int kHeight>
  int of_height() const {
    using namespace gapkernels;
    switch (variant) {
      case Variant::kResident: return run<StripOrder<kHeight>, StripWalk<kHeight>>();
      case Variant::kWide: return run<TileOrder<kHeight, kWideTile>, TileWalk<kHeight, kWideTile>>();
      default: return run<TileOrder<kHeight, kTile>, TileWalk<kHeight, kTile>>();
    }
  }

 private:
  template <class Order, class Walk>
  int run() const {
    Order order = Order::of(space);
    order.deal(num_clusters);
    int count = 0;
    for (Walk walk(order, cluster); walk.valid(); walk.advance(), ++count) {
      if (count >= room) continue;
      const gapkernels::Item item = walk.item();
      const int values[6] = {item.matrix, item.row_start, item.col_start, item.panel, item.first, item.left};
      std::memcpy(out + 6 * count, values, sizeof(values));
    }
    return count;
  }
};

}  // namespace

// Writes six numbers of each of one cluster's items, at most `room` items; returns how many there are.
extern "C" int gapkernels_walk(int num_rows, int num_cols, int num_matrices, unsigned symmetric, int cluster,
                               int num_clusters, int height, int variant, int* out, int room) {
  using namespace gapkernels;
  const WalkRequest request{{num_rows, num_cols, num_matrices, symmetric}, static_cast<Variant>(variant), cluster,
                            num_clusters, out, room};
  return height == 1 ? request.of_height<1>() : request.of_height<2>();
}

// ---- for the tests of arithmetic and checks alone
// --------------------------------------------------------------------

extern "C" int gapkernels_quotient(int number, int divisor) { return gapkernels::Divisor::of(divisor).divide(number); }

extern "C" const char* gapkernels_driver_problem(int version) { return gapkernels::driver_problem(version); }

extern "C" bool gapkernels_is_encoded(const void* descriptor, size_t bytes) {
  return gapkernels::is_encoded(descriptor, bytes);
}
