// The gradient with respect to the inner products of a matrix, H, multiplied with both operands while it is in cache.
//
//     pairs        H_ij = row_factor_i·col_factor_j·(2^(x_ij − L_i) + 2^(x_ij − L_j))      L: log sums of row and column
//                  each of the two times a weight of its row or column, where there are some; none beyond a limit
//     sigmoid      H_ij = row_factor_i·col_factor_j·weight_i / (1 + 2^−(x_ij + bias))
//     centroids    H_ij = 2^(x_ij − reference)
//     row_products += H·cols        col_products += Hᵀ·rows        without the diagonal
//
// One exponential per entry: with the middle of all log sums, 2^(x − L_i) + 2^(x − L_j) = 2^(x − middle)·(u_i + v_j),
// u_i = 2^(middle − L_i), v_j = 2^(middle − L_j), as long as the log sums lie within 100 of each other (an entry lost then
// is below 2^−76 of a sum); otherwise two.
//
//     for each block of at most 2048 rows × 1024 columns:
//         1   right operands are packed in panels of 64 columns, in bf16 with pairs of rows interleaved
//         2   a task owns rows I, at most 128: tiles of them × 64:  S (L1) → H[I, :] (L2) and Hᵀ, then
//             rows_I += H[I, :]·cols
//         3   a task owns columns J and columns of D:
//             cols_J += Hᵀ[J, :]·rows
//
// Where a matrix in bf16 is large beside its operands, less is transposed by leaving H itself for step 3, packed as a right
// operand: colsᵀ_J = rowsᵀ·H[:, J], then added.
//
// Tasks are fixed by the shape and each number has one owner: the same bits for any number of threads. A symmetric
// matrix has tiles on and above its diagonal only; those above are multiplied both ways into the rows. The first product
// that a number receives overwrites it where the caller says so: no memory is filled with zeros first.
//
// 6·n·N·D operations (half if symmetric), n·N exponentials; 4 MiB for Hᵀ in bf16, 8 in float32, up to 0.5 a thread for
// H, and O(D) for a block's packed operands.

#include <cmath>

#include "operands.h"

namespace {

constexpr int64_t block_rows = 2048, block_cols = 1024;
constexpr int64_t square = 128;       // granularity of the triangle
constexpr int64_t dims_at_once = 256; // columns of D that a task of step 3 owns
constexpr int64_t few_rows = 256;     // of a right operand in float32 are read where they are
constexpr double largest_range = 100;

// What an entry of H is made of. `general` is `softmax` with limits, `general_twice` with weights or limits.
enum class Entry { centroids, softmax, softmax_twice, general, general_twice, sigmoid };

// What the epilogue multiplies exponentials with, per row and per column.
template <class A>
struct Weights {
    const A *row, *col;  // u_i, v_j, or L_i, L_j where they take two exponentials; weight_i of a sigmoid
    const A* row_factor;
    A reference;
    const A *row_weight, *col_weight, *row_limit, *col_limit;  // general only
};

// Where a tile of H goes.
template <class T>
struct Destination {
    T* rows;         // [height][ld]
    int64_t ld;
    T* interleaved;  // bf16: [height / 2][64][2]
};

// The epilogue: S of a tile → H. Returns Σ (2^(x − L_i) + 2^(x − L_j))·x if `moment`.
template <Entry kind, bool moment, class T, class A>
double gradient_tile(const A* s, int64_t height, int64_t width, const Exponents<A>& x, int64_t row, int64_t col,
                     const Weights<A>& w, Destination<T> out) {
    using V = Vec<A>;
    constexpr bool biased = kind == Entry::centroids;
    constexpr bool is_general = kind == Entry::general || kind == Entry::general_twice;
    const V zero = V::zero();
    const V scale = V::all(x.scale), reference = V::all(-w.reference), lowest = V::all(A(-1e30));
    double result = 0;
    for_stripes<A>(width, [&](auto vectors, int64_t j) {
        constexpr int n = decltype(vectors)::value;
        V factor[n], shift[n], share[n], weight[n], limit[n], sum[n];
        for (int v = 0; v < n; ++v) {
            const int64_t at = col + j + v * V::size;
            factor[v] = V::load(x.col + at);
            shift[v] = V::load(x.shift + at);
            if constexpr (!biased) share[v] = V::load(w.col + at);
            if constexpr (is_general) {
                weight[v] = V::load(w.col_weight + at);
                limit[v] = V::load(w.col_limit + at);
            }
            sum[v] = V::zero();
        }
        const auto entry = [&](int64_t i, int v) {
            const V product = V::load(s + i * panel_width + j + v * V::size), row_factor = V::all(x.row[row + i]);
            const V y = exponent<biased>(product, row_factor, scale, factor[v], shift[v]);
            if constexpr (biased) {
                return exp2(y);
            } else {
                const V own = V::all(w.row[row + i]);
                V t;
                if constexpr (kind == Entry::softmax) {
                    t = exp2(y) * (own + share[v]);
                } else if constexpr (kind == Entry::softmax_twice) {
                    t = exp2(y - own) + exp2(y - share[v]);
                } else if constexpr (kind == Entry::sigmoid) {
                    t = softplus_and_sigmoid(y).sigmoid * own;
                } else {
                    const V row_limit = V::all(w.row_limit[row + i]);
                    if constexpr (kind == Entry::general) {
                        const V e = exp2(y);  // may be infinite beyond both limits
                        t = if_within(y, row_limit, e * own, zero) + if_within(y, limit[v], e * share[v], zero);
                    } else {
                        t = if_within(y, row_limit, exp2(y - own) * V::all(w.row_weight[row + i]), zero) +
                            if_within(y, limit[v], exp2(y - share[v]) * weight[v], zero);
                    }
                }
                if constexpr (moment) {  // from the product: y is rounded where the middle of the log sums lies
                    sum[v] = fma(t, max_or_nan(fma(product * row_factor, factor[v], reference), lowest), sum[v]);
                }
                return t * (factor[v] * V::all(w.row_factor[row + i]));
            }
        };
        if constexpr (std::is_same_v<T, Bf16>) {
#ifdef HAS_BF16_PRODUCTS
            for (int64_t i = 0; i < height; i += 2) {
                uint16_t* even = &out.rows[i * out.ld + j].bits;
                uint16_t* pairs = &out.interleaved[(i / 2 * panel_width + j) * 2].bits;
                const bool has_odd = i + 1 < height;
                for (int v = 0; v < n; ++v) {
                    const V first = entry(i, v), second = has_odd ? entry(i + 1, v) : V::zero();
                    // Where there is no second row its zeros go to the padding of the block.
                    store_bf16_rows(first, second, even + v * V::size, even + out.ld + v * V::size,
                                    pairs + 2 * v * V::size);
                }
            }
#endif
        } else {
            for (int64_t i = 0; i < height; ++i) {
                for (int v = 0; v < n; ++v) entry(i, v).store(out.rows + i * out.ld + j + v * V::size);
            }
        }
        if constexpr (moment && !biased) {
            for (int v = 0; v < n; ++v) result += static_cast<double>(sum[v].sum());
        }
    });
    return result;
}

// A right operand: panels of 64 columns, as they are or packed.
template <class T>
struct Right {
    const T* data;
    int64_t panel;  // from one panel to the next
    int64_t ld;     // from one row, in bf16 from one pair of rows, to the next, in columns
    const T* at(int64_t row, int64_t col) const { return data + col / panel_width * panel + row * ld; }
};

template <class T>
class Gradient {
    using A = Accumulator<T>;
    static constexpr bool in_pairs = std::is_same_v<T, Bf16>;

  public:
    Gradient(const Matrix& matrix, const Operands<T>& operands, const Products& products, bool parallel)
        : matrix_(matrix),
          operands_(operands),
          products_(products),
          parallel_(parallel),
          n_(operands.num_rows),
          cols_(operands.num_cols),
          dim_(operands.dim),
          padded_cols_(round_up(cols_, panel_width)),
          height_(std::min(block_rows, round_up(n_, 2))),
          width_(std::min(block_cols, padded_cols_)),
          row_ld_(width_ + 32),
          transposed_ld_(height_ + 32),
          rows_at_once_(n_ > 1024 ? 128 : 64),
          turned_(turns(n_, cols_, dim_)),
          packs_rows_(in_pairs || height_ > few_rows),
          packs_cols_(in_pairs || width_ > few_rows),
          shares_packed_(matrix.symmetric && turned_ && n_ <= block_cols),
          kept_(matrix),
          workspace_(bytes()) {
        for (A*& p : per_row_) p = workspace_.take<A>(n_);  // three, and two for weights and limits
        for (A*& p : per_col_) p = workspace_.take<A>(padded_cols_);
        h_rows_ = workspace_.take<T>(num_threads() * h_rows_size());
        h_cols_ = workspace_.take<T>(h_cols_size());
        rows_packed_ = workspace_.take<T>(rows_packed_size());
        cols_packed_ = workspace_.take<T>(cols_packed_size());
        moments_ = workspace_.take<double>(row_groups(height_));
        scratch_ = workspace_.take<A>(num_threads() * scratch_size);
    }

    void add() {
        prepare();
        for (int64_t row = 0; row < n_; row += block_rows) {
            bool fresh = true;
            for (int64_t col = 0; col < cols_; col += block_cols) {
                if (matrix_.symmetric && col + block_cols <= row) continue;
                add_block(row, std::min(block_rows, n_ - row), col, std::min(block_cols, cols_ - col), fresh);
                fresh = false;
            }
        }
    }

  private:
    static constexpr int64_t scratch_size = dims_at_once * panel_width;
    static constexpr int64_t task_cols = 2 * panel_width;  // of a task of step 3
    static constexpr int64_t packed_at_once = 64;  // rows of right operands

    // Words that are transposed or interleaved either way; those added to products are read and written besides. H that is
    // the right operand of a product has to be packed, which is done on the way only in bf16.
    static bool turns(int64_t n, int64_t cols, int64_t dim) {
        const int64_t blocks = (n + block_rows - 1) / block_rows, added = 2 * blocks * cols * dim;
        return !in_pairs || n * cols < added;
    }

    int64_t row_groups(int64_t height) const { return (height + rows_at_once_ - 1) / rows_at_once_; }
    int64_t h_rows_size() const { return (rows_at_once_ + 1) * row_ld_; }
    int64_t h_cols_size() const { return turned_ ? width_ * transposed_ld_ : height_ * width_; }
    int64_t rows_packed_size() const {
        return !turned_ ? dim_ * transposed_ld_ : packs_rows_ && !shares_packed_ ? round_up(dim_, panel_width) * height_ : 0;
    }
    int64_t cols_packed_size() const { return packs_cols_ ? round_up(dim_, panel_width) * width_ : 0; }

    size_t bytes() const {
        using W = Workspace;
        size_t total = 5 * W::bytes<A>(n_) + 5 * W::bytes<A>(padded_cols_);
        total += W::bytes<T>(num_threads() * h_rows_size()) + W::bytes<T>(h_cols_size()) + W::bytes<T>(rows_packed_size());
        total += W::bytes<T>(cols_packed_size());
        return total + W::bytes<double>(row_groups(height_)) + W::bytes<A>(num_threads() * scratch_size);
    }

    // Everything per row and per column that the epilogue reads.
    void prepare() {
        const double *row_log = products_.row_log, *col_log = products_.col_log;
        double middle = 0;
        const bool sigmoid = products_.sigmoid, limited = has_limits(matrix_);
        const bool general = products_.row_weight != nullptr || limited;
        bool one_exponential = true;
        if (!matrix_.biased && !sigmoid) {
            double low = INFINITY, high = -INFINITY;
            bool ordered = true;  // not a number takes the way that is right for anything
            const auto look = [&](double log) {
                low = std::min(low, log);
                high = std::max(high, log);
                ordered = ordered && log == log;
            };
            for (int64_t i = 0; i < n_; ++i) look(row_log[i]);
            for (int64_t j = 0; j < cols_; ++j) look(col_log[j]);
            one_exponential = ordered && high - low <= largest_range;
            if (one_exponential) middle = 0.5 * (low + high);
        }
        const double shift = sigmoid ? -products_.bias : products_.reference + middle;
        exponents_ = fold_factors<A>(matrix_, shift, per_row_[0], per_col_[0], per_col_[1], n_,
                                     cols_, padded_cols_);
        weights_ = {per_row_[1], per_col_[2], per_row_[2], static_cast<A>(products_.reference),
                    per_row_[3], per_col_[3], per_row_[4], per_col_[4]};
        kind_ = matrix_.biased ? Entry::centroids
                : sigmoid      ? Entry::sigmoid
                : one_exponential ? (limited ? Entry::general : Entry::softmax)  // which shares hold the weights
                                  : (general ? Entry::general_twice : Entry::softmax_twice);
        if (matrix_.biased) return;
        const A* factor = static_cast<const A*>(matrix_.row_factor);
        for (int64_t i = 0; i < n_; ++i) per_row_[2][i] = factor ? factor[i] : A(1);
        if (sigmoid) {
            for (int64_t i = 0; i < n_; ++i) per_row_[1][i] = static_cast<A>(products_.row_weight[i]);
            std::fill(per_col_[2], per_col_[2] + padded_cols_, A(0));
            return;
        }
        const auto fill = [&](const double* logs, const double* weights, int64_t count, int64_t padded, A* share, A* apart) {
            for (int64_t i = 0; i < count; ++i) {
                const double own = weights ? weights[i] : 1.0;
                share[i] = one_exponential ? std::exp2(static_cast<A>(middle - logs[i])) : static_cast<A>(logs[i]);
                if (one_exponential && weights) share[i] *= static_cast<A>(own);
                apart[i] = static_cast<A>(own);
            }
            std::fill(share + count, share + padded, A(0));
            std::fill(apart + count, apart + padded, A(0));
        };
        fill(row_log, products_.row_weight, n_, n_, per_row_[1], per_row_[3]);
        fill(col_log, products_.col_weight, cols_, padded_cols_, per_col_[2], per_col_[3]);
        if (!general) return;
        fold_limits(matrix_.row_limit, shift, per_row_[4], n_, n_);
        fold_limits(matrix_.col_limit, shift, per_col_[4], cols_, padded_cols_);
    }

    void add_block(int64_t row, int64_t height, int64_t col, int64_t width, bool fresh) {
        const bool wants_rows = products_.rows != nullptr;
        const bool wants_cols = matrix_.symmetric ? wants_rows : products_.cols != nullptr;
        const int64_t col_parts = packs_cols_ && wants_rows ? parts(width) : 0;
        const int64_t row_parts = !(wants_cols && fresh) || rows_packed_size() == 0 ? 0
                                  : turned_                                         ? parts(height)
                                                    : (dim_ + panel_width - 1) / panel_width;
        run_tasks(col_parts + row_parts, parallel_, [&](int64_t t, int) {
            if (t < col_parts) {
                pack(operands_.cols + col * operands_.col_stride, operands_.col_stride, width, t, products_of_cols(width),
                     cols_packed_);
            } else {
                pack_or_transpose_rows(row, height, t - col_parts);
            }
        });
        run_tasks(row_groups(height), parallel_, [&](int64_t t, int thread) {
            const int64_t i = t * rows_at_once_, m = std::min(rows_at_once_, height - i);
            T* h = h_rows_ + thread * h_rows_size();
            moments_[t] = write_tiles(row, i, m, col, width, h, scratch_ + thread * scratch_size);
            if (wants_rows) multiply_rows(row, i, m, col, width, h);
        });
        if (products_.moment) {
            for (int64_t t = 0; t < row_groups(height); ++t) *products_.moment += moments_[t];
        }
        if (!wants_cols) return;
        const int64_t dim_groups = (dim_ + dims_at_once - 1) / dims_at_once;
        const int64_t col_groups = (width + task_cols - 1) / task_cols;
        run_tasks(col_groups * dim_groups, parallel_, [&](int64_t t, int thread) {
            multiply_cols(row, height, col, width, t / dim_groups * task_cols, t % dim_groups * dims_at_once,
                          scratch_ + thread * scratch_size);
        });
    }

    static int64_t parts(int64_t count) { return (count + packed_at_once - 1) / packed_at_once; }
    void pack(const T* rows, int64_t stride, int64_t count, int64_t part, int64_t length, T* out) const {
        const int64_t begin = part * packed_at_once, end = std::min(begin + packed_at_once, length);
        pack_panels(rows, stride, count, dim_, begin, end, length, out);
    }

    // Part `t` of the rows that are multiplied with columns of H.
    void pack_or_transpose_rows(int64_t row, int64_t height, int64_t t) {
        const T* rows = operands_.factors[0].rows + row * operands_.stride;
        if (turned_) return pack(rows, operands_.stride, height, t, products_of_rows(height), rows_packed_);
        const int64_t first = t * panel_width;
        transpose_rows(rows, operands_.stride, height, first, std::min(panel_width, dim_ - first), rows_packed_, transposed_ld_);
    }

    // H of rows [i, i + m) of the block at (row, col), and its transposition. Returns the moment.
    double write_tiles(int64_t row, int64_t i, int64_t m, int64_t col, int64_t width, T* h, A* s) {
        double moment = 0;
        for (int64_t j = first_col(row + i, col); j < width; j += panel_width) {
            const int64_t tile_width = panel_columns(col + j, cols_, col_multiple<T>);
            const A* kept = kept_.at(row + i, col + j);
            if (!kept) {
                inner_products(operands_, row + i, m, (col + j) / panel_width, tile_width, s);
                leave_out(s, row + i, m, col + j, std::min(tile_width, cols_ - col - j), matrix_.diagonal, false);
                leave_out_equal(s, row + i, m, col + j, std::min(tile_width, cols_ - col - j), matrix_);
            }
            T* interleaved = !in_pairs ? nullptr
                             : turned_ ? reinterpret_cast<T*>(s + tile_rows * panel_width)
                                       : h_cols_ + (j / panel_width * (height_ / 2) + i / 2) * panel_width * 2;
            moment += epilogue(kept ? kept : s, m, tile_width, row + i, col + j, Destination<T>{h + j, row_ld_, interleaved});
            if (turned_) turn_tile(h, i, m, j, std::min(tile_width, width - j), interleaved);
        }
        return moment;
    }

    // The first column of the block of which row `row` has tiles: a symmetric matrix has none below its diagonal.
    int64_t first_col(int64_t row, int64_t col) const {
        return matrix_.symmetric ? std::max<int64_t>(row / square * square - col, 0) : 0;
    }

    // A tile of H to Hᵀ; pairs of rows interleaved are words of it.
    void turn_tile(const T* h, int64_t i, int64_t height, int64_t j, int64_t width, const T* interleaved) {
        if constexpr (in_pairs) {
            const int64_t pairs = (height + 1) / 2;
            transpose_words(reinterpret_cast<const uint8_t*>(interleaved), panel_width, pairs, width, pairs,
                            reinterpret_cast<uint32_t*>(h_cols_ + j * transposed_ld_ + i), transposed_ld_ / 2);
        } else {
            transpose_rows(h, row_ld_, height, j, width, h_cols_ + i, transposed_ld_);
        }
    }

    double epilogue(const A* s, int64_t height, int64_t width, int64_t row, int64_t col, Destination<T> out) const {
        const auto call = [&](auto kind) {
            return products_.moment ? gradient_tile<kind.value, true>(s, height, width, exponents_, row, col, weights_, out)
                                    : gradient_tile<kind.value, false>(s, height, width, exponents_, row, col, weights_, out);
        };
        switch (kind_) {
            case Entry::centroids:
                return gradient_tile<Entry::centroids, false>(s, height, width, exponents_, row, col, weights_, out);
            case Entry::softmax:
                return call(std::integral_constant<Entry, Entry::softmax>());
            case Entry::softmax_twice:
                return call(std::integral_constant<Entry, Entry::softmax_twice>());
            case Entry::general:
                return call(std::integral_constant<Entry, Entry::general>());
            case Entry::general_twice:
                return call(std::integral_constant<Entry, Entry::general_twice>());
            default:
                return call(std::integral_constant<Entry, Entry::sigmoid>());
        }
    }

    // Rows [i, i + m) of the block += H·cols.
    void multiply_rows(int64_t row, int64_t i, int64_t m, int64_t col, int64_t width, const T* h) const {
        const int64_t first = first_col(row + i, col), k_end = products_of_cols(width);
        if (first >= k_end) return;
        // A row's first products: of the first columns, or of a symmetric matrix those of its square on the diagonal,
        // unless rows above it have come before.
        const bool add = !(products_.first_rows && (matrix_.symmetric ? row == 0 && i / square * square >= col : col == 0));
        A* out = static_cast<A*>(products_.rows) + (row + i) * products_.row_stride;
        const int64_t stride = operands_.col_stride;
        const Right<T> right = packs_cols_ ? Right<T>{cols_packed_, k_end * panel_width, panel_width}
                                           : Right<T>{operands_.cols + col * stride, panel_width, stride};
        multiply(m, k_end - first, h + first, row_ld_, right, first, out, products_.row_stride, 0, dim_, add);
    }

    // How many numbers a product of whole rows or columns of the block's H takes.
    static int64_t products_of_cols(int64_t width) { return in_pairs ? round_up(width, col_multiple<T>) : width; }
    static int64_t products_of_rows(int64_t height) { return in_pairs ? round_up(height, 2) : height; }

    // Columns [d, d_end) of out[m, dim] = h[m, k]·right[first + k, dim], or added to it.
    void multiply(int64_t m, int64_t k, const T* h, int64_t h_ld, const Right<T>& right, int64_t first, A* out, int64_t out_ld,
                  int64_t d, int64_t d_end, bool add) const {
        for (; d < d_end; d += panel_width) {
            product(m, std::min(panel_width, dim_ - d), k, h, h_ld, right.at(first, d), right.ld, out + d, out_ld, add);
        }
    }

    // Columns [j, j + 128) of the block, numbers [d, d + 256) of each: cols += Hᵀ·rows.
    void multiply_cols(int64_t row, int64_t height, int64_t col, int64_t width, int64_t j, int64_t d, A* scratch) const {
        const int64_t m = std::min(dims_at_once, dim_ - d);
        const bool add = !(matrix_.symmetric ? products_.first_rows && row == 0 && col + j >= block_rows
                                             : products_.first_cols && row == 0);
        // The square on the diagonal of a symmetric matrix is whole: it has been multiplied.
        const int64_t k_end =
            matrix_.symmetric ? std::min(height, (col + j) / square * square - row) : products_of_rows(height);
        if (k_end <= 0) return;
        A* out = static_cast<A*>(matrix_.symmetric ? products_.rows : products_.cols);
        const int64_t stride = matrix_.symmetric ? products_.row_stride : products_.col_stride;
        if (turned_) {
            const int64_t length = shares_packed_ ? products_of_cols(width) : products_of_rows(height);
            const Right<T> right = packs_rows_
                                       ? Right<T>{shares_packed_ ? cols_packed_ : rows_packed_, length * panel_width, panel_width}
                                       : Right<T>{operands_.factors[0].rows + row * operands_.stride, panel_width, operands_.stride};
            return multiply(std::min(task_cols, width - j), k_end, h_cols_ + j * transposed_ld_, transposed_ld_, right, 0,
                            out + (col + j) * stride, stride, d, d + m, add);
        }
        if constexpr (in_pairs) {
            for (int64_t end = std::min(j + task_cols, width); j < end; j += panel_width) {
                product(m, panel_columns(col + j, cols_, col_multiple<T>), k_end, rows_packed_ + d * transposed_ld_, transposed_ld_,
                        h_cols_ + j / panel_width * (height_ / 2) * panel_width * 2, panel_width, scratch, panel_width, false);
                add_transposed(scratch, panel_width, m, std::min(panel_width, width - j), out + (col + j) * stride + d, stride, add);
            }
        }
    }

    const Matrix& matrix_;
    const Operands<T>& operands_;
    const Products& products_;
    bool parallel_;
    Entry kind_ = Entry::softmax;
    int64_t n_, cols_, dim_, padded_cols_, height_, width_, row_ld_, transposed_ld_, rows_at_once_;
    bool turned_, packs_rows_, packs_cols_, shares_packed_;
    KeptTiles<A> kept_;
    Workspace workspace_;
    Exponents<A> exponents_;
    Weights<A> weights_;
    A *per_row_[5], *per_col_[5], *scratch_;
    T *h_rows_, *h_cols_, *rows_packed_, *cols_packed_;
    double* moments_;
};

void fill_with_zeros(void* products, int64_t stride, const Rows& like) {
    const int64_t size = like.type == Type::f64 ? sizeof(double) : sizeof(float);
    for (int64_t i = 0; i < like.count; ++i) std::memset(static_cast<char*>(products) + i * stride * size, 0, like.dim * size);
}

}  // namespace

void add_products(const Matrix& block, const Products& products) {
    if (block.rows.count == 0 || block.cols.count == 0) {
        if (products.rows && products.first_rows) fill_with_zeros(products.rows, products.row_stride, block.rows);
        if (products.cols && products.first_cols) fill_with_zeros(products.cols, products.col_stride, block.cols);
        return;
    }
    with_operands(block, false, [&](const auto& operands, bool parallel) {
        Gradient(block, operands, products, parallel).add();
    });
}
