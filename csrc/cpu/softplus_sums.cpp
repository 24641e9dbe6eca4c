// Sums along rows of ln(1 + 2^(x + bias)) and of its derivative, diagonal left out: what a sigmoid loss is made of.
//
// No term exceeds its logit, so that no reference is needed. A task is 128 rows against all columns: each number has one
// owner and one order of addition, the same bits for any number of threads.
//
// 2·n·N·D operations; n·N exponentials and divisions.

#include "operands.h"

namespace {

template <class A>
struct RowTotals {
    Vec<A> softplus = Vec<A>::zero(), sigmoid = Vec<A>::zero();
};

// One panel of a tile, added to `totals` [height].
template <class A>
void reduce_tile(const A* s, int64_t height, int64_t width, const Exponents<A>& x, const A* row, const A* col,
                 const A* shift, RowTotals<A>* totals) {
    using V = Vec<A>;
    const V scale = V::all(x.scale);
    for (int64_t i = 0; i < height; ++i) {
        const V factor = V::all(row[i]);
        RowTotals<A> total = totals[i];
        for (int64_t j = 0; j < width; j += V::size) {
            const V y = exponent<false>(V::load(s + i * panel_width + j), factor, scale, V::load(col + j), V::load(shift + j));
            const auto [softplus, sigmoid] = softplus_and_sigmoid(y);
            total.softplus = total.softplus + softplus;
            total.sigmoid = total.sigmoid + sigmoid;
        }
        totals[i] = total;
    }
}

template <class T>
void sum_rows(const Matrix& matrix, const Operands<T>& operands, double bias, bool parallel, double* softplus,
              double* sigmoid) {
    using A = Accumulator<T>;
    using W = Workspace;
    const int64_t n = operands.num_rows, cols = operands.num_cols, padded_cols = round_up(cols, panel_width);
    constexpr int64_t scratch_size = tile_rows * panel_width;
    Workspace workspace(W::bytes<A>(n) + 2 * W::bytes<A>(padded_cols) + W::bytes<A>(num_threads() * scratch_size));
    A* row_factors = workspace.take<A>(n);
    A* col_factors = workspace.take<A>(padded_cols);
    A* shifts = workspace.take<A>(padded_cols);
    A* scratch = workspace.take<A>(num_threads() * scratch_size);
    const Exponents<A> x = fold_factors<A>(matrix, -bias, row_factors, col_factors, shifts, n, cols, padded_cols);
    run_tasks((n + tile_rows - 1) / tile_rows, parallel, [&](int64_t task, int thread) {
        A* s = scratch + thread * scratch_size;
        const int64_t row = task * tile_rows, height = std::min(tile_rows, n - row);
        RowTotals<A> totals[tile_rows];
        for (int64_t col = 0; col < cols; col += panel_width) {
            const int64_t width = panel_columns(col, cols, 16), exist = std::min(width, cols - col);
            inner_products(operands, row, height, col / panel_width, width, s);
            leave_out(s, row, height, col, exist, matrix.diagonal, false);
            leave_out_equal(s, row, height, col, exist, matrix);
            reduce_tile(s, height, width, x, row_factors + row, col_factors + col, shifts + col, totals);
        }
        for (int64_t i = 0; i < height; ++i) {
            softplus[row + i] = static_cast<double>(totals[i].softplus.sum());
            sigmoid[row + i] = static_cast<double>(totals[i].sigmoid.sum());
        }
    });
}

}  // namespace

void softplus_sums(const Matrix& matrix, double bias, double* softplus, double* sigmoid) {
    std::fill(softplus, softplus + matrix.rows.count, 0.0);
    std::fill(sigmoid, sigmoid + matrix.rows.count, 0.0);
    if (matrix.rows.count == 0 || matrix.cols.count == 0) return;
    with_operands(matrix, true, [&](const auto& operands, bool parallel) {
        sum_rows(matrix, operands, bias, parallel, softplus, sigmoid);
    });
}
