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

using V = Vec<double>;

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

// ---- rows in float64 ------------------------------------------------------------------------------------------------
// A row in float64 is `length` numbers: those of the embedding, then zeros up to whole vectors of floats.

constexpr int64_t block = Vec<float>::size;

int64_t length_of(int64_t dim) { return round_up(dim, block); }

// Zeros at the begin of a cache line: a vector that lies across two costs twice as much.
class Doubles {
  public:
    explicit Doubles(int64_t count) : lines_(static_cast<size_t>(count + 7) / 8) {}
    double* data() { return lines_.data()->numbers; }
    const double* data() const { return lines_.data()->numbers; }

  private:
    struct alignas(64) Line {
        double numbers[8] = {};
    };
    std::vector<Line> lines_;
};

template <class Load>
inline void widen(int64_t dim, double* out, Load load) {
    const auto put = [&](int64_t k, Vec<float> x) {
        first_half(x).store(out + k);
        second_half(x).store(out + k + V::size);
    };
    int64_t k = 0;
    for (; k + block <= dim; k += block) put(k, load(k, block));
    if (k < dim) put(k, load(k, dim - k));
}

template <class T, class Vector>
inline auto loader(const void* data, int64_t at, Vector vector) {
    return [in = static_cast<const T*>(data) + at, vector](int64_t k, int64_t count) {
        if (count == block) return vector(in + k);
        T padded[block] = {};
        std::copy(in + k, in + k + count, padded);
        return vector(padded);
    };
}

// `dim` numbers of row i; rows may have more.
void load_row(const Rows& rows, int64_t i, int64_t dim, double* out) {
    const int64_t at = i * rows.stride;
    switch (rows.type) {
        case Type::bf16:
            return widen(dim, out, loader<uint16_t>(rows.data, at, [](const uint16_t* p) { return from_bf16(p); }));
        case Type::f16:
            return widen(dim, out, loader<uint16_t>(rows.data, at, [](const uint16_t* p) { return from_f16(p); }));
        case Type::f32:
            return widen(dim, out, loader<float>(rows.data, at, [](const float* p) { return Vec<float>::load(p); }));
        case Type::f64:
            std::copy_n(static_cast<const double*>(rows.data) + at, dim, out);
            std::fill(out + dim, out + length_of(dim), 0.0);
    }
}

template <class T, class Round>
inline void narrow(const double* values, int64_t dim, T* out, Round round) {
    alignas(64) T rounded[block];
    for (int64_t k = 0; k < dim; k += block) {
        const int64_t count = std::min(block, dim - k);
        T* to = count == block ? out + k : rounded;
        round(narrowed(V::load(values + k), V::load(values + k + V::size)), to);
        if (count < block) std::copy(rounded, rounded + count, out + k);
    }
}

// Round a row and store it, with zeros from `dim` on.
void store_row(const Rows& rows, int64_t i, const double* values, int64_t dim) {
    const int64_t at = i * rows.stride;
    const auto store = [&](auto zero, auto round) {
        using T = decltype(zero);
        T* out = static_cast<T*>(const_cast<void*>(rows.data)) + at;
        narrow(values, dim, out, round);
        std::fill(out + dim, out + rows.dim, T(0));
    };
    switch (rows.type) {
        case Type::bf16:
            return store(uint16_t(), [](Vec<float> x, uint16_t* out) { round_to_bf16(x, out); });
        case Type::f16:
            return store(uint16_t(), [](Vec<float> x, uint16_t* out) { to_f16(x, out); });
        case Type::f32:
            return store(float(), [](Vec<float> x, float* out) { x.store(out); });
        case Type::f64: {
            double* out = static_cast<double*>(const_cast<void*>(rows.data)) + at;
            std::copy_n(values, dim, out);
            std::fill(out + dim, out + rows.dim, 0.0);
        }
    }
}

// Calls visit(k) for every vector of a row.
template <class Visit>
inline void for_vectors(int64_t length, Visit visit) {
    for (int64_t k = 0; k < length; k += V::size) visit(k);
}

// Σ term(k): four sums side by side hide the latency of an addition; always the same order.
template <class Term>
inline double sum_of(int64_t length, Term term) {
    V totals[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    int64_t k = 0;
    for (; k + 4 * V::size <= length; k += 4 * V::size) {
        for (int l = 0; l < 4; ++l) totals[l] = term(k + l * V::size, totals[l]);
    }
    for (int l = 0; k < length; k += V::size, ++l) totals[l] = term(k, totals[l]);
    return ((totals[0] + totals[1]) + (totals[2] + totals[3])).sum();
}

double dot(const double* x, const double* y, int64_t length) {
    return sum_of(length, [=](int64_t k, V total) { return fma(V::load(x + k), V::load(y + k), total); });
}

// x / divisor, rounded as a quotient is, so that opposite vectors cancel in a centroid: multiplied by the inverse and put
// right by what is left over. One division per row instead of one per number.
struct Divide {
    V minus_divisor, inverse;
    explicit Divide(double divisor) : minus_divisor(V::all(-divisor)), inverse(V::all(1 / divisor)) {}
    V operator()(V x) const {
        const V quotient = x * inverse;
        return fma(fma(quotient, minus_divisor, x), inverse, quotient);
    }
};

void add_to(double* total, const double* x, int64_t length) {
    for_vectors(length, [=](int64_t k) { (V::load(total + k) + V::load(x + k)).store(total + k); });
}

// Of squares that stay in range, as those of any narrower type do, and of others by a power of two.
double norm_of(const double* v, int64_t length) {
    const double norm = std::sqrt(dot(v, v, length));
    if (norm > 0x1p-500 && norm < INFINITY) return norm;
    double largest = 0;
    for (int64_t k = 0; k < length; ++k) largest = std::max(largest, std::abs(v[k]));
    if (!(largest > 0 && largest < INFINITY) || norm != norm) return norm;
    const double power = std::exp2(-std::floor(std::log2(largest)));
    const V scale = V::all(power);
    return std::sqrt(sum_of(length, [=](int64_t k, V total) {
               const V x = V::load(v + k) * scale;
               return fma(x, x, total);
           })) /
           power;
}

// One row of every modality, as the loss uses it.
class Row {
  public:
    Row(const std::vector<Rows>& embeddings, const Spec& spec)
        : embeddings_(embeddings),
          spec_(spec),
          dim_(embeddings[0].dim),
          length_(length_of(dim_)),
          modalities_(static_cast<int>(embeddings.size())),
          numbers_((2 * modalities_ + 1) * length_),
          norms_(modalities_) {}

    void load(int64_t i) {
        for (int m = 0; m < modalities_; ++m) {
            double *v = vector(m), *u = direction(m);
            load_row(embeddings_[m], i, dim_, v);
            norms_[m] = norm_of(v, length_);
            const Divide divide(std::max(norms_[m], norm_eps));
            for_vectors(length_, [=](int64_t k) { divide(V::load(v + k)).store(u + k); });
        }
    }

    // The mean over modalities, put back on the sphere if centroids are; its norm before that.
    double centroid() {
        double* c = centroid_data();
        const V share = V::all(1.0 / modalities_);
        const double norm = std::sqrt(sum_of(length_, [&](int64_t k, V total) {
            V mean = V::load(used(0) + k);
            for (int m = 1; m < modalities_; ++m) mean = mean + V::load(used(m) + k);
            mean = mean * share;
            mean.store(c + k);
            return fma(mean, mean, total);
        }));
        if (spec_.normalize_centroids) {
            const Divide divide(std::max(norm, norm_eps));
            for_vectors(length_, [=](int64_t k) { divide(V::load(c + k)).store(c + k); });
        }
        return norm;
    }

    double* vector(int m) { return numbers_.data() + m * length_; }
    double* direction(int m) { return numbers_.data() + (modalities_ + m) * length_; }
    double* used(int m) { return spec_.normalize ? direction(m) : vector(m); }
    double* centroid_data() { return numbers_.data() + 2 * modalities_ * length_; }
    double norm(int m) const { return norms_[m]; }
    int64_t length() const { return length_; }

  private:
    const std::vector<Rows>& embeddings_;
    const Spec& spec_;
    int64_t dim_, length_;
    int modalities_;
    Doubles numbers_;
    std::vector<double> norms_;
};

// A row of zeros has cosine 0 whatever its factor; 1 keeps 1/eps out of the products.
double factor_of(double norm) { return norm == 0 ? 1 : 1 / std::max(norm, norm_eps); }

// Products of numbers of such rows stay in the range of float32.
bool is_moderate(double norm) { return norm > 0x1p-30 && norm < 0x1p30; }

// From the gradient g with respect to v/max(‖v‖, eps) = u to that with respect to v: factor·(g − along·u).
struct ThroughNormalization {
    V along, factor;
    ThroughNormalization(double along, double norm, double further = 1)
        : along(V::all(norm < norm_eps ? 0 : -along)), factor(V::all(further / std::max(norm, norm_eps))) {}
    V operator()(V g, V u) const { return fma(along, u, g) * factor; }
};

Doubles mean_centroid(const double* sums, int modalities, int64_t dim, int64_t total_rows) {
    Doubles mean(length_of(dim));
    for (int64_t k = 0; k < dim; ++k) mean.data()[k] = sums[modalities * dim + k] / static_cast<double>(total_rows);
    return mean;
}

}  // namespace

std::vector<bool> row_statistics(const std::vector<Rows>& embeddings, const Spec& spec, const std::vector<Numbers>& factors,
                                 double* cosines, double* sums) {
    const int modalities = static_cast<int>(embeddings.size());
    const int64_t n = embeddings[0].count, dim = embeddings[0].dim, length = length_of(dim);
    const auto pairs = unordered_pairs(modalities), atp = anchor_pairs(modalities, spec), nce = nce_pairs(modalities, spec);
    const Chunks chunks(n, modalities * dim);
    const int64_t size = (modalities + 1) * length + round_up(sum_scalars, 8);
    Doubles partial(chunks.count * size);
    std::vector<char> all_moderate(chunks.count * modalities, 1);
    chunks.run([&](int64_t chunk, int64_t begin, int64_t end) {
        double* out = partial.data() + chunk * size;
        double* scalars = out + (modalities + 1) * length;
        Row row(embeddings, spec);
        for (int64_t i = begin; i < end; ++i) {
            row.load(i);
            for (int m = 0; m < modalities; ++m) {
                const double norm = row.norm(m);
                if (!factors.empty()) factors[m].set(i, factor_of(norm));
                if (norm > 0 && !is_moderate(norm)) all_moderate[chunk * modalities + m] = 0;
                add_to(out + m * length, row.direction(m), length);
            }
            for (const Pair& p : pairs) scalars[1] += dot(row.direction(p.row), row.direction(p.col), length);
            for (size_t p = 0; p < nce.size(); ++p) {
                const double cosine = dot(row.used(nce[p].row), row.used(nce[p].col), length);
                cosines[static_cast<int64_t>(p) * n + i] = cosine;
                scalars[3] += cosine;
            }
            if (spec.atp) {
                for (const Pair& p : atp) {
                    const double *x = row.used(p.row), *y = row.used(p.col);
                    scalars[0] += sum_of(length, [=](int64_t k, V total) {
                        const V difference = V::load(x + k) - V::load(y + k);
                        return fma(difference, difference, total);
                    });
                }
            }
            if (spec.cu) {
                row.centroid();
                double *c = row.centroid_data(), *to = out + modalities * length;
                scalars[2] += sum_of(length, [=](int64_t k, V total) {
                    const V x = V::load(c + k);
                    (V::load(to + k) + x).store(to + k);
                    return fma(x, x, total);
                });
            }
        }
    });
    for (int64_t c = 1; c < chunks.count; ++c) {
        for (int64_t k = 0; k < size; ++k) partial.data()[k] += partial.data()[c * size + k];
    }
    for (int m = 0; m <= modalities; ++m) std::copy_n(partial.data() + m * length, dim, sums + m * dim);
    std::copy_n(partial.data() + (modalities + 1) * length, sum_scalars, sums + (modalities + 1) * dim);
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
    const int64_t length = length_of(rows.dim);
    std::vector<char> moderate(chunks.count, 1);
    chunks.run([&](int64_t chunk, int64_t begin, int64_t end) {
        Doubles row(length);
        for (int64_t i = begin; i < end; ++i) {
            load_row(rows, i, rows.dim, row.data());
            const double norm = norm_of(row.data(), length);
            factors.set(i, factor_of(norm));
            if (norm > 0 && !is_moderate(norm)) moderate[chunk] = 0;
        }
    });
    return std::all_of(moderate.begin(), moderate.end(), [](char m) { return m != 0; });
}

void copy_rows(const Rows& in, const Rows& out, const Numbers* factors) {
    const int64_t length = length_of(in.dim);
    Chunks(in.count, in.dim).run([&](int64_t, int64_t begin, int64_t end) {
        Doubles row(length);
        for (int64_t i = begin; i < end; ++i) {
            load_row(in, i, in.dim, row.data());
            if (factors) {
                const double norm = norm_of(row.data(), length);
                const double power = norm > 0 && norm < INFINITY ? std::exp2(-std::floor(std::log2(norm))) : 1;
                for (int64_t k = 0; k < length; ++k) row.data()[k] *= power;
                factors->set(i, norm == 0 ? 1 : 1 / (std::max(norm, norm_eps) * power));
            }
            store_row(out, i, row.data(), in.dim);
        }
    });
}

double centroid_stretch(const double* sums, int modalities, int64_t dim, int64_t total_rows) {
    const double *sum = sums + modalities * dim, *scalars = sum + dim;
    const double rows = static_cast<double>(total_rows);
    double square = 0;
    for (int64_t k = 0; k < dim; ++k) square += sum[k] * sum[k];
    const double spread = scalars[2] / rows - square / (rows * rows);
    return std::exp2(std::floor(-0.5 * std::log2(std::max(spread, 0x1p-24))));
}

void centroids(const std::vector<Rows>& embeddings, const double* sums, double uniformity_t, int64_t total_rows,
               const Spec& spec, const Rows& out, Numbers bias, double* scale) {
    const int modalities = static_cast<int>(embeddings.size());
    const int64_t dim = embeddings[0].dim, length = length_of(dim);
    const double stretch = out.type == Type::f16 ? centroid_stretch(sums, modalities, dim, total_rows) : 1;
    *scale = 2 * uniformity_t / (stretch * stretch);
    const Doubles mean = mean_centroid(sums, modalities, dim, total_rows);
    Chunks(out.count, modalities * dim).run([&](int64_t, int64_t begin, int64_t end) {
        Row row(embeddings, spec);
        for (int64_t i = begin; i < end; ++i) {
            row.load(i);
            row.centroid();
            double* c = row.centroid_data();
            for_vectors(length, [&, factor = V::all(stretch)](int64_t k) {
                ((V::load(c + k) - V::load(mean.data() + k)) * factor).store(c + k);
            });
            store_row(out, i, c, dim);
            load_row(out, i, dim, c);
            // The norm of what was stored: squared distances are then those of one set of points, never negative.
            bias.set(i, -0.5 * log2_e * *scale * dot(c, c, length));
        }
    });
}

void row_gradients(const GradientOfRows& task) {
    const Spec& spec = task.spec;
    const int modalities = static_cast<int>(task.embeddings.size());
    const int64_t n = task.embeddings[0].count, dim = task.embeddings[0].dim, length = length_of(dim);
    const auto nce = nce_pairs(modalities, spec);
    const double rows = static_cast<double>(task.total_rows), world = static_cast<double>(task.world_size);
    const double weight = task.nce * task.logit_scale / (2 * rows * static_cast<double>(std::max<size_t>(nce.size(), 1)));
    const double atp_weight = 2 * task.atp / (rows * (modalities - 1));
    const double cu_weight = 2 * task.uniformity_t * task.cu;
    const bool with_centroids = task.centroid_products.data != nullptr;
    const double product_weight =
        with_centroids ? cu_weight * std::exp2(task.centroid_reference - task.centroid_total) / task.centroid_stretch : 0;
    const Doubles mean = mean_centroid(task.sums, modalities, dim, task.total_rows);
    Chunks(task.num_rows, static_cast<int64_t>(task.targets.size()) * 3 * dim).run([&](int64_t, int64_t begin, int64_t end) {
        Row row(task.embeddings, spec);
        Doubles buffer(3 * length);
        double *g = buffer.data(), *through = g + length, *product = through + length;
        for (int64_t local = begin; local < end; ++local) {
            const int64_t i = task.first_row + local;
            row.load(i);
            if (with_centroids) {
                const double norm = row.centroid();
                const double* c = row.centroid_data();
                const V own = V::all(-cu_weight * std::exp2(task.centroid_log_sum[i] - task.centroid_total));
                const V share = V::all(product_weight);
                load_row(task.centroid_products, i, dim, through);
                const double along = sum_of(length, [=, &mean](int64_t k, V total) {
                    const V x = V::load(c + k), y = share * V::load(through + k);
                    const V result = fma(own, x - V::load(mean.data() + k), y);
                    result.store(through + k);
                    return fma(result, x, total);
                });
                const double part = 1.0 / modalities;
                if (spec.normalize_centroids) {
                    const ThroughNormalization back(along, norm, part);
                    for_vectors(length, [=](int64_t k) { back(V::load(through + k), V::load(c + k)).store(through + k); });
                } else {
                    for_vectors(length, [=](int64_t k) { (V::load(through + k) * V::all(part)).store(through + k); });
                }
            }
            for (size_t t = 0; t < task.targets.size(); ++t) {
                const int target = task.targets[t];
                const double* z = row.used(target);
                // g += Σ over partners of own·z + other·partner: what InfoNCE's positives and ATP contribute.
                const auto add_partner = [=, &row](int m, double own, double other) {
                    const double* y = row.used(m);
                    const V by_z = V::all(own), by_y = V::all(other);
                    for_vectors(length, [=](int64_t k) {
                        fma(by_y, V::load(y + k), fma(by_z, V::load(z + k), V::load(g + k))).store(g + k);
                    });
                };
                const V scaled = V::all(
                    task.products[t].data ? weight / task.unit / (task.factors[t].data ? task.factors[t][local] : 1) : 0);
                if (task.products[t].data) {
                    load_row(task.products[t], local, dim, product);
                } else {
                    std::fill(product, product + length, 0.0);
                }
                if (with_centroids) {
                    for_vectors(length, [=](int64_t k) {
                        fma(scaled, V::load(product + k), V::load(through + k)).store(g + k);
                    });
                } else {
                    for_vectors(length, [=](int64_t k) { (scaled * V::load(product + k)).store(g + k); });
                }
                for (int m = 0; m < modalities; ++m) {
                    if (m == target) continue;
                    double own = 0, other = 0;
                    for (size_t p = 0; task.products[t].data && p < nce.size(); ++p) {
                        if ((nce[p].row == target && nce[p].col == m) || (nce[p].col == target && nce[p].row == m)) {
                            other -= weight * task.negative_mass[static_cast<int64_t>(p) * n + i];
                        }
                    }
                    if (spec.atp && (target == spec.anchor || m == spec.anchor)) {
                        own += atp_weight;
                        other -= atp_weight;
                    }
                    if (own != 0 || other != 0) add_partner(m, own, other);
                }
                if (spec.normalize) {
                    const ThroughNormalization back(dot(g, z, length), row.norm(target), world);
                    for_vectors(length, [=](int64_t k) { back(V::load(g + k), V::load(z + k)).store(g + k); });
                } else if (world != 1) {
                    for_vectors(length, [=](int64_t k) { (V::load(g + k) * V::all(world)).store(g + k); });
                }
                store_row(task.out[t], local, g, dim);
            }
        }
    });
}
