// From the matrix that was asked for to operands of products: packing, splitting, widening.
//
//     float64, float32, bf16    read in place, the columns packed
//     float16                   exactly two bf16 numbers: high and low, three products (sums); high only (gradients)
//                               float32 where bf16 products are not fast
#pragma once

#include "tiles.h"

// Enough work for a second thread to pay for being woken: some ten microseconds.
inline bool worth_threads(const Matrix& m) {
    const double operations = 2.0 * static_cast<double>(m.rows.count) * static_cast<double>(m.cols.count) *
                              static_cast<double>(m.rows.dim);
    return operations > 4e6;
}

template <class A>
Exponents<A> fold_factors(const Matrix& m, double reference, A* row, A* col, A* shift, int64_t n, int64_t cols,
                          int64_t padded_cols) {
    const A* row_factor = static_cast<const A*>(m.row_factor);
    const A* col_factor = static_cast<const A*>(m.col_factor);
    const A scale = static_cast<A>(m.scale), offset = static_cast<A>(reference);
    for (int64_t i = 0; i < n; ++i) {
        row[i] = m.biased ? row_factor[i] : (row_factor ? scale * row_factor[i] : scale);
    }
    for (int64_t j = 0; j < cols; ++j) {
        col[j] = !m.biased && col_factor ? col_factor[j] : A(1);
        shift[j] = m.biased ? col_factor[j] - offset : -offset;
    }
    std::fill(col + cols, col + padded_cols, A(0));
    std::fill(shift + cols, shift + padded_cols, -infinity<A>);
    return {row, col, shift, scale};
}

inline bool has_limits(const Matrix& m) { return m.row_limit != nullptr || m.col_limit != nullptr; }

// Limits relative to the reference; +∞ where there is none.
template <class A>
void fold_limits(const double* limit, double reference, A* out, int64_t count, int64_t padded) {
    for (int64_t i = 0; i < padded; ++i) {
        out[i] = limit != nullptr && i < count ? static_cast<A>(limit[i] - reference) : infinity<A>;
    }
}

template <class T>
void pack_columns(const T* data, int64_t stride, int64_t count, int64_t dim, T* out, bool parallel) {
    run_tasks((count + panel_width - 1) / panel_width, parallel,
              [&](int64_t p, int) { pack_transposed(data, stride, count, dim, p, out); });
}

// High and low parts of float16 rows as bf16; `low` may be null.
inline void split_rows(const Rows& in, int64_t dim, Bf16* high, Bf16* low, bool parallel) {
    run_tasks((in.count + 63) / 64, parallel, [&](int64_t block, int) {
        for (int64_t i = block * 64; i < std::min((block + 1) * 64, in.count); ++i) {
            const uint16_t* from = static_cast<const uint16_t*>(in.data) + i * in.stride;
            uint16_t* to_high = &high[i * dim].bits;
            uint16_t* to_low = low ? &low[i * dim].bits : nullptr;
#ifdef HAS_BF16_PRODUCTS
            for (int64_t k = 0; k < dim; k += Vec<float>::size) {
                const Vec<float> x = from_f16(from + k);
                to_bf16(x, to_high + k);
                if (low) to_bf16(x - from_bf16(to_high + k), to_low + k);
            }
#endif
        }
    });
}

// Calls use(operands, parallel) with operands of the type in which this matrix's products are taken.
template <class Use>
void with_operands(const Matrix& m, bool exact, Use use) {
    const bool parallel = worth_threads(m);
    const int64_t n = m.rows.count, cols = m.cols.count, dim = m.rows.dim;
    // The gradient takes no inner products of a matrix all of whose tiles were kept.
    const bool multiplies = exact || !(m.rows.type == Type::f64 ? KeptTiles<double>(m).complete() : KeptTiles<float>(m).complete());
    const auto in_place = [&](auto zero) {
        using T = decltype(zero);
        Workspace workspace(Workspace::bytes<T>(transposed_size<T>(cols, dim)));
        T* panels = workspace.take<T>(transposed_size<T>(cols, dim));
        if (multiplies) {
            pack_columns(static_cast<const T*>(m.cols.data), m.cols.stride, cols, dim, panels, parallel);
        }
        const T* rows = static_cast<const T*>(m.rows.data);
        const T* columns = static_cast<const T*>(m.cols.data);
        use(Operands<T>{{{rows, panels}}, 1, m.rows.stride, columns, m.cols.stride, n, cols, dim}, parallel);
    };
    switch (m.rows.type) {
        case Type::f64:
            return in_place(double());
        case Type::f32:
            return in_place(float());
        case Type::bf16:
            return in_place(Bf16());
        case Type::f16:
            break;
    }
    // Rows of a symmetric matrix are its columns: split once.
    const bool same = m.rows.data == m.cols.data;
    const int parts = exact ? 2 : 1;
    const int64_t panels_size = transposed_size<Bf16>(cols, dim);
    Workspace workspace(parts * (Workspace::bytes<Bf16>(n * dim) + Workspace::bytes<Bf16>(same ? 0 : cols * dim) +
                                 Workspace::bytes<Bf16>(panels_size)));
    Bf16 *rows[2] = {}, *columns[2] = {}, *panels[2] = {};
    for (int part = 0; part < parts; ++part) {
        rows[part] = workspace.take<Bf16>(n * dim);
        columns[part] = same ? rows[part] : workspace.take<Bf16>(cols * dim);
        panels[part] = workspace.take<Bf16>(panels_size);
    }
    split_rows(m.rows, dim, rows[0], rows[1], parallel);
    if (!same) split_rows(m.cols, dim, columns[0], columns[1], parallel);
    for (int part = 0; multiplies && part < parts; ++part) pack_columns(columns[part], dim, cols, dim, panels[part], parallel);
    Operands<Bf16> operands{{{rows[0], panels[0]}}, 1, dim, columns[0], dim, n, cols, dim};
    if (exact) {
        operands.factors[1] = {rows[0], panels[1]};
        operands.factors[2] = {rows[1], panels[0]};
        operands.count = 3;
    }
    use(operands, parallel);
}
