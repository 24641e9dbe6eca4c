// From log sums to the terms of the loss, and from what was saved to what the gradient reads. O(N) in float64.
//
// Per row i and pair: odds o = 2^(L − positive), cross-entropy ln(1 + o), negative mass o/(1 + o), for rows and columns;
// the positive is left out of L, so that both stay exact where a model is nearly right.

#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace {

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// log2(2^a + 2^b); one may be −∞.
double log_add(double a, double b) {
    if (a != a || b != b) return a + b;
    const double larger = std::max(a, b), smaller = std::min(a, b);
    return larger + std::log1p(std::exp2(smaller - larger)) * log2_e;
}

}  // namespace

void terms(TermsTask& task) {
    const int64_t n = task.num_rows, total = task.total_rows, first = task.first_row;
    const double rows = static_cast<double>(total);
    const double exponent_per_cosine = task.logit_scale * log2_e;
    double cross_entropy = 0;
    for (int p = 0; p < task.num_pairs; ++p) {
        constexpr int64_t block = 1024;
        const int64_t blocks = (total + block - 1) / block;
        std::vector<double> partial(blocks);
        run_tasks(blocks, blocks > 1, [&](int64_t b, int) {
            double sum = 0;
            for (int64_t j = b * block; j < std::min((b + 1) * block, total); ++j) {
                const double positive = task.all_cosines[p * total + j] * exponent_per_cosine;
                const double col_log = task.col_logs[p * total + j];
                task.col_log_sum[p * total + j] = log_add(col_log, positive);
                const int64_t i = j - first;
                if (i < 0 || i >= n) continue;
                const double row_log = task.row_logs[p * n + i];
                const double row_odds = (row_log - positive) * ln_2, col_odds = (col_log - positive) * ln_2;
                sum += softplus(row_odds) + softplus(col_odds);
                task.negative_mass[p * n + i] = sigmoid(row_odds) + sigmoid(col_odds);
                task.row_log_sum[p * n + i] = log_add(row_log, positive);
            }
            partial[b] = sum;
        });
        for (const double x : partial) cross_entropy += x;
    }
    const double info_nce = task.num_pairs ? 0.5 * cross_entropy / (rows * task.num_pairs) : 0;

    double uniformity = 0;
    if (task.centroid_logs) {
        double largest = -INFINITY;
        for (int64_t j = 0; j < total; ++j) {
            const double log = task.centroid_logs[j];
            largest = log > largest || log != log ? log : largest;
        }
        const double reference = largest == -INFINITY ? 0 : largest;
        double sum = 0;
        for (int64_t j = 0; j < total; ++j) sum += std::exp2(task.centroid_logs[j] - reference);
        const double log = reference + std::log2(sum) - 1;  // rows count every unordered pair twice
        uniformity = log * ln_2 - std::log(rows * (rows - 1) / 2);
        std::copy(task.centroid_logs + first, task.centroid_logs + first + n, task.centroid_log_sum);
        task.centroid_summary[0] = log;
        task.centroid_summary[1] = largest;
    }

    const double* scalars = task.sums + (task.modalities + 1) * task.dim;
    const auto pairs = unordered_pairs(task.modalities);
    const double align = task.spec.atp ? scalars[0] / (rows * (task.modalities - 1)) : 0;
    const double cosine = scalars[1] / (rows * static_cast<double>(pairs.size()));
    double gap = 0;
    for (const Pair& p : pairs) {
        const double *x = task.sums + p.row * task.dim, *y = task.sums + p.col * task.dim;
        double square = 0;
        for (int64_t k = 0; k < task.dim; ++k) square += (x[k] - y[k]) * (x[k] - y[k]);
        gap += std::sqrt(square) / rows / static_cast<double>(pairs.size());
    }
    const double values[5] = {info_nce, align, uniformity, gap, cosine};
    std::copy(values, values + 5, task.terms);
    const bool present[3] = {task.spec.nce, task.spec.atp, task.spec.cu};
    task.loss = 0;
    for (int t = 0; t < 3; ++t) task.loss += present[t] ? task.weights[t] * values[t] : 0;
}

void softmax_sums(SoftmaxTask& task) {
    const int64_t n = task.num_rows, total = task.total_rows;
    const double exponent_per_cosine = task.logit_scale * log2_e;
    const double count = static_cast<double>(total) * std::max(task.num_pairs, 1);
    // That of the positives: Σ G_ij·x_ij then loses no digits to what positives and negatives have in common.
    task.reference = task.num_pairs ? task.cosine_sum / count * exponent_per_cosine : 0;
    for (int64_t i = 0; i < task.num_pairs * n; ++i) task.rows[i] = task.row_log_sum[i] - task.reference;
    for (int64_t j = 0; j < task.num_pairs * task.num_cols; ++j) task.cols[j] = task.col_log_sum[j] - task.reference;
    double moment = 0;
    const double mean = task.num_pairs ? task.cosine_sum / count : 0;
    for (int64_t i = 0; i < task.num_pairs * n; ++i) moment += task.negative_mass[i] * (task.cosines[i] - mean);
    task.positive_moment = moment;
}

double gradient_of_scale(double moment, double positive_moment, double logit_scale, double nce, int64_t pairs, int64_t total_rows) {
    const double of_cosines = moment / (logit_scale * log2_e) - positive_moment;
    return of_cosines * nce / (2 * static_cast<double>(pairs) * static_cast<double>(total_rows));
}
