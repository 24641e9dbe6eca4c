// Products of a block of the gradient with the embeddings, as both_products of the Triton backend takes them:
//
//     totals[0][R, D] += H[R, C]·cols[C, D]        totals[1][C, D] += Hᵀ[C, R]·rows[R, D]
#pragma once

#include "shares.h"
#include "similarity.h"

namespace gapkernels {

// H, rows and columns are of one type, contiguous along their second dimension, 16-byte aligned, strides in elements
// and multiples of eight. What lies beyond their edges does not matter.
struct ProductArguments {
  Element element;
  int num_rows;
  int num_cols;
  int dim;
  const void* h;  // [num_rows, num_cols]
  int64_t h_stride;
  const void* cols;  // [num_cols, dim]
  int64_t col_stride;
  const void* rows;  // [num_rows, dim]
  int64_t row_stride;
  float* totals[kProducts];  // null where not wanted; 16-byte aligned, strides multiples of four
  int64_t total_strides[kProducts];
  bool first[kProducts];  // nothing has been added yet: overwritten, whatever is there

  ProductSpace space() const {
    return {{totals[0] == nullptr ? 0 : num_rows, totals[1] == nullptr ? 0 : num_cols}, {num_cols, num_rows}, dim};
  }

  // Where nothing has been added yet, whole tiles are put. Parts of tiles come in any order: they are added to zeros,
  // which are put there before the launch.
  bool overwrites(int product, bool splits) const { return totals[product] != nullptr && first[product] && !splits; }
  bool zeroes(int product, bool splits) const { return totals[product] != nullptr && first[product] && splits; }
};

// Enqueues on a stream. Returns null, or what went wrong.
const char* both_products(const ProductArguments& arguments, void* stream);

}  // namespace gapkernels
