// The interface between the binding and the kernels: pointers, sizes and strides, neither torch nor CUTLASS.
//
// A matrix of exponentials has entries e_ij = 2^x_ij. With raw inner products ⟨a_i, b_j⟩ of its rows and columns,
//
//     pair of modalities   x_ij = s·log2 e·⟨a_i, b_j⟩·f_i·g_j          f, g: inverse norms
//     centroids            x_ij = s·log2 e·⟨a_i, b_j⟩ + f_i + g_j      f, g: biases ("biased")
//
// Row and column sums leave out the diagonal, the entries with j = i + diagonal.
#pragma once

#include <cstdint>

namespace gapkernels {

enum class Element : int { kBFloat16, kFloat16 };

// How a kernel comes by its operands and who computes a tile; the results are the same.
//
//     kStreamed   tiles of 128×128, both operands copied for every tile
//     kResident   tiles of 128×128, rows stay in shared memory for a walk along the columns, instead of being copied
//                 again for every tile; dim must not exceed kLargestResidentDim
//     kWide       tiles of 128×256, both operands copied for every tile
enum class Variant : int { kStreamed, kResident, kWide };
constexpr int kVariants = 3;

constexpr int kMaxMatrices = 8;  // of one launch; their copy descriptors travel as a kernel argument
constexpr int kLargestResidentDim = 512;  // a panel of 128 rows of this length takes 128 KiB of shared memory

// One matrix. Rows are [num_rows, dim], columns [num_cols, dim], contiguous along dim, 16-byte aligned, strides in
// elements and multiples of eight.
struct Matrix {
  const void* rows;
  int64_t row_stride;
  const float* row_factors;  // [num_rows]
  const void* cols;
  int64_t col_stride;
  const float* col_factors;  // [num_cols]
  const void* scale;         // s, one number
  bool scale_is_double;
  bool biased;
  bool symmetric;  // rows and columns are the same: entries above the diagonal count for their row and their column
};

// Where the entries of a matrix are kept, in bfloat16: [num_rows, num_cols], 16-byte aligned, stride in entries and a
// multiple of eight. A row is written to the next multiple of eight.
struct Kept {
  void* entries;  // null for nothing
  int64_t stride;
};

// row_sums[m][i] += Σ_j 2^(x_ij − shift), col_sums[m][j] += Σ_i 2^(x_ij − shift); a symmetric matrix has all of its
// sums in row_sums. shift = max(0, bound of x − headroom): zero if biased, else the bound is s·log2 e·largest[m]. The entries
// 2^(x_ij − shift) of a pair, its diagonal zero, may be kept.
struct StatsArguments {
  Matrix matrices[kMaxMatrices];
  Kept kept[kMaxMatrices];
  int num_matrices;
  Element element;
  Variant variant;
  int num_rows;
  int num_cols;
  int dim;
  int diagonal;
  float headroom;
  const float* largest;  // [num_matrices], or null for unit vectors
  float* row_sums;       // [num_matrices, num_rows]
  float* col_sums;       // [num_matrices, num_cols]
};

// One block of the gradient with respect to the inner products, its diagonal zero; ref is *reference, h is unit:
//
//     pair        H_ij = h·(2^(x_ij − ref − L_i) + 2^(x_ij − ref − M_j))·f_i·g_j        L, M: row and column log sums
//     centroids   H_ij = 2^(x_ij − ref)
//
// scale_partials[tile] += Σ_ij of the tile (H_ij / (h·f_i·g_j))·(x_ij − ref), if not null; of half a tile where it is
// wide, which is 64 rows.
struct GradArguments {
  Matrix matrix;
  Element element;
  Variant variant;
  int num_rows;
  int num_cols;
  int dim;
  int diagonal;
  float unit;
  const float* reference;     // one number
  const float* row_log_sums;  // [num_rows], null for centroids
  const float* col_log_sums;  // [num_cols]
  double* scale_partials;     // [num_parts()], see tiles.h
  void* out;                  // [num_rows, num_cols], of the operands' type, 16-byte aligned
  int64_t out_stride;
};

// Enqueue on a stream. Return null, or what went wrong.
const char* similarity_stats(const StatsArguments& arguments, void* stream);
const char* similarity_grad(const GradArguments& arguments, void* stream);

// What these call for other variants than the first; each is a file of its own, which compile side by side.
const char* similarity_stats_resident(const StatsArguments& arguments, void* stream);
const char* similarity_stats_wide(const StatsArguments& arguments, void* stream);
const char* similarity_grad_resident(const GradArguments& arguments, void* stream);
const char* similarity_grad_wide(const GradArguments& arguments, void* stream);

}  // namespace gapkernels
