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

// Inlines all that is called: vectors given to a function and constants of its loop would go through memory each time.
#define FLATTEN __attribute__((flatten))

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

// `block` numbers of a row.
struct Block {
    V first, second;
};

// Asks for the next row on the way: the hardware follows neither five streams at once nor one across pages.
template <class T, class Widen>
inline auto loader(const Rows& rows, int64_t i, Widen widen) {
    const T *in = static_cast<const T*>(rows.data) + i * rows.stride, *next = in + rows.stride;
    return [in, next, widen](int64_t k, int64_t count) -> Block {
        __builtin_prefetch(next + k);
        if (count == block) return widen(in + k);
        T padded[block] = {};
        std::copy(in + k, in + k + count, padded);
        return widen(padded);
    };
}

// Calls use(load) with a function that gives the `count` numbers from k on of row i.
template <class Use>
inline double with_loader(const Rows& rows, int64_t i, Use use) {
    const auto halves = [](Vec<float> x) -> Block { return {first_half(x), second_half(x)}; };
    switch (rows.type) {
        case Type::bf16:
            return use(loader<uint16_t>(rows, i, [=](const uint16_t* p) { return halves(from_bf16(p)); }));
        case Type::f16:
            return use(loader<uint16_t>(rows, i, [=](const uint16_t* p) { return halves(from_f16(p)); }));
        case Type::f32:
            return use(loader<float>(rows, i, [=](const float* p) { return halves(Vec<float>::load(p)); }));
        default:
            return use(loader<double>(rows, i, [](const double* p) -> Block {
                return {V::load(p), V::load(p + V::size)};
            }));
    }
}

// What sums are made of: four totals side by side hide the latency of an addition; always the same order.
struct Totals {
    V of[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    double sum() const { return ((of[0] + of[1]) + (of[2] + of[3])).sum(); }
};

// Σ term(k, x, total) over the first `dim` numbers x of row i, in vectors, zeros after the last.
template <class Term>
inline double sum_of_row(const Rows& rows, int64_t i, int64_t dim, Term term) {
    return with_loader(rows, i, [=](auto load) {
        Totals totals;
        const auto take = [&](int64_t k, int64_t count, V* of) {
            const Block x = load(k, count);
            of[0] = term(k, x.first, of[0]);
            of[1] = term(k + V::size, x.second, of[1]);
        };
        int64_t k = 0;
        for (; k + 2 * block <= dim; k += 2 * block) {
            take(k, block, totals.of);
            take(k + block, block, totals.of + 2);
        }
        if (k < dim) take(k, std::min(block, dim - k), totals.of);
        if (k + block < dim) take(k + block, dim - k - block, totals.of + 2);
        return totals.sum();
    });
}

// `dim` numbers of row i; rows may have more. Returns the sum of their squares.
double load_row(const Rows& rows, int64_t i, int64_t dim, double* out) {
    return sum_of_row(rows, i, dim, [=](int64_t k, V x, V total) {
        x.store(out + k);
        return fma(x, x, total);
    });
}

// Round value(k), V::size numbers from k on, and store them as row i, with zeros from `dim` on.
template <class Value>
void store_row(const Rows& rows, int64_t i, int64_t dim, Value value) {
    const auto store = [&](auto zero, auto round) {
        using T = decltype(zero);
        T* out = static_cast<T*>(const_cast<void*>(rows.data)) + i * rows.stride;
        int64_t k = 0;
        for (; k + block <= dim; k += block) round(value(k), value(k + V::size), out + k);
        if (k < dim) {
            alignas(64) T rounded[block];
            round(value(k), value(k + V::size), rounded);
            std::copy(rounded, rounded + (dim - k), out + k);
        }
        std::fill(out + dim, out + rows.dim, T(0));
    };
    switch (rows.type) {
        case Type::bf16:
            return store(uint16_t(), [](V x, V y, uint16_t* out) { round_to_bf16(narrowed(x, y), out); });
        case Type::f16:
            return store(uint16_t(), [](V x, V y, uint16_t* out) { to_f16(narrowed(x, y), out); });
        case Type::f32:
            return store(float(), [](V x, V y, float* out) { narrowed(x, y).store(out); });
        case Type::f64:
            return store(double(), [](V x, V y, double* out) {
                x.store(out);
                y.store(out + V::size);
            });
    }
}

// Calls visit(k) for every vector of a row.
template <class Visit>
inline void for_vectors(int64_t length, Visit visit) {
    for (int64_t k = 0; k < length; k += V::size) visit(k);
}

// Σ term(k, total).
template <class Term>
inline double sum_of(int64_t length, Term term) {
    Totals totals;
    int64_t k = 0;
    for (; k + 4 * V::size <= length; k += 4 * V::size) {
        for (int l = 0; l < 4; ++l) totals.of[l] = term(k + l * V::size, totals.of[l]);
    }
    for (int l = 0; k < length; k += V::size, ++l) totals.of[l] = term(k, totals.of[l]);
    return totals.sum();
}

double dot(const double* x, const double* y, int64_t length) {
    return sum_of(length, [=](int64_t k, V total) { return fma(V::load(x + k), V::load(y + k), total); });
}

inline void add_to(double* total, V x) { (V::load(total) + x).store(total); }

// A row of float64 whose squares leave the range is multiplied by a power of two, which is returned; 1 for others.
double into_range(double* v, int64_t length, double& square) {
    if (square > 0x1p-1000 && square < INFINITY) return 1;
    double largest = 0;
    for (int64_t k = 0; k < length; ++k) largest = std::max(largest, std::abs(v[k]));
    if (!(largest > 0 && largest < INFINITY) || square != square) return 1;
    const double power = std::exp2(-std::floor(std::log2(largest)));
    for (int64_t k = 0; k < length; ++k) v[k] *= power;
    square = dot(v, v, length);
    return power;
}

// One row of every modality in float64, and what it is multiplied by to be as the loss uses it: unit vectors are made where
// they are added.
class Row {
  public:
    Row(const std::vector<Rows>& embeddings, const Spec& spec)
        : embeddings_(embeddings),
          normalize_(spec.normalize),
          normalize_centroids_(spec.normalize_centroids),
          dim_(embeddings[0].dim),
          length_(length_of(dim_)),
          modalities_(static_cast<int>(embeddings.size())),
          numbers_(modalities_ * length_),
          norms_(modalities_),
          divisors_(modalities_),
          inverses_(modalities_),
          factors_(modalities_),
          products_(modalities_ * modalities_) {}

    void load(int64_t i) {
        for (int m = 0; m < modalities_; ++m) {
            double* v = vector(m);
            double square = load_row(embeddings_[m], i, dim_, v);
            const double power = into_range(v, length_, square);
            norms_[m] = std::sqrt(square) / power;
            divisors_[m] = std::max(norms_[m], norm_eps) * power;
            inverses_[m] = 1 / divisors_[m];
            factors_[m] = normalize_ ? inverses_[m] : 1 / power;
            product(m, m) = square;
            for (int k = 0; k < m; ++k) product(k, m) = dot(v, vector(k), length_);
        }
        if (const Squares s = square_of_sum(); normalize_ && !(s.of_sum > cancelled * s.sum)) make_units();
    }

    // By vectors.
    auto used(int m) const {
        return [v = vector(m), factor = V::all(factors_[m])](int64_t k) { return V::load(v + k) * factor; };
    }
    auto sum() const {
        return [u = used(0), v = used(1), more = vector(2), factors = factors_.data() + 2, count = modalities_ - 2,
                length = length_](int64_t k) {
            V total = u(k) + v(k);
            for (int m = 0; m < count; ++m) total = total + V::load(more + m * length + k) * V::all(factors[m]);
            return total;
        };
    }
    auto direction(int m) const {
        return [v = vector(m), inverse = V::all(inverses_[m])](int64_t k) { return V::load(v + k) * inverse; };
    }

    // Of the directions of two modalities, and of their rows as the loss uses them.
    double cosine(int m, int k) { return product(m, k) * inverses_[m] * inverses_[k]; }
    double used_product(int m, int k) { return product(m, k) * factors_[m] * factors_[k]; }
    double square_distance(int m, int k) {
        const double squares = used_product(m, m) + used_product(k, k), square = squares - 2 * used_product(m, k);
        if (square > cancelled * squares) return square;
        return square_of([u = used(m), v = used(k)](int64_t at) { return u(at) - v(at); });
    }

    // Norm of the mean over modalities.
    double centroid_norm() {
        const Squares s = square_of_sum();
        return std::sqrt(s.of_sum > cancelled * s.sum ? s.of_sum : square_of(sum())) / modalities_;
    }
    // The mean over modalities of that norm, put back on the sphere if centroids are.
    auto centroid(double norm) const {
        const V share = V::all(1.0 / (modalities_ * (normalize_centroids_ ? std::max(norm, norm_eps) : 1.0)));
        return [sum = sum(), share](int64_t k) { return sum(k) * share; };
    }

    double norm(int m) const { return norms_[m]; }

  private:
    static constexpr double cancelled = 1e-3;  // digits are lost below: sums of squares are then taken number by number

    double* vector(int m) { return numbers_.data() + m * length_; }
    const double* vector(int m) const { return numbers_.data() + m * length_; }
    double& product(int m, int k) { return products_[std::min(m, k) * modalities_ + std::max(m, k)]; }

    // ‖Σ used(m)‖² as far as products tell, and Σ ‖used(m)‖².
    struct Squares {
        double of_sum, sum;
    };
    Squares square_of_sum() {
        Squares result = {0, 0};
        for (int m = 0; m < modalities_; ++m) {
            result.sum += used_product(m, m);
            for (int k = 0; k < m; ++k) result.of_sum += 2 * used_product(k, m);
        }
        result.of_sum += result.sum;
        return result;
    }

    // Rounded as quotients are, opposite ones cancel to nothing.
    void make_units() {
        for (int m = 0; m < modalities_; ++m) {
            double* v = vector(m);
            for (int64_t k = 0; k < length_; ++k) v[k] /= divisors_[m];
            inverses_[m] = factors_[m] = 1;
            for (int k = 0; k <= m; ++k) product(k, m) = dot(v, vector(k), length_);
        }
    }

    template <class Value>
    double square_of(Value value) const {
        return sum_of(length_, [=](int64_t k, V total) {
            const V x = value(k);
            return fma(x, x, total);
        });
    }

    const std::vector<Rows>& embeddings_;
    bool normalize_, normalize_centroids_;
    int64_t dim_, length_;
    int modalities_;
    Doubles numbers_;
    std::vector<double> norms_, divisors_, inverses_, factors_, products_;
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
    const auto pairs = unordered_pairs(modalities), nce = nce_pairs(modalities, spec);
    const Chunks chunks(n, modalities * dim);
    const int64_t size = (modalities + 1) * length + round_up(sum_scalars, 8);
    Doubles partial(chunks.count * size);
    std::vector<char> all_moderate(chunks.count * modalities, 1);
    chunks.run([&](int64_t chunk, int64_t begin, int64_t end) FLATTEN {
        double* out = partial.data() + chunk * size;
        double* scalars = out + (modalities + 1) * length;
        Row row(embeddings, spec);
        for (int64_t i = begin; i < end; ++i) {
            row.load(i);
            for (int m = 0; m < modalities; ++m) {
                const double norm = row.norm(m);
                if (!factors.empty()) factors[m].set(i, factor_of(norm));
                if (norm > 0 && !is_moderate(norm)) all_moderate[chunk * modalities + m] = 0;
                for_vectors(length, [to = out + m * length, u = row.direction(m)](int64_t k) { add_to(to + k, u(k)); });
            }
            for (const Pair& p : pairs) scalars[1] += row.cosine(p.row, p.col);
            for (size_t p = 0; p < nce.size(); ++p) {
                const double cosine = row.used_product(nce[p].row, nce[p].col);
                cosines[static_cast<int64_t>(p) * n + i] = cosine;
                scalars[3] += cosine;
            }
            for (int m = 0; spec.atp && m < modalities; ++m) {
                if (m != spec.anchor) scalars[0] += row.square_distance(m, static_cast<int>(spec.anchor));
            }
            if (spec.cu) {
                const double norm = row.centroid_norm();
                for_vectors(length, [to = out + modalities * length, c = row.centroid(norm)](int64_t k) { add_to(to + k, c(k)); });
                const double after = spec.normalize_centroids ? norm / std::max(norm, norm_eps) : norm;
                scalars[2] += after * after;
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
    chunks.run([&](int64_t chunk, int64_t begin, int64_t end) FLATTEN {
        Doubles row(length);
        for (int64_t i = begin; i < end; ++i) {
            double square = load_row(rows, i, rows.dim, row.data());
            const double power = into_range(row.data(), length, square), norm = std::sqrt(square) / power;
            factors.set(i, factor_of(norm));
            if (norm > 0 && !is_moderate(norm)) moderate[chunk] = 0;
        }
    });
    return std::all_of(moderate.begin(), moderate.end(), [](char m) { return m != 0; });
}

void copy_rows(const Rows& in, const Rows& out, const Numbers* factors) {
    const int64_t length = length_of(in.dim);
    Chunks(in.count, in.dim).run([&](int64_t, int64_t begin, int64_t end) FLATTEN {
        Doubles row(length);
        for (int64_t i = begin; i < end; ++i) {
            double square = load_row(in, i, in.dim, row.data()), scale = 1;
            if (factors) {
                const double power = into_range(row.data(), length, square), norm = std::sqrt(square);
                if (norm > 0 && norm < INFINITY) scale = std::exp2(-std::floor(std::log2(norm)));
                factors->set(i, norm == 0 ? 1 : 1 / (std::max(norm / power, norm_eps) * power * scale));
            }
            store_row(out, i, in.dim, [v = row.data(), by = V::all(scale)](int64_t k) { return V::load(v + k) * by; });
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
    Chunks(out.count, modalities * dim).run([&](int64_t, int64_t begin, int64_t end) FLATTEN {
        Row row(embeddings, spec);
        Doubles stored(length);
        for (int64_t i = begin; i < end; ++i) {
            row.load(i);
            store_row(out, i, dim, [c = row.centroid(row.centroid_norm()), m = mean.data(), by = V::all(stretch)](int64_t k) {
                return (c(k) - V::load(m + k)) * by;
            });
            // The norm of what was stored: squared distances are then those of one set of points, never negative.
            bias.set(i, -0.5 * log2_e * *scale * load_row(out, i, dim, stored.data()));
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
    Chunks(task.num_rows, static_cast<int64_t>(task.targets.size()) * 3 * dim).run([&](int64_t, int64_t begin, int64_t end) FLATTEN {
        Row row(task.embeddings, spec);
        Doubles buffer(2 * length);
        double *g = buffer.data(), *through = g + length;
        for (int64_t local = begin; local < end; ++local) {
            const int64_t i = task.first_row + local;
            row.load(i);
            if (with_centroids) {
                const double norm = row.centroid_norm();
                const V own = V::all(-cu_weight * std::exp2(task.centroid_log_sum[i] - task.centroid_total));
                const V share = V::all(product_weight);
                const auto c = row.centroid(norm);
                const double along = sum_of_row(task.centroid_products, i, dim, [=, m = mean.data()](int64_t k, V product, V total) {
                    const V x = c(k);
                    const V result = fma(own, x - V::load(m + k), share * product);
                    result.store(through + k);
                    return fma(result, x, total);
                });
                const double part = 1.0 / modalities;
                if (spec.normalize_centroids) {
                    const ThroughNormalization back(along, norm, part);
                    for_vectors(length, [=](int64_t k) { back(V::load(through + k), c(k)).store(through + k); });
                } else {
                    for_vectors(length, [=](int64_t k) { (V::load(through + k) * V::all(part)).store(through + k); });
                }
            }
            for (size_t t = 0; t < task.targets.size(); ++t) {
                const int target = task.targets[t];
                const bool with_products = task.products[t].data != nullptr;
                // Beside products and centroids, what InfoNCE's positives and ATP contribute: own·z + Σ other·partner.
                const double* base = through;
                double own = 0, other = 0;
                int partner = -1;
                const auto add_partner = [&] {
                    for_vectors(length, [=, y = row.used(partner), by = V::all(other)](int64_t k) {
                        fma(by, y(k), V::load(base + k)).store(g + k);
                    });
                    base = g;
                };
                for (int m = 0; m < modalities; ++m) {
                    if (m == target) continue;
                    double weight_of_partner = 0;
                    for (size_t p = 0; with_products && p < nce.size(); ++p) {
                        if ((nce[p].row == target && nce[p].col == m) || (nce[p].col == target && nce[p].row == m)) {
                            weight_of_partner -= weight * task.negative_mass[static_cast<int64_t>(p) * n + i];
                        }
                    }
                    if (spec.atp && (target == spec.anchor || m == spec.anchor)) {
                        own += atp_weight;
                        weight_of_partner -= atp_weight;
                    }
                    if (weight_of_partner == 0) continue;
                    if (partner >= 0) add_partner();
                    partner = m;
                    other = weight_of_partner;
                }
                const double unscale =
                    with_products ? weight / task.unit / (task.factors[t].data ? task.factors[t][local] : 1) : 0;
                const auto gradient = [=, z = row.used(target), y = row.used(std::max(partner, 0)), by_z = V::all(own),
                                       by_y = V::all(other), by_product = V::all(unscale)](int64_t k, V product, V total) {
                    const V x = z(k), sum = fma(by_y, y(k), fma(by_z, x, fma(product, by_product, V::load(base + k))));
                    sum.store(g + k);
                    return fma(sum, x, total);
                };
                const double along =
                    with_products ? sum_of_row(task.products[t], local, dim, gradient)
                                  : sum_of(length, [=](int64_t k, V total) { return gradient(k, V::zero(), total); });
                if (spec.normalize) {
                    const ThroughNormalization back(along, row.norm(target), world);
                    store_row(task.out[t], local, dim, [=, z = row.used(target)](int64_t k) { return back(V::load(g + k), z(k)); });
                } else {
                    store_row(task.out[t], local, dim, [=](int64_t k) { return V::load(g + k) * V::all(world); });
                }
            }
        }
    });
}
