// A whole evaluation on one process, forward and backward in one call each: the order of gapkernels/plan.py without what
// several processes, blocks and other backends need. Small batches are bound by what the host does between the kernels.
// The bits are those of the plan (python_tests/backends/test_cpu_step.py).
//
//     forward     row_statistics ─► centroids ─► log_sums ─► terms
//     backward    softmax_sums ─► centroids' products; each pair's products ─► row_gradients; scale_gradient
//
// What the backward pass needs lies in one workspace: O(N) numbers, centroids where they are few, and as many inner products
// as there is room for.

#include <memory>

#include "kernels.h"

namespace {

constexpr int64_t largest_kept_centroids = int64_t{16} << 20;  // bytes; more are made again

// Hands out parts of a workspace; from a null base it counts.
class Places {
  public:
    explicit Places(char* base) : at_(reinterpret_cast<uintptr_t>(base)) {}
    template <class T>
    T* take(int64_t count) {
        T* result = reinterpret_cast<T*>(at_);
        at_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        return result;
    }
    Numbers numbers(int64_t count, bool wide) {
        return {wide ? static_cast<void*>(take<double>(count)) : static_cast<void*>(take<float>(count)), wide};
    }
    uintptr_t end() const { return at_; }

  private:
    uintptr_t at_;
};

// The rows of one modality as products read them: in place or copied.
struct OwnOperand {
    Rows rows;
    Numbers factor;
    std::unique_ptr<Workspace> copy;
};

OwnOperand operand_of(const Rows& rows, const Numbers& factor, bool scaled) {
    if (!scaled && can_be_operand(rows)) return {rows, factor, nullptr};
    const Type type = operand_type_of(rows.type);
    const int64_t dim = padded(rows.dim, type), size = rows.count * dim * bytes_of(type);
    auto copy = std::make_unique<Workspace>(Workspace::bytes<char>(size));
    const Rows out{copy->take<char>(size), type, rows.count, dim, dim};
    copy_rows(rows, out, scaled ? &factor : nullptr);
    return {out, factor, std::move(copy)};
}

// One evaluation and where the parts of its workspace are.
class Evaluation {
  public:
    Evaluation(const StepTask& task, char* workspace)
        : task_(task),
          modalities_(static_cast<int>(task.embeddings.size())),
          n_(task.embeddings[0].count),
          dim_(task.embeddings[0].dim),
          pairs_(nce_pairs(modalities_, task.spec)),
          num_pairs_(static_cast<int64_t>(pairs_.size())),
          wide_(task.embeddings[0].type == Type::f64),
          centroid_type_(centroid_type(task.embeddings[0].type, n_, dim_, task.spec)),
          centroid_dim_(padded(dim_, centroid_type_)) {
        Places places(workspace);
        for (int m = 0; num_pairs_ && m < modalities_; ++m) factors_.push_back(places.numbers(n_, wide_));
        immoderate_ = places.take<bool>(modalities_);
        cosines_ = places.take<double>(num_pairs_ * n_);
        sums_ = places.take<double>((modalities_ + 1) * dim_ + sum_scalars);
        row_log_sum_ = places.take<double>(num_pairs_ * n_);
        col_log_sum_ = places.take<double>(num_pairs_ * n_);
        negative_mass_ = places.take<double>(num_pairs_ * n_);
        if (task.spec.cu) {
            centroid_log_sum_ = places.take<double>(n_);
            centroid_summary_ = places.take<double>(2);
            centroid_scale_ = places.take<double>(1);
            centroid_bias_ = places.numbers(n_, centroid_type_ == Type::f64);
            if (keeps_centroids()) centroids_ = places.take<char>(centroid_bytes());
        }
        int64_t budget = task.kept_bytes;
        for (Matrix& m : matrices_of_shape()) {
            const int64_t numbers = budget > 0 ? numbers_to_keep(m, budget) : 0;
            const Numbers kept = places.numbers(numbers, m.rows.type == Type::f64);
            entries_.push_back(numbers ? kept.data : nullptr);
            kept_entries_.push_back(numbers);
            budget -= numbers * bytes_of(compute_type(m.rows.type));
        }
        bytes_ = places.end() - reinterpret_cast<uintptr_t>(workspace);
    }

    size_t bytes() const { return bytes_; }

    void forward(StepResult& result) {
        const std::vector<bool> moderate = row_statistics(task_.embeddings, task_.spec, factors_, cosines_, sums_);
        for (int m = 0; m < modalities_; ++m) immoderate_[m] = !moderate[m];
        Workspace temporary(2 * Workspace::bytes<double>((num_pairs_ + 1) * n_) +
                            Workspace::bytes<char>(keeps_centroids() ? 0 : centroid_bytes()));
        double* row_logs = temporary.take<double>((num_pairs_ + 1) * n_);
        double* col_logs = temporary.take<double>((num_pairs_ + 1) * n_);
        std::vector<OwnOperand> operands = own_operands();
        std::vector<Matrix> matrices;
        for (int64_t p = 0; p < num_pairs_; ++p) matrices.push_back(pair_matrix(p, operands));
        if (task_.spec.cu) {
            if (!keeps_centroids()) centroids_ = temporary.take<char>(centroid_bytes());
            make_centroids();
            matrices.push_back(centroid_matrix());
        }
        if (!matrices.empty()) log_sums(matrices, row_logs, col_logs);
        TermsTask task;
        task.num_rows = task.total_rows = n_;
        task.first_row = 0;
        task.dim = dim_;
        task.modalities = modalities_;
        task.num_pairs = static_cast<int>(num_pairs_);
        task.spec = task_.spec;
        std::copy(task_.weights, task_.weights + 3, task.weights);
        task.logit_scale = task_.logit_scale;
        task.uniformity_t = task_.uniformity_t;
        task.sums = sums_;
        task.all_cosines = cosines_;
        task.row_logs = num_pairs_ ? row_logs : nullptr;
        task.col_logs = num_pairs_ ? col_logs : nullptr;
        task.centroid_logs = task_.spec.cu ? row_logs + num_pairs_ * n_ : nullptr;
        task.row_log_sum = row_log_sum_;
        task.col_log_sum = col_log_sum_;
        task.negative_mass = negative_mass_;
        task.centroid_log_sum = centroid_log_sum_;
        task.centroid_summary = centroid_summary_;
        terms(task);
        result.loss = task.loss;
        std::copy(task.terms, task.terms + 5, result.terms);
    }

    // out: per modality, data null where no gradient is needed. scale_gradient may be null.
    void backward(const double* upstream, const std::vector<Rows>& out, double* scale_gradient) {
        const auto wanted = [&](int m) { return out[m].data != nullptr; };
        bool any = false;
        for (int m = 0; m < modalities_; ++m) any = any || wanted(m);
        Workspace logs(2 * Workspace::bytes<double>(num_pairs_ * n_));
        SoftmaxTask sums{n_, n_, n_, static_cast<int>(num_pairs_), task_.logit_scale, row_log_sum_, col_log_sum_,
                         negative_mass_, cosines_, sums_[(modalities_ + 1) * dim_ + sum_scalars - 1],
                         logs.take<double>(num_pairs_ * n_), logs.take<double>(num_pairs_ * n_), 0, 0};
        softmax_sums(sums);
        std::vector<OwnOperand> operands = any || scale_gradient ? own_operands() : std::vector<OwnOperand>();
        // Room for all products at once, in memory that is used again: large tensors are paid for page by page.
        const int64_t product_dim = num_pairs_ ? operands.empty() ? dim_ : operands[0].rows.dim : 0;
        const bool with_centroids = task_.spec.cu && any;
        const Type type = compute_type(task_.embeddings[0].type), of_centroids = compute_type(centroid_type_);
        const int64_t product_bytes = n_ * product_dim * bytes_of(type);
        const int64_t centroid_product_bytes = n_ * centroid_dim_ * bytes_of(of_centroids);
        // Products of the gradients' type lie where these will: row_gradients reads a row before it writes it.
        const bool in_place = task_.embeddings[0].type == type && product_dim == dim_;
        Workspace room((in_place ? 0 : modalities_ * Workspace::bytes<char>(product_bytes)) +
                       (with_centroids ? Workspace::bytes<char>(centroid_product_bytes) +
                                             Workspace::bytes<char>(centroid_bytes())
                                       : 0));
        GradientOfRows task;
        task.centroid_products = Rows{};
        if (with_centroids) {
            if (!keeps_centroids()) {
                centroids_ = room.take<char>(centroid_bytes());
                make_centroids();
            }
            void* products = room.take<char>(centroid_product_bytes);
            Products add = {};
            add.reference = centroid_summary_[1];
            add.rows = products;
            add.row_stride = centroid_dim_;
            add.first_rows = true;
            add_products(centroid_matrix(), add);
            task.centroid_products = {products, of_centroids, n_, centroid_dim_, centroid_dim_};
        }
        std::vector<Rows> products(modalities_, Rows{});
        for (int m = 0; num_pairs_ && m < modalities_; ++m) {
            if (!wanted(m)) continue;
            products[m] = in_place ? out[m] : Rows{room.take<char>(product_bytes), type, n_, product_dim, product_dim};
        }
        double moment = 0;
        std::vector<bool> received(modalities_);
        for (int64_t p = 0; p < num_pairs_; ++p) {
            const auto [m, k] = pairs_[p];
            if (!wanted(m) && !wanted(k) && !scale_gradient) continue;
            Products add = {};
            add.row_log = sums.rows + p * n_;
            add.col_log = sums.cols + p * n_;
            add.reference = sums.reference;
            add.rows = const_cast<void*>(products[m].data);
            add.cols = const_cast<void*>(products[k].data);
            add.row_stride = products[m].stride;
            add.col_stride = products[k].stride;
            add.first_rows = !received[m];
            add.first_cols = !received[k];
            add.moment = scale_gradient ? &moment : nullptr;
            add_products(pair_matrix(p, operands), add);
            received[m] = received[k] = true;
        }
        if (any) {
            task.embeddings = task_.embeddings;
            task.spec = task_.spec;
            task.first_row = 0;
            task.num_rows = n_;
            for (int m = 0; m < modalities_; ++m) {
                if (!wanted(m)) continue;
                task.targets.push_back(m);
                task.factors.push_back(operands.empty() ? Numbers{nullptr, false} : operands[m].factor);
                task.products.push_back(products[m]);
                task.out.push_back(out[m]);
            }
            task.negative_mass = negative_mass_;
            task.sums = sums_;
            task.centroid_stretch = 1;
            if (with_centroids) {
                task.centroid_log_sum = centroid_log_sum_;
                task.centroid_total = centroid_summary_[0];
                task.centroid_reference = centroid_summary_[1];
                if (centroid_type_ == Type::f16) task.centroid_stretch = centroid_stretch(sums_, modalities_, dim_, n_);
            }
            task.nce = upstream[0];
            task.atp = upstream[1];
            task.cu = upstream[2];
            task.logit_scale = task_.logit_scale;
            task.uniformity_t = task_.uniformity_t;
            task.unit = 1;
            task.total_rows = n_;
            task.world_size = 1;
            row_gradients(task);
        }
        if (scale_gradient) {
            *scale_gradient = num_pairs_ ? gradient_of_scale(moment, sums.positive_moment, task_.logit_scale, upstream[0], num_pairs_, n_) : 0;
        }
    }

  private:
    int64_t centroid_bytes() const {
        return task_.spec.cu ? n_ * centroid_dim_ * bytes_of(centroid_type_) : 0;
    }
    bool keeps_centroids() const { return centroid_bytes() <= largest_kept_centroids; }

    // Matrices as far as their size goes.
    std::vector<Matrix> matrices_of_shape() const {
        std::vector<Matrix> result;
        Matrix m = {};
        const Type type = operand_type_of(task_.embeddings[0].type);
        m.rows = m.cols = {nullptr, type, n_, padded(dim_, type), 0};
        for (int64_t p = 0; p < num_pairs_; ++p) result.push_back(m);
        if (task_.spec.cu) {
            m.rows = m.cols = {nullptr, centroid_type_, n_, centroid_dim_, 0};
            m.symmetric = true;
            result.push_back(m);
        }
        return result;
    }

    std::vector<OwnOperand> own_operands() {
        std::vector<OwnOperand> result;
        for (int m = 0; num_pairs_ && m < modalities_; ++m) {
            const Rows& rows = task_.embeddings[m];
            // A copy puts rows of any norm near one, and its factors follow: they are made anew each time.
            if (immoderate_[m]) inverse_norms(rows, factors_[m]);
            result.push_back(operand_of(rows, factors_[m], immoderate_[m]));
        }
        return result;
    }

    Matrix pair_matrix(int64_t p, const std::vector<OwnOperand>& operands) const {
        const OwnOperand &rows = operands[pairs_[p].row], &cols = operands[pairs_[p].col];
        Matrix m = {};
        m.rows = rows.rows;
        m.cols = cols.rows;
        m.row_factor = rows.factor.data;
        m.col_factor = cols.factor.data;
        m.scale = m.largest = task_.logit_scale * log2_e;  // of unit vectors
        m.entries = entries_[p];
        m.kept_entries = kept_entries_[p];
        return m;
    }

    void make_centroids() {
        centroids(task_.embeddings, sums_, task_.uniformity_t, n_, task_.spec,
                  {centroids_, centroid_type_, n_, centroid_dim_, centroid_dim_}, centroid_bias_, centroid_scale_);
    }

    Matrix centroid_matrix() const {
        Matrix m = {};
        m.rows = m.cols = {centroids_, centroid_type_, n_, centroid_dim_, centroid_dim_};
        m.row_factor = m.col_factor = centroid_bias_.data;
        m.scale = *centroid_scale_ * log2_e;
        m.biased = m.symmetric = true;
        m.entries = entries_.back();
        m.kept_entries = kept_entries_.back();
        return m;
    }

    const StepTask& task_;
    int modalities_;
    int64_t n_, dim_;
    std::vector<Pair> pairs_;
    int64_t num_pairs_;
    bool wide_;
    Type centroid_type_;
    int64_t centroid_dim_;
    size_t bytes_;
    std::vector<Numbers> factors_;
    bool* immoderate_;
    double *cosines_, *sums_, *row_log_sum_, *col_log_sum_, *negative_mass_;
    double *centroid_log_sum_ = nullptr, *centroid_summary_ = nullptr, *centroid_scale_ = nullptr;
    Numbers centroid_bias_ = {nullptr, false};
    void* centroids_ = nullptr;
    std::vector<void*> entries_;
    std::vector<int64_t> kept_entries_;
};

}  // namespace

size_t step_workspace(const StepTask& task) { return Evaluation(task, nullptr).bytes(); }

void step_forward(const StepTask& task, char* workspace, StepResult& result) { Evaluation(task, workspace).forward(result); }

void step_backward(const StepTask& task, char* workspace, const double* upstream, const std::vector<Rows>& out,
                   double* scale_gradient) {
    Evaluation(task, workspace).backward(upstream, out, scale_gradient);
}
