// The functions of the backend, in C++: one for each that gapkernels/backends/contract.py names. The binding calls them
// with views of tensors it has checked.
#pragma once

#include <cstdint>
#include <vector>

#include "matrix.h"

// The settings of a loss, gapkernels.spec.LossSpec.
struct Spec {
    int64_t anchor;
    bool all_pairs, nce, atp, cu, normalize, normalize_centroids;
};

struct Pair {
    int row, col;
};

inline std::vector<Pair> unordered_pairs(int modalities) {
    std::vector<Pair> pairs;
    for (int m = 0; m < modalities; ++m) {
        for (int k = m + 1; k < modalities; ++k) pairs.push_back({m, k});
    }
    return pairs;
}

inline std::vector<Pair> anchor_pairs(int modalities, const Spec& spec) {
    std::vector<Pair> pairs;
    for (int m = 0; m < modalities; ++m) {
        if (m != spec.anchor) pairs.push_back({m, static_cast<int>(spec.anchor)});
    }
    return pairs;
}

inline std::vector<Pair> nce_pairs(int modalities, const Spec& spec) {
    if (!spec.nce) return {};
    return spec.all_pairs ? unordered_pairs(modalities) : anchor_pairs(modalities, spec);
}

constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453, norm_eps = 1e-12;
constexpr int sum_scalars = 4;

// Factors or biases, float or double.
struct Numbers {
    void* data;
    bool wide;
    double operator[](int64_t i) const {
        return wide ? static_cast<const double*>(data)[i] : static_cast<double>(static_cast<const float*>(data)[i]);
    }
    void set(int64_t i, double x) const {
        if (wide) {
            static_cast<double*>(data)[i] = x;
        } else {
            static_cast<float*>(data)[i] = static_cast<float>(x);
        }
    }
    Numbers from(int64_t i) const { return {static_cast<char*>(data) + i * (wide ? 8 : 4), wide}; }
};

// Types ---------------------------------------------------------------------------------------------------------------

inline Type compute_type(Type type) { return type == Type::f64 ? Type::f64 : Type::f32; }

// The type of the operands of pairs.
inline Type operand_type_of(Type type) {
    if (type == Type::f16) return Type::f32;
    return type == Type::bf16 && !has_bf16_products() ? Type::f32 : type;
}

// Rounding to float16 moves CU by about 8e-4/√(N·D), which has to stay clear of 1e-5 relative; where there is so little to
// average over, float32 costs nothing that could be measured.
// Raw centroids may be of any length: ‖c_i‖² + ‖c_j‖² − 2⟨c_i, c_j⟩ of near copies then takes float64.
inline Type centroid_type(Type type, int64_t total_rows, int64_t dim, const Spec& spec) {
    if (type == Type::f64 || (!spec.normalize && !spec.normalize_centroids)) return Type::f64;
    const bool few = total_rows * dim <= (1 << 16) && total_rows <= 4096;
    return type == Type::bf16 && has_bf16_products() && !few ? Type::f16 : Type::f32;
}

// Length of rows in a type: products of bf16 take whole tiles.
inline int64_t padded(int64_t dim, Type type) { return type == Type::bf16 || type == Type::f16 ? round_up(dim, 32) : dim; }

// Whether rows of moderate norms can be read by products where they are.
inline bool can_be_operand(const Rows& rows) {
    const Type type = operand_type_of(rows.type);
    if (type != rows.type) return false;
    return type != Type::bf16 ||
           (rows.dim % 32 == 0 && rows.stride % 2 == 0 && reinterpret_cast<uintptr_t>(rows.data) % 4 == 0);
}

inline int64_t bytes_of(Type type) {
    return type == Type::f64 ? sizeof(double) : type == Type::f32 ? sizeof(float) : sizeof(uint16_t);
}

// rows.cpp ------------------------------------------------------------------------------------------------------------

// factors: per modality, empty without InfoNCE or where rows are taken as they are. cosines [P, n].
// Returns for each modality whether all norms are moderate, so that rows can be operands as they are.
std::vector<bool> row_statistics(const std::vector<Rows>& embeddings, const Spec& spec, const std::vector<Numbers>& factors,
                                 double* cosines, double* sums);

// factors [n] of one modality; whether its norms are moderate.
bool inverse_norms(const Rows& rows, Numbers factors);

// out [n, out.dim], padded with zeros; if `factors` is given, rows are put at a norm in [1, 2) and factors follow.
void copy_rows(const Rows& in, const Rows& out, const Numbers* factors);

void centroids(const std::vector<Rows>& embeddings, const double* sums, double uniformity_t, int64_t total_rows,
               const Spec& spec, const Rows& out, Numbers bias, double* scale);

struct GradientOfRows {
    std::vector<Rows> embeddings;
    Spec spec;
    std::vector<int> targets;
    int64_t first_row, num_rows;
    std::vector<Numbers> factors;            // per target, of the rows asked for; data is null for ones
    std::vector<Rows> products;              // per target; data is null without InfoNCE
    Rows centroid_products;                  // of all rows; data is null without CU
    const double* negative_mass;             // [P, n]
    const double* sums;
    const double* centroid_log_sum;          // [n]
    double centroid_total, centroid_reference, centroid_stretch;
    double nce, atp, cu;                     // upstream
    double logit_scale, uniformity_t;
    double unit;
    int64_t total_rows, world_size;
    std::vector<Rows> out;                   // per target
};
void row_gradients(const GradientOfRows& task);

// The power of two that centroids are multiplied by before they are rounded to float16.
double centroid_stretch(const double* sums, int modalities, int64_t dim, int64_t total_rows);

// log_sums.cpp --------------------------------------------------------------------------------------------------------

// How many numbers of a matrix's inner products to keep for the gradient, in so many bytes.
int64_t numbers_to_keep(const Matrix& matrix, int64_t bytes);

// row_logs [m, n], col_logs [m, N]. Writes `entries` of the matrices that have some.
void log_sums(const std::vector<Matrix>& matrices, double* row_logs, double* col_logs);

// softplus_sums.cpp ---------------------------------------------------------------------------------------------------

// softplus [n], sigmoid [n]: sums along rows of ln(1 + 2^(x + bias)) and its derivative, without the diagonal.
void softplus_sums(const Matrix& matrix, double bias, double* softplus, double* sigmoid);

// gradient.cpp --------------------------------------------------------------------------------------------------------

struct Products {
    const double *row_log, *col_log;  // relative to the reference; null for centroids and for a sigmoid
    const double *row_weight, *col_weight;  // null for ones
    bool sigmoid;
    double bias;                    // of a sigmoid, to base 2
    double reference;               // for centroids that of their entries
    void *rows, *cols;              // accumulators, in the type of factors; null if not needed
    int64_t row_stride, col_stride;
    bool first_rows, first_cols;    // whether accumulators are overwritten; those of a symmetric matrix are its rows'
    double* moment;                 // null if not needed
};
void add_products(const Matrix& block, const Products& products);

// terms.cpp -----------------------------------------------------------------------------------------------------------

struct TermsTask {
    int64_t num_rows, total_rows, first_row, dim;
    int modalities, num_pairs;
    Spec spec;
    double weights[3], logit_scale, uniformity_t;
    const double* sums;
    const double* all_cosines;             // [P, N]
    const double *row_logs, *col_logs;     // [P, n], [P, N]
    const double* centroid_logs;           // [N], or null
    double *row_log_sum, *col_log_sum, *negative_mass;
    double *centroid_log_sum, *centroid_summary;
    double loss, terms[5];
};
void terms(TermsTask& task);

struct SoftmaxTask {
    int64_t num_rows, num_cols, total_rows;
    int num_pairs;
    double logit_scale;
    const double *row_log_sum, *col_log_sum, *negative_mass, *cosines;
    double cosine_sum;
    double *rows, *cols;                   // results: relative to the reference
    double reference, positive_moment;  // results
};
void softmax_sums(SoftmaxTask& task);

// From Σ H_ij·x_ij to the gradient with respect to the logit scale; nce: upstream.
double gradient_of_scale(double moment, double positive_moment, double logit_scale, double nce, int64_t pairs, int64_t total_rows);

// step.cpp ------------------------------------------------------------------------------------------------------------

struct StepTask {
    std::vector<Rows> embeddings;  // normalised by the loss
    Spec spec;
    double logit_scale, weights[3], uniformity_t;
    int64_t kept_bytes;
};
struct StepResult {
    double loss, terms[5];
};

size_t step_workspace(const StepTask& task);
void step_forward(const StepTask& task, char* workspace, StepResult& result);

// out: per modality, data null where no gradient is needed. scale_gradient may be null.
void step_backward(const StepTask& task, char* workspace, const double* upstream, const std::vector<Rows>& out,
                   double* scale_gradient);
