// What the kernels work on: plain views of tensors that the binding has checked.
#pragma once

#include <cstdint>

#include "library.h"

enum class Type { bf16, f16, f32, f64 };

// Numbers of one type along a row, rows `stride` numbers apart.
struct Rows {
    const void* data;
    Type type;
    int64_t count, dim, stride;
};

constexpr int64_t no_diagonal = -(int64_t{1} << 30);

// A matrix of exponentials 2^x, without its diagonal; see gapkernels/backends/contract.py.
//
//     pairs        x_ij = scale·log2 e·⟨rows_i, cols_j⟩·row_factor_i·col_factor_j
//     centroids    x_ij = scale·log2 e·⟨rows_i, cols_j⟩ + row_factor_i + col_factor_j     (biased)
//
// Factors are float, or double where the rows are; null stands for ones. Entries whose ids are equal are left out, and
// those that exceed a limit, of their row's or of their column's sums; null stands for none.
struct Matrix {
    Rows rows, cols;
    const void *row_factor, *col_factor;
    double scale;    // times log2 e
    double largest;  // no exponent of the matrix exceeds it
    int64_t diagonal;
    bool biased, symmetric;
    const int64_t *row_ids, *col_ids;
    const double *row_limit, *col_limit;
    void* entries;         // tiles of inner products kept by the sums, see KeptTiles; null for none
    int64_t kept_entries;  // how many numbers
};

// What products accumulate in.
template <class T>
struct AccumulatorOf {
    using type = T;
};
template <>
struct AccumulatorOf<Bf16> {
    using type = float;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
