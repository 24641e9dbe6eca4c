// Everything that is O(N·D): norms, cosines of matching rows, means, centroids, and the gradient of the rows.
//
//     row_statistics    per row and pair: cosine; over rows: ẑ^m, c, ‖ẑ^m − ẑ^a‖², cosines, ‖c‖²
//     copy_rows         rows that cannot be operands as they are: other type, odd strides, norms far from one
//     centroids         2^k·(c_i − mean c), and −t·log2 e·‖c_i − mean c‖² of the numbers as stored
//     row_gradients     g_i  = weight·(Σ_j H_ij y_j / factor_i − Σ_pairs negative_mass_i·ŷ_i)            InfoNCE
//                            + 2·w_atp/(N(M−1))·Σ_partners (ẑ_i − ŷ_i)                                   ATP
//                            + 1/M·J_c·(2t·w_cu/Z)·Σ_j e_ij (c_j − c_i)                                  CU
//                       dz_i = (g_i − ⟨g_i, ẑ_i⟩ẑ_i)/‖z_i‖
//
// A thread takes a chunk of rows and works on one row of every modality at a time, in float64 and in L1. Sums of chunks
// are added in their order: the same bits for the same number of threads. Each function reads M·N·D numbers once.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "operands.h"

namespace {

constexpr int64_t numbers_per_thread = 1 << 14;

// Contiguous chunks of rows, one per thread.
struct Chunks {
    int64_t rows, count, each;
    Chunks(int64_t n, int64_t numbers_per_row) : rows(n) {
        const int64_t wanted = std::max<int64_t>(n * numbers_per_row / numbers_per_thread, 1);
        count = std::max<int64_t>(std::min<int64_t>({num_threads(), wanted, n}), 1);
        each = (n + count - 1) / count;
    }
    template <class Visit>
    void run(Visit visit) const {
        run_tasks(count, count > 1, [&](int64_t c, int) { visit(c, std::min(c * each, rows), std::min((c + 1) * each, rows)); });
    }
};

float widened_bf16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof(x));
    return x;
}

uint16_t rounded_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, not_a_number = bits >> 16 | 0x40;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? not_a_number : rounded);
}

// Calls visit(first, count) for blocks of as many numbers as a vector of floats has.
template <class Visit>
void for_blocks(int64_t count, Visit visit) {
    constexpr int64_t size = Vec<float>::size;
    for (int64_t k = 0; k < count; k += size) visit(k, std::min(size, count - k));
}

// One row in float64.
void load_row(const Rows& rows, int64_t i, double* out) {
    const int64_t at = i * rows.stride, dim = rows.dim;
    switch (rows.type) {
        case Type::bf16: {
            const uint16_t* in = static_cast<const uint16_t*>(rows.data) + at;
#pragma omp simd
            for (int64_t k = 0; k < dim; ++k) out[k] = widened_bf16(in[k]);
            break;
        }
        case Type::f16: {
            const uint16_t* in = static_cast<const uint16_t*>(rows.data) + at;
            for_blocks(dim, [&](int64_t k, int64_t count) {
                uint16_t half[Vec<float>::size] = {};
                float wide[Vec<float>::size];
                std::memcpy(half, in + k, count * sizeof(uint16_t));
                from_f16(half).store(wide);
                for (int64_t l = 0; l < count; ++l) out[k + l] = wide[l];
            });
            break;
        }
        case Type::f32: {
            const float* in = static_cast<const float*>(rows.data) + at;
#pragma omp simd
            for (int64_t k = 0; k < dim; ++k) out[k] = in[k];
            break;
        }
        case Type::f64:
            std::memcpy(out, static_cast<const double*>(rows.data) + at, dim * sizeof(double));
            break;
    }
}

// Round a row and store it, with zeros from `dim` on.
void store_row(const Rows& rows, int64_t i, const double* values, int64_t dim) {
    const int64_t at = i * rows.stride;
    switch (rows.type) {
        case Type::bf16: {
            uint16_t* out = static_cast<uint16_t*>(const_cast<void*>(rows.data)) + at;
#pragma omp simd
            for (int64_t k = 0; k < dim; ++k) out[k] = rounded_bf16(static_cast<float>(values[k]));
            std::fill(out + dim, out + rows.dim, uint16_t{0});
            break;
        }
        case Type::f16: {
            uint16_t* out = static_cast<uint16_t*>(const_cast<void*>(rows.data)) + at;
            for_blocks(dim, [&](int64_t k, int64_t count) {
                float wide[Vec<float>::size] = {};
                uint16_t half[Vec<float>::size];
                for (int64_t l = 0; l < count; ++l) wide[l] = static_cast<float>(values[k + l]);
                to_f16(Vec<float>::load(wide), half);
                std::memcpy(out + k, half, count * sizeof(uint16_t));
            });
            std::fill(out + dim, out + rows.dim, uint16_t{0});
            break;
        }
        case Type::f32: {
            float* out = static_cast<float*>(const_cast<void*>(rows.data)) + at;
#pragma omp simd
            for (int64_t k = 0; k < dim; ++k) out[k] = static_cast<float>(values[k]);
            std::fill(out + dim, out + rows.dim, 0.0f);
            break;
        }
        case Type::f64: {
            double* out = static_cast<double*>(const_cast<void*>(rows.data)) + at;
            std::copy(values, values + dim, out);
            std::fill(out + dim, out + rows.dim, 0.0);
            break;
        }
    }
}

// Σ f(k): as many sums side by side as hide the latency of an addition, added up in one order.
template <class Term>
inline double sum_of(int64_t dim, Term term) {
    constexpr int64_t lanes = 32;
    double totals[lanes] = {};
    int64_t k = 0;
    for (; k + lanes <= dim; k += lanes) {
#pragma omp simd
        for (int64_t l = 0; l < lanes; ++l) totals[l] += term(k + l);
    }
    for (int64_t l = 0; k < dim; ++k, ++l) totals[l] += term(k);
    for (int64_t half = lanes / 2; half > 0; half /= 2) {
        for (int64_t l = 0; l < half; ++l) totals[l] += totals[l + half];
    }
    return totals[0];
}

double dot(const double* x, const double* y, int64_t dim) {
    return sum_of(dim, [=](int64_t k) { return x[k] * y[k]; });
}

// out = x / divisor, rounded as a quotient is, so that opposite vectors cancel in a centroid: multiplied by the inverse and
// put right by what is left over. One division per row instead of one per number.
void divide(const double* x, double divisor, double* out, int64_t dim) {
    const double inverse = 1 / divisor;
#pragma omp simd
    for (int64_t k = 0; k < dim; ++k) {
        const double quotient = x[k] * inverse;
        out[k] = __builtin_fma(__builtin_fma(-quotient, divisor, x[k]), inverse, quotient);
    }
}

// Of squares that stay in range, as those of any narrower type do, and of others by a power of two.
double norm_of(const double* v, int64_t dim) {
    const double norm = std::sqrt(dot(v, v, dim));
    if (norm > 0x1p-500 && norm < INFINITY) return norm;
    double largest = 0;
    for (int64_t k = 0; k < dim; ++k) largest = std::max(largest, std::abs(v[k]));
    if (!(largest > 0 && largest < INFINITY) || norm != norm) return norm;
    const double power = std::exp2(-std::floor(std::log2(largest)));
    return std::sqrt(sum_of(dim, [=](int64_t k) { return (v[k] * power) * (v[k] * power); })) / power;
}

// One row of every modality, as the loss uses it.
class Row {
  public:
    Row(const std::vector<Rows>& embeddings, const Spec& spec)
        : embeddings_(embeddings),
          spec_(spec),
          dim_(embeddings[0].dim),
          modalities_(static_cast<int>(embeddings.size())),
          numbers_((2 * modalities_ + 1) * dim_),
          norms_(modalities_) {}

    void load(int64_t i) {
        for (int m = 0; m < modalities_; ++m) {
            double* v = vector(m);
            load_row(embeddings_[m], i, v);
            norms_[m] = norm_of(v, dim_);
            double* u = direction(m);
            divide(v, std::max(norms_[m], norm_eps), u, dim_);
        }
    }

    // The mean over modalities, put back on the sphere if centroids are; its norm before that.
    double centroid() {
        double* c = centroid_data();
        const double share = 1.0 / modalities_;
        std::fill(c, c + dim_, 0.0);
        for (int m = 0; m < modalities_; ++m) {
            const double* v = used(m);
            for (int64_t k = 0; k < dim_; ++k) c[k] += v[k];
        }
        for (int64_t k = 0; k < dim_; ++k) c[k] *= share;
        const double norm = std::sqrt(dot(c, c, dim_));
        if (spec_.normalize_centroids) divide(c, std::max(norm, norm_eps), c, dim_);
        return norm;
    }

    double* vector(int m) { return numbers_.data() + m * dim_; }
    double* direction(int m) { return numbers_.data() + (modalities_ + m) * dim_; }
    double* used(int m) { return spec_.normalize ? direction(m) : vector(m); }
    double* centroid_data() { return numbers_.data() + 2 * modalities_ * dim_; }
    double norm(int m) const { return norms_[m]; }

  private:
    const std::vector<Rows>& embeddings_;
    const Spec& spec_;
    int64_t dim_;
    int modalities_;
    std::vector<double> numbers_, norms_;
};

void add_to(double* total, const double* x, int64_t dim) {
    for (int64_t k = 0; k < dim; ++k) total[k] += x[k];
}

// A row of zeros has cosine 0 whatever its factor; 1 keeps 1/eps out of the products.
double factor_of(double norm) { return norm == 0 ? 1 : 1 / std::max(norm, norm_eps); }

// Products of numbers of such rows stay in the range of float32.
bool is_moderate(double norm) { return norm > 0x1p-30 && norm < 0x1p30; }

// Gradient with respect to v, from that with respect to v/max(‖v‖, eps) = unit, in place.
void through_normalization(double* gradient, const double* unit, double norm, int64_t dim) {
    const double along = norm < norm_eps ? 0 : dot(gradient, unit, dim);
    const double inverse = 1 / std::max(norm, norm_eps);
    for (int64_t k = 0; k < dim; ++k) gradient[k] = (gradient[k] - along * unit[k]) * inverse;
}

}  // namespace

std::vector<bool> row_statistics(const std::vector<Rows>& embeddings, const Spec& spec, const std::vector<Numbers>& factors,
                                 double* cosines, double* sums) {
    const int modalities = static_cast<int>(embeddings.size());
    const int64_t n = embeddings[0].count, dim = embeddings[0].dim;
    const int64_t size = (modalities + 1) * dim + sum_scalars;
    const auto pairs = unordered_pairs(modalities), atp = anchor_pairs(modalities, spec), nce = nce_pairs(modalities, spec);
    const Chunks chunks(n, modalities * dim);
    std::vector<double> partial((chunks.count - 1) * size);
    std::vector<char> all_moderate(chunks.count * modalities, 1);
    chunks.run([&](int64_t chunk, int64_t begin, int64_t end) {
        double* out = chunk == 0 ? sums : partial.data() + (chunk - 1) * size;
        std::fill(out, out + size, 0.0);
        double* scalars = out + (modalities + 1) * dim;
        Row row(embeddings, spec);
        for (int64_t i = begin; i < end; ++i) {
            row.load(i);
            for (int m = 0; m < modalities; ++m) {
                const double norm = row.norm(m);
                if (!factors.empty()) factors[m].set(i, factor_of(norm));
                if (norm > 0 && !is_moderate(norm)) all_moderate[chunk * modalities + m] = 0;
                add_to(out + m * dim, row.direction(m), dim);
            }
            for (const Pair& p : pairs) scalars[1] += dot(row.direction(p.row), row.direction(p.col), dim);
            for (size_t p = 0; p < nce.size(); ++p) {
                const double cosine = dot(row.used(nce[p].row), row.used(nce[p].col), dim);
                cosines[static_cast<int64_t>(p) * n + i] = cosine;
                scalars[3] += cosine;
            }
            if (spec.atp) {
                for (const Pair& p : atp) {
                    const double *x = row.used(p.row), *y = row.used(p.col);
                    scalars[0] += sum_of(dim, [=](int64_t k) { return (x[k] - y[k]) * (x[k] - y[k]); });
                }
            }
            if (spec.cu) {
                row.centroid();
                add_to(out + modalities * dim, row.centroid_data(), dim);
                scalars[2] += dot(row.centroid_data(), row.centroid_data(), dim);
            }
        }
    });
    for (int64_t c = 1; c < chunks.count; ++c) add_to(sums, partial.data() + (c - 1) * size, size);
    std::vector<bool> moderate(modalities, true);
    for (int64_t c = 0; c < chunks.count; ++c) {
        for (int m = 0; m < modalities; ++m) {
            moderate[m] = moderate[m] && all_moderate[c * modalities + m];
        }
    }
    return moderate;
}

bool inverse_norms(const Rows& rows, Numbers factors) {
    const Chunks chunks(rows.count, rows.dim);
    std::vector<char> moderate(chunks.count, 1);
    chunks.run([&](int64_t chunk, int64_t begin, int64_t end) {
        std::vector<double> row(rows.dim);
        for (int64_t i = begin; i < end; ++i) {
            load_row(rows, i, row.data());
            const double norm = norm_of(row.data(), rows.dim);
            factors.set(i, factor_of(norm));
            if (norm > 0 && !is_moderate(norm)) moderate[chunk] = 0;
        }
    });
    return std::all_of(moderate.begin(), moderate.end(), [](char m) { return m != 0; });
}

void copy_rows(const Rows& in, const Rows& out, const Numbers* factors) {
    Chunks(in.count, in.dim).run([&](int64_t, int64_t begin, int64_t end) {
        std::vector<double> row(in.dim);
        for (int64_t i = begin; i < end; ++i) {
            load_row(in, i, row.data());
            if (factors) {
                const double norm = norm_of(row.data(), in.dim);
                const double power = norm > 0 && norm < INFINITY ? std::exp2(-std::floor(std::log2(norm))) : 1;
                for (double& x : row) x *= power;
                factors->set(i, norm == 0 ? 1 : 1 / (std::max(norm, norm_eps) * power));
            }
            store_row(out, i, row.data(), in.dim);
        }
    });
}

double centroid_stretch(const double* sums, int modalities, int64_t dim, int64_t total_rows) {
    const double *sum = sums + modalities * dim, *scalars = sum + dim;
    const double rows = static_cast<double>(total_rows);
    const double spread = scalars[2] / rows - dot(sum, sum, dim) / (rows * rows);
    return std::exp2(std::floor(-0.5 * std::log2(std::max(spread, 0x1p-24))));
}

void centroids(const std::vector<Rows>& embeddings, const double* sums, double uniformity_t, int64_t total_rows,
               const Spec& spec, const Rows& out, Numbers bias, double* scale) {
    const int modalities = static_cast<int>(embeddings.size());
    const int64_t dim = embeddings[0].dim;
    const double stretch = out.type == Type::f16 ? centroid_stretch(sums, modalities, dim, total_rows) : 1;
    *scale = 2 * uniformity_t / (stretch * stretch);
    std::vector<double> mean(sums + modalities * dim, sums + (modalities + 1) * dim);
    for (double& x : mean) x /= static_cast<double>(total_rows);
    Chunks(out.count, modalities * dim).run([&](int64_t, int64_t begin, int64_t end) {
        Row row(embeddings, spec);
        for (int64_t i = begin; i < end; ++i) {
            row.load(i);
            row.centroid();
            double* c = row.centroid_data();
            for (int64_t k = 0; k < dim; ++k) c[k] = (c[k] - mean[k]) * stretch;
            store_row(out, i, c, dim);
            load_row({out.data, out.type, out.count, dim, out.stride}, i, c);
            // The norm of what was stored: squared distances are then those of one set of points, never negative.
            bias.set(i, -0.5 * log2_e * *scale * dot(c, c, dim));
        }
    });
}

void row_gradients(const GradientOfRows& task) {
    const Spec& spec = task.spec;
    const int modalities = static_cast<int>(task.embeddings.size());
    const int64_t n = task.embeddings[0].count, dim = task.embeddings[0].dim;
    const auto nce = nce_pairs(modalities, spec);
    const double rows = static_cast<double>(task.total_rows);
    const double weight = task.nce * task.logit_scale / (2 * rows * static_cast<double>(std::max<size_t>(nce.size(), 1)));
    const double atp_weight = 2 * task.atp / (rows * (modalities - 1));
    const double cu_weight = 2 * task.uniformity_t * task.cu;
    const bool with_centroids = task.centroid_products.data != nullptr;
    const double product_weight =
        with_centroids ? cu_weight * std::exp2(task.centroid_reference - task.centroid_total) / task.centroid_stretch : 0;
    Chunks(task.num_rows, static_cast<int64_t>(task.targets.size()) * 3 * dim).run([&](int64_t, int64_t begin, int64_t end) {
        Row row(task.embeddings, spec);
        std::vector<double> gradient(dim), through(dim), product(dim), mean(dim);
        if (with_centroids) {
            for (int64_t k = 0; k < dim; ++k) mean[k] = task.sums[modalities * dim + k] / rows;
        }
        const auto load = [&](const Rows& from, int64_t i) {
            load_row({from.data, from.type, from.count, dim, from.stride}, i, product.data());
        };
        for (int64_t local = begin; local < end; ++local) {
            const int64_t i = task.first_row + local;
            row.load(i);
            if (with_centroids) {
                const double norm = row.centroid();
                const double* c = row.centroid_data();
                const double own = cu_weight * std::exp2(task.centroid_log_sum[i] - task.centroid_total);
                load(task.centroid_products, i);
                for (int64_t k = 0; k < dim; ++k) through[k] = product_weight * product[k] - own * (c[k] - mean[k]);
                if (spec.normalize_centroids) through_normalization(through.data(), c, norm, dim);
                for (double& x : through) x /= modalities;
            }
            for (size_t t = 0; t < task.targets.size(); ++t) {
                const int target = task.targets[t];
                double* g = gradient.data();
                const double* z = row.used(target);
                if (with_centroids) {
                    std::copy(through.begin(), through.end(), g);
                } else {
                    std::fill(g, g + dim, 0.0);
                }
                if (task.products[t].data) {
                    load(task.products[t], local);
                    const double factor = task.factors[t].data ? task.factors[t][local] : 1;
                    const double scaled = weight / task.unit / factor;
                    for (int64_t k = 0; k < dim; ++k) g[k] += scaled * product[k];
                    for (size_t p = 0; p < nce.size(); ++p) {
                        if (nce[p].row != target && nce[p].col != target) continue;
                        const double* partner = row.used(nce[p].row == target ? nce[p].col : nce[p].row);
                        const double share = weight * task.negative_mass[static_cast<int64_t>(p) * n + i];
                        for (int64_t k = 0; k < dim; ++k) g[k] -= share * partner[k];
                    }
                }
                if (spec.atp) {
                    for (int m = 0; m < modalities; ++m) {
                        if (m == target || (target != spec.anchor && m != spec.anchor)) continue;
                        const double* partner = row.used(m);
                        for (int64_t k = 0; k < dim; ++k) g[k] += atp_weight * (z[k] - partner[k]);
                    }
                }
                if (spec.normalize) through_normalization(g, z, row.norm(target), dim);
                const double world = static_cast<double>(task.world_size);
                for (int64_t k = 0; k < dim; ++k) g[k] *= world;
                store_row(task.out[t], local, g, dim);
            }
        }
    });
}
