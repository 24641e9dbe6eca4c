// One tile of inner products, and the exponents made from it; shared by the sums and by the gradient.
//
//     rows of A  ──┐
//                  ├─ product ─► S [tile_rows, 64] in L1 ─► x_ij = S_ij·row_i·col_j + shift_j     pairs
//     panel of Bᵀ ─┘                                             S_ij·scale + row_i + shift_j      centroids
//
// Columns past the end have S = 0, col = 0 and shift = −∞: their exponentials are zero without a mask. Entries that do
// not count, the diagonal's, those below it of a symmetric matrix and those of equal ids, get S = −∞.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "kernels.h"
#include "pack.h"

constexpr int64_t tile_rows = 128;

template <class A>
constexpr A infinity = std::numeric_limits<A>::infinity();

// The operands of a matrix's inner products, as a sum of one or three products of operands of type T: numbers of more
// digits are split in two, and high·low, low·high follow high·high.
template <class T>
struct Operands {
    struct Factor {
        const T* rows;
        const T* panels;  // pack_transposed
    };
    Factor factors[3];
    int count;
    int64_t stride;  // of rows
    const T* cols;   // those of the first product, as rows of numbers
    int64_t col_stride;
    int64_t num_rows, num_cols, dim;
};

// Factors of rows and columns with everything folded in, in the type of the exponents.
template <class A>
struct Exponents {
    const A* row;    // [n] scale·row_factor, or biases
    const A* col;    // [⌈N⌉64] col_factor; not used for centroids
    const A* shift;  // [⌈N⌉64] what is added along columns: −reference, or bias − reference; −∞ past the end
    A scale;
};

template <class T>
void inner_products(const Operands<T>& operands, int64_t row, int64_t height, int64_t panel, int64_t width,
                    Accumulator<T>* s) {
    for (int f = 0; f < operands.count; ++f) {
        product(height, width, operands.dim, operands.factors[f].rows + row * operands.stride, operands.stride,
                operands.factors[f].panels + panel * panel_width * operands.dim, panel_width, s, panel_width, f > 0);
    }
}

// Tiles of inner products that the sums leave for the gradient, entries that do not count already left out: those of the
// first rows of the matrix, as many as there is room for. Of a symmetric matrix from the squares on the diagonal on; of
// these the sums see one half and the gradient both.
template <class A>
class KeptTiles {
  public:
    static constexpr int64_t tile_size = tile_rows * panel_width;

    explicit KeptTiles(const Matrix& m)
        : data_(static_cast<A*>(m.entries)),
          symmetric_(m.symmetric),
          panels_((m.cols.count + panel_width - 1) / panel_width),
          all_rows_((m.rows.count + tile_rows - 1) / tile_rows) {
        if (data_) rows_ = rows_within(m, m.kept_entries);
    }

    // Rows of tiles that fit into so many numbers.
    static int64_t rows_within(const Matrix& m, int64_t numbers) {
        const int64_t all = (m.rows.count + tile_rows - 1) / tile_rows;
        int64_t rows = 0;
        while (rows < all && size(m, rows + 1) <= numbers) ++rows;
        return rows;
    }

    // Numbers in the first rows of tiles.
    static int64_t size(const Matrix& m, int64_t rows) {
        const int64_t panels = (m.cols.count + panel_width - 1) / panel_width;
        return (m.symmetric ? before(rows, panels) : rows * panels) * tile_size;
    }

    bool complete() const { return rows_ == all_rows_; }

    // From this row of the tile on; null where it is not kept.
    A* at(int64_t row, int64_t col) const {
        const int64_t r = row / tile_rows, p = col / panel_width;
        if (r >= rows_) return nullptr;
        const int64_t first = symmetric_ ? r * (tile_rows / panel_width) : 0;
        if (p < first) return nullptr;
        return data_ + ((symmetric_ ? before(r, panels_) : r * panels_) + p - first) * tile_size + row % tile_rows * panel_width;
    }

  private:
    // Tiles of a symmetric matrix in the rows before row r: Σ_{q<r} (panels − 2q), no row with less than one.
    static int64_t before(int64_t r, int64_t panels) { return r * (panels - r + 1); }

    A* data_;
    bool symmetric_;
    int64_t panels_, all_rows_, rows_ = 0;
};

// Width of the panel that begins at column `col`: whole groups of 16.
// Columns of a tile come in groups of so many.
template <class T>
constexpr int64_t col_multiple = std::is_same_v<T, Bf16> ? 32 : 16;

inline int64_t panel_columns(int64_t col, int64_t num_cols, int64_t multiple) {
    return std::min(panel_width, round_up(num_cols - col, multiple));
}

// S = −∞ on the diagonal j = i + diagonal, and below it too if `triangle`; of columns that exist, past which it would
// meet the factor zero.
template <class A>
void leave_out(A* s, int64_t row, int64_t height, int64_t col, int64_t width, int64_t diagonal, bool triangle) {
    const int64_t first = row + diagonal - col;  // the diagonal's column in the first row of the tile
    if (first >= width || first + height <= 0) {
        if (!(triangle && first >= width)) return;
    }
    for (int64_t i = 0; i < height; ++i) {
        const int64_t j = first + i;
        if (triangle) {
            for (int64_t below = 0; below <= std::min(j, width - 1); ++below) s[i * panel_width + below] = -infinity<A>;
        } else if (0 <= j && j < width) {
            s[i * panel_width + j] = -infinity<A>;
        }
    }
}

// S = −∞ where the ids of row and column are equal.
template <class A>
void leave_out_equal(A* s, int64_t row, int64_t height, int64_t col, int64_t width, const Matrix& m) {
    if (m.row_ids == nullptr) return;
    for (int64_t i = 0; i < height; ++i) {
        const int64_t id = m.row_ids[row + i];
        A* line = s + i * panel_width;
        for (int64_t j = 0; j < width; ++j) line[j] = m.col_ids[col + j] == id ? -infinity<A> : line[j];
    }
}

template <bool biased, class A>
inline Vec<A> exponent(Vec<A> s, Vec<A> row, Vec<A> scale, Vec<A> col, Vec<A> shift) {
    if constexpr (biased) {
        return fma(s, scale, row + shift);
    } else {
        return fma(s * row, col, shift);
    }
}

// Calls visit<vectors>(first column) so that every column up to `width`, a multiple of 16, is in one stripe.
template <class A, class Visit>
inline void for_stripes(int64_t width, Visit visit) {
    constexpr int wide = Vec<A>::per_stripe, narrow = 16 / Vec<A>::size;
    int64_t j = 0;
    for (; j + wide * Vec<A>::size <= width; j += wide * Vec<A>::size) {
        visit(std::integral_constant<int, wide>(), j);
    }
    for (; j < width; j += narrow * Vec<A>::size) visit(std::integral_constant<int, narrow>(), j);
}
