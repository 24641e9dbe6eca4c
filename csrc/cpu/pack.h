// Operands in the order in which products read them. n rows of K numbers; panels are 64 columns of a right operand wide.
//
//     pack_transposed    [n, K] → [⌈n/64⌉][K][64]       the right operand of rows·colsᵀ
//     pack_panels        [n, K] → [⌈K/64⌉][n][64]       the right operand of H·cols
//     transpose_rows     [n, K] → [K][ld]               the left operand of rowsᵀ·H
//
// In bf16 pairs of rows of a right operand are interleaved: [K/2][64][2] and [n/2][64][2]. Words of 32 bits, a float or
// two bf16, are transposed 16×16 at a time in registers. Rows and columns past the end become zeros.
#pragma once

#include <algorithm>
#include <cstring>

#include "matrix.h"
#include "vector.h"

constexpr int64_t panel_width = 64;

inline uint32_t load_word(const void* p) {
    uint32_t word;
    std::memcpy(&word, p, sizeof(word));
    return word;
}

// out[c][r] = in[r][c], r < rows, c < cols; zeros for rows ≤ r < padded_rows. Strides in words; `in` need not be aligned.
inline void transpose_words(const uint8_t* in, int64_t in_stride, int64_t rows, int64_t cols, int64_t padded_rows,
                            uint32_t* out, int64_t out_stride) {
    for (int64_t r = 0; r < padded_rows; r += 16) {
        const int64_t height = std::min<int64_t>(16, std::max<int64_t>(rows - r, 0));
        const int64_t padded_height = std::min<int64_t>(16, padded_rows - r);
        for (int64_t c = 0; c < cols; c += 16) {
            const int64_t width = std::min<int64_t>(16, cols - c);
            const uint8_t* from = in + (r * in_stride + c) * 4;
            uint32_t* to = out + c * out_stride + r;
            if (height == 16 && width == 16) {
                transpose_16x16(reinterpret_cast<const uint32_t*>(from), in_stride, to, out_stride);
            } else {
                for (int64_t j = 0; j < width; ++j) {
                    for (int64_t i = 0; i < height; ++i) {
                        to[j * out_stride + i] = load_word(from + (i * in_stride + j) * 4);
                    }
                    for (int64_t i = height; i < padded_height; ++i) to[j * out_stride + i] = 0;
                }
            }
        }
    }
}

// Pairs of rows interleaved: out[i][c] holds rows 2i and 2i + 1 of column c. Zeros where there is no row.
inline void interleave_rows(const Bf16* in, int64_t stride, int64_t rows, int64_t cols, int64_t pairs, uint32_t* out,
                            int64_t out_stride) {
    for (int64_t i = 0; i < pairs; ++i) {
        const Bf16 *even = in + 2 * i * stride, *odd = even + stride;
        const bool has_even = 2 * i < rows, has_odd = 2 * i + 1 < rows;
        uint32_t* to = out + i * out_stride;
        if (has_odd) {
            for (int64_t c = 0; c < cols; ++c) to[c] = even[c].bits | static_cast<uint32_t>(odd[c].bits) << 16;
        } else {
            for (int64_t c = 0; c < cols; ++c) to[c] = has_even ? even[c].bits : 0;
        }
    }
}

// ---- numbers of one panel, one row group ------------------------------------------------------------------------

template <class T>
int64_t transposed_size(int64_t rows, int64_t dim) {
    return round_up(rows, panel_width) * dim;
}

// Panel `p` of pack_transposed.
template <class T>
void pack_transposed(const T* in, int64_t stride, int64_t rows, int64_t dim, int64_t p, T* out) {
    const int64_t first = p * panel_width, count = std::min(panel_width, rows - first);
    const T* from = in + first * stride;
    T* to = out + first * dim;
    if constexpr (sizeof(T) == 8) {
        for (int64_t k = 0; k < dim; ++k) {
            for (int64_t i = 0; i < panel_width; ++i) to[k * panel_width + i] = i < count ? from[i * stride + k] : T(0);
        }
    } else {
        constexpr int64_t per_word = 4 / sizeof(T);
        transpose_words(reinterpret_cast<const uint8_t*>(from), stride / per_word, count, dim / per_word, panel_width,
                        reinterpret_cast<uint32_t*>(to), panel_width);
    }
}

// Rows [begin, end) of pack_panels, of panels `length` rows long; in bf16 both are even, and there are zeros from `rows` on.
inline void pack_panels(const Bf16* in, int64_t stride, int64_t rows, int64_t dim, int64_t begin, int64_t end, int64_t length,
                        Bf16* out) {
    for (int64_t k = 0; k < dim; k += panel_width) {
        interleave_rows(in + begin * stride + k, stride, rows - begin, std::min(panel_width, dim - k), (end - begin) / 2,
                        reinterpret_cast<uint32_t*>(out + k * length + begin * panel_width), panel_width);
    }
}
template <class T>
void pack_panels(const T* in, int64_t stride, int64_t, int64_t dim, int64_t begin, int64_t end, int64_t length, T* out) {
    for (int64_t i = begin; i < end; ++i) {
        const T* row = in + i * stride;
        T* to = out + i * panel_width;
        int64_t k = 0;
        for (; k + panel_width <= dim; k += panel_width, to += length * panel_width) {
            for (int64_t j = 0; j < panel_width; j += Vec<T>::size) Vec<T>::load(row + k + j).store(to + j);
        }
        std::copy(row + k, row + dim, to);
    }
}

// Columns [first, first + count) of transpose_rows: rows of the result.
inline void transpose_rows(const Bf16* in, int64_t stride, int64_t rows, int64_t first, int64_t count, Bf16* out,
                           int64_t ld) {
    uint32_t block[16 * 16];
    const int64_t pairs = (rows + 1) / 2;
    for (int64_t i = 0; i < pairs; i += 16) {
        const int64_t height = std::min<int64_t>(16, pairs - i);
        for (int64_t c = first; c < first + count; c += 16) {
            const int64_t width = std::min<int64_t>(16, first + count - c);
            interleave_rows(in + 2 * i * stride + c, stride, rows - 2 * i, width, height, block, 16);
            transpose_words(reinterpret_cast<const uint8_t*>(block), 16, height, width, height,
                            reinterpret_cast<uint32_t*>(out + c * ld + 2 * i), ld / 2);
        }
    }
}
inline void transpose_rows(const float* in, int64_t stride, int64_t rows, int64_t first, int64_t count, float* out,
                           int64_t ld) {
    transpose_words(reinterpret_cast<const uint8_t*>(in + first), stride, rows, count, rows,
                    reinterpret_cast<uint32_t*>(out + first * ld), ld);
}
inline void transpose_rows(const double* in, int64_t stride, int64_t rows, int64_t first, int64_t count, double* out,
                           int64_t ld) {
    for (int64_t c = first; c < first + count; ++c) {
        for (int64_t i = 0; i < rows; ++i) out[c * ld + i] = in[i * stride + c];
    }
}

// out[c][r] = in[r][c], or added to it; r < rows, c < cols.
inline void add_transposed(const float* in, int64_t in_stride, int64_t rows, int64_t cols, float* out,
                           int64_t out_stride, bool add) {
    alignas(64) uint32_t block[16 * 16];
    for (int64_t r = 0; r < rows; r += 16) {
        const int64_t height = std::min<int64_t>(16, rows - r);
        for (int64_t c = 0; c < cols; c += 16) {
            const int64_t width = std::min<int64_t>(16, cols - c);
            transpose_words(reinterpret_cast<const uint8_t*>(in + r * in_stride + c), in_stride, height, width, height,
                            block, 16);
            for (int64_t j = 0; j < width; ++j) {
                float* to = out + (c + j) * out_stride + r;
                const float* from = reinterpret_cast<const float*>(block) + j * 16;
                if (!add) {
                    std::copy(from, from + height, to);
                } else if (height == 16) {
                    for (int k = 0; k < 16; k += Vec<float>::size) {
                        (Vec<float>::load(to + k) + Vec<float>::load(from + k)).store(to + k);
                    }
                } else {
                    for (int64_t i = 0; i < height; ++i) to[i] += from[i];
                }
            }
        }
    }
}
