// log2 of the row and column sums of matrices of exponentials, diagonals left out, one exponential per entry.
//
//     R_i = Σ_j 2^(x_ij − shift)      C_j = Σ_i 2^(x_ij − shift)      shift = max(0, max x − headroom)
//
// The constant reference exponent excludes overflow. Entries lost to underflow lie below 2^−126; a sum of at least
// max(n, N)·2^−102 does not notice. Where one is smaller the whole matrix is summed again, each row and column relative
// to its own largest exponent.
//
//     tasks      row groups × column groups: fixed by the shape, whichever thread takes one
//     one task   for each block of 128 rows: for each panel of 64 columns: S (L1) → 2^x → sums of both, in registers
//     the end    partial sums of the groups are added in float64 in the order of the groups: always the same bits
//
// 2·n·N·D operations (half of it if symmetric), n·N exponentials; N·D numbers packed, 4·(n·column groups + N·row groups)
// bytes of partial sums.

#include <cmath>

#include "operands.h"

namespace {

template <class A>
struct Range {
    static constexpr int smallest_exponent = sizeof(A) == 4 ? -126 : -1022;
    static constexpr int digits = sizeof(A) == 4 ? 24 : 53;
};

enum class Pass { sums, largest, sums_from_largest };

// One panel of a tile. row_partial [height][Vec::size]; col_partial [width]. `row_max`, `col_max`: the last pass only.
template <Pass pass, bool biased, bool limited, class A>
void reduce_tile(const A* s, int64_t height, int64_t width, const Exponents<A>& x, const A* row, const A* col,
                 const A* shift, A* row_partial, A* col_partial, const A* row_max, const A* col_max, const A* row_limit,
                 const A* col_limit) {
    using V = Vec<A>;
    const auto within = [](V y, V limit, V value, V other) {
        if constexpr (limited) {
            return if_within(y, limit, value, other);
        } else {
            return value;
        }
    };
    const V zero = V::zero(), lowest = V::all(-infinity<A>);
    const V scale = V::all(x.scale);
    for_stripes<A>(width, [&](auto vectors, int64_t j) {
        constexpr int n = decltype(vectors)::value;
        V col_factor[n], col_shift[n], col_total[n], reference[n], bound[n];
        for (int v = 0; v < n; ++v) {
            const int64_t at = j + v * V::size;
            col_factor[v] = V::load(col + at);
            col_shift[v] = V::load(shift + at);
            col_total[v] = V::load(col_partial + at);
            if constexpr (pass == Pass::sums_from_largest) reference[v] = V::load(col_max + at);
            bound[v] = limited ? V::load(col_limit + at) : zero;
        }
        for (int64_t i = 0; i < height; ++i) {
            const V factor = V::all(row[i]), row_bound = limited ? V::all(row_limit[i]) : zero;
            V total = V::load(row_partial + i * V::size);
            for (int v = 0; v < n; ++v) {
                const V y = exponent<biased>(V::load(s + i * panel_width + j + v * V::size), factor, scale, col_factor[v],
                                             col_shift[v]);
                if constexpr (pass == Pass::sums) {
                    const V e = exp2(y);
                    total = total + within(y, row_bound, e, zero);
                    col_total[v] = col_total[v] + within(y, bound[v], e, zero);
                } else if constexpr (pass == Pass::largest) {
                    total = max_or_nan(within(y, row_bound, y, lowest), total);
                    col_total[v] = max_or_nan(within(y, bound[v], y, lowest), col_total[v]);
                } else {
                    total = total + within(y, row_bound, exp2(y - V::all(row_max[i])), zero);
                    col_total[v] = col_total[v] + within(y, bound[v], exp2(y - reference[v]), zero);
                }
            }
            total.store(row_partial + i * V::size);
        }
        for (int v = 0; v < n; ++v) col_total[v].store(col_partial + j + v * V::size);
    });
}

// Group sizes: enough tasks for many threads, few enough partial sums.
struct Groups {
    int64_t height, width, rows, cols;
    Groups(int64_t n, int64_t num_cols) {
        height = std::max<int64_t>(std::min<int64_t>(round_up((n + 7) / 8, tile_rows), 512), round_up((n + 63) / 64, tile_rows));
        width = std::max<int64_t>(std::min<int64_t>(round_up((num_cols + 7) / 8, panel_width), 1024),
                                  round_up((num_cols + 31) / 32, panel_width));
        rows = (n + height - 1) / height;
        cols = (num_cols + width - 1) / width;
    }
};

template <class T>
class Sums {
    using A = Accumulator<T>;

  public:
    Sums(const Matrix& matrix, const Operands<T>& operands, bool parallel)
        : matrix_(matrix),
          operands_(operands),
          parallel_(parallel),
          n_(operands.num_rows),
          cols_(operands.num_cols),
          padded_cols_(round_up(cols_, panel_width)),
          groups_(n_, cols_),
          kept_(matrix),
          workspace_(bytes()) {
        row_ = workspace_.take<A>(n_);
        col_ = workspace_.take<A>(padded_cols_);
        shift_ = workspace_.take<A>(padded_cols_);
        row_partial_ = workspace_.take<A>(groups_.cols * n_);
        col_partial_ = workspace_.take<A>(groups_.rows * padded_cols_);
        row_max_ = workspace_.take<A>(n_);
        col_max_ = workspace_.take<A>(padded_cols_);
        row_limit_ = workspace_.take<A>(n_);
        col_limit_ = workspace_.take<A>(padded_cols_);
        scratch_ = workspace_.take<A>(num_threads() * scratch_size);
    }

    void log2(double* row_logs, double* col_logs) {
        const double entries = static_cast<double>(std::max(n_, cols_));
        const double headroom = -Range<A>::smallest_exponent - std::ceil(std::log2(entries));
        const double shift = std::max(matrix_.largest - headroom, 0.0);
        set_factors(shift);
        run<Pass::sums>();
        const double smallest_exact = entries * std::exp2(Range<A>::smallest_exponent + Range<A>::digits);
        double smallest = INFINITY;
        gather<false>(row_logs, col_logs);
        if (matrix_.symmetric) {  // only the total of a symmetric matrix is divided by
            double total = 0;
            for (int64_t i = 0; i < n_; ++i) total += row_logs[i];
            smallest = total / static_cast<double>(n_);
        } else {
            for (int64_t i = 0; i < n_; ++i) smallest = std::min(smallest, row_logs[i]);
            for (int64_t j = 0; j < cols_; ++j) smallest = std::min(smallest, col_logs[j]);
        }
        if (!(smallest < smallest_exact)) {  // not a number compares false and passes through
            for (int64_t i = 0; i < n_; ++i) row_logs[i] = std::log2(row_logs[i]) + shift;
            if (!matrix_.symmetric) {
                for (int64_t j = 0; j < cols_; ++j) col_logs[j] = std::log2(col_logs[j]) + shift;
            }
            return;
        }
        set_factors(0);
        run<Pass::largest>();
        gather<true>(row_logs, col_logs);
        keep_largest(row_logs, row_max_, n_, n_);
        keep_largest(matrix_.symmetric ? row_logs : col_logs, col_max_, cols_, padded_cols_);
        run<Pass::sums_from_largest>();
        gather<false>(row_logs, col_logs);
        for (int64_t i = 0; i < n_; ++i) row_logs[i] = std::log2(row_logs[i]) + row_max_[i];
        if (!matrix_.symmetric) {
            for (int64_t j = 0; j < cols_; ++j) col_logs[j] = std::log2(col_logs[j]) + col_max_[j];
        }
    }

  private:
    static constexpr int64_t scratch_size = tile_rows * (panel_width + Vec<A>::size);

    size_t bytes() const {
        using W = Workspace;
        return 3 * W::bytes<A>(n_) + 4 * W::bytes<A>(padded_cols_) + W::bytes<A>(groups_.cols * n_) +
               W::bytes<A>(groups_.rows * padded_cols_) + W::bytes<A>(num_threads() * scratch_size);
    }

    void set_factors(double reference) {
        exponents_ = fold_factors<A>(matrix_, reference, row_, col_, shift_, n_, cols_, padded_cols_);
        if (has_limits(matrix_)) {
            fold_limits(matrix_.row_limit, reference, row_limit_, n_, n_);
            fold_limits(matrix_.col_limit, reference, col_limit_, cols_, padded_cols_);
        }
    }

    // Where nothing but −∞ was seen any finite reference gives the sum zero that is right.
    static void keep_largest(const double* from, A* to, int64_t count, int64_t padded) {
        for (int64_t i = 0; i < count; ++i) to[i] = from[i] == -INFINITY ? A(0) : static_cast<A>(from[i]);
        for (int64_t i = count; i < padded; ++i) to[i] = 0;
    }

    template <Pass pass>
    void run() {
        run_tasks(groups_.rows * groups_.cols, parallel_, [&](int64_t task, int thread) {
            const int64_t g = task / groups_.cols, h = task % groups_.cols;
            A* scratch = scratch_ + thread * scratch_size;
            if (matrix_.biased) {
                run_task<pass, true, false>(g, h, scratch);
            } else if (has_limits(matrix_)) {
                run_task<pass, false, true>(g, h, scratch);
            } else {
                run_task<pass, false, false>(g, h, scratch);
            }
        });
    }

    template <Pass pass, bool biased, bool limited>
    void run_task(int64_t g, int64_t h, A* s) {
        constexpr bool largest = pass == Pass::largest;
        A* partial = s + tile_rows * panel_width;
        const int64_t row_end = std::min((g + 1) * groups_.height, n_), col_end = std::min((h + 1) * groups_.width, cols_);
        A* row_out = row_partial_ + h * n_;
        A* col_out = col_partial_ + g * padded_cols_;
        std::fill(col_out + h * groups_.width, col_out + round_up(col_end, panel_width), largest ? -infinity<A> : A(0));
        for (int64_t row = g * groups_.height; row < row_end; row += tile_rows) {
            const int64_t height = std::min(tile_rows, row_end - row);
            std::fill(partial, partial + height * Vec<A>::size, largest ? -infinity<A> : A(0));
            for (int64_t col = h * groups_.width; col < col_end; col += panel_width) {
                const int64_t width = panel_columns(col, cols_, col_multiple<T>);
                if (matrix_.symmetric && col + width <= row + 1) continue;  // below the diagonal
                A* kept = kept_.at(row, col);
                A* tile = kept ? kept : s;
                if (!kept || pass == Pass::sums) {
                    inner_products(operands_, row, height, col / panel_width, width, tile);
                    leave_out(tile, row, height, col, std::min(width, cols_ - col), matrix_.diagonal, false);
                    leave_out_equal(tile, row, height, col, std::min(width, cols_ - col), matrix_);
                }
                if (matrix_.symmetric && col < row + tile_rows) {  // the gradient wants both halves
                    if (kept) std::copy(kept, kept + height * panel_width, s);
                    tile = s;
                    leave_out(tile, row, height, col, std::min(width, cols_ - col), matrix_.diagonal, true);
                }
                reduce_tile<pass, biased, limited>(tile, height, width, exponents_, row_ + row, col_ + col, shift_ + col,
                                                   partial, col_out + col, row_max_ + row, col_max_ + col,
                                                   row_limit_ + row, col_limit_ + col);
            }
            for (int64_t i = 0; i < height; ++i) {
                const A* lanes = partial + i * Vec<A>::size;
                if constexpr (largest) {
                    A most = lanes[0];
                    for (int l = 1; l < Vec<A>::size; ++l) most = lanes[l] > most || lanes[l] != lanes[l] ? lanes[l] : most;
                    row_out[row + i] = most;
                } else {
                    row_out[row + i] = Vec<A>::load(lanes).sum();
                }
            }
        }
    }

    // Sums or maxima over the groups, in their order. All of a symmetric matrix goes to the rows.
    template <bool largest>
    void gather(double* rows, double* cols) const {
        const auto add = [](double& total, A x) {
            if constexpr (largest) {
                total = x > total || x != x ? static_cast<double>(x) : total;
            } else {
                total += static_cast<double>(x);
            }
        };
        const double nothing = largest ? -INFINITY : 0.0;
        std::fill(rows, rows + n_, nothing);
        for (int64_t h = 0; h < groups_.cols; ++h) {
            for (int64_t i = 0; i < n_; ++i) add(rows[i], row_partial_[h * n_ + i]);
        }
        double* target = matrix_.symmetric ? rows : cols;
        if (!matrix_.symmetric) std::fill(cols, cols + cols_, nothing);
        for (int64_t g = 0; g < groups_.rows; ++g) {
            for (int64_t j = 0; j < cols_; ++j) add(target[j], col_partial_[g * padded_cols_ + j]);
        }
    }

    const Matrix& matrix_;
    const Operands<T>& operands_;
    bool parallel_;
    int64_t n_, cols_, padded_cols_;
    Groups groups_;
    KeptTiles<A> kept_;
    Workspace workspace_;
    Exponents<A> exponents_;
    A *row_, *col_, *shift_, *row_partial_, *col_partial_, *row_max_, *col_max_, *row_limit_, *col_limit_,
        *scratch_;
};

}  // namespace

int64_t numbers_to_keep(const Matrix& m, int64_t bytes) {
    // Where so little is to be multiplied, it is multiplied again sooner than it is written and read.
    if (m.rows.count == 0 || m.cols.count == 0 || !worth_threads(m)) return 0;
    const auto count = [&](auto zero) {
        using A = decltype(zero);
        return KeptTiles<A>::size(m, KeptTiles<A>::rows_within(m, bytes / static_cast<int64_t>(sizeof(A))));
    };
    return m.rows.type == Type::f64 ? count(double()) : count(float());
}

void log_sums(const std::vector<Matrix>& matrices, double* row_logs, double* col_logs) {
    for (const Matrix& matrix : matrices) {
        if (matrix.rows.count == 0 || matrix.cols.count == 0) {
            std::fill(row_logs, row_logs + matrix.rows.count, -INFINITY);
            std::fill(col_logs, col_logs + matrix.cols.count, -INFINITY);
        } else {
            with_operands(matrix, true, [&](const auto& operands, bool parallel) {
                Sums(matrix, operands, parallel).log2(row_logs, col_logs);
            });
        }
        row_logs += matrix.rows.count;
        col_logs += matrix.cols.count;
    }
}
