// Registers the kernels as operators of torch, through the stable ABI: one build serves several versions of torch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <vector>

#include "products.h"
#include "similarity.h"
#include "tiles.h"

namespace {

using gapkernels::Element;
using gapkernels::Matrix;
using gapkernels::Variant;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLargestSide = int64_t{1} << 22;
constexpr int64_t kMostTiles = int64_t{1} << 30;  // of a launch, or steps: they are numbered in 32 bits

Element element_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "operands must be bfloat16 or float16, got type number ", static_cast<int>(type));
  return type == ScalarType::BFloat16 ? Element::kBFloat16 : Element::kFloat16;
}

// Of one matrix, 128×128 each.
int64_t num_tiles(const Tensor& rows, const Tensor& cols) {
  constexpr int64_t side = gapkernels::kTile;
  return ((rows.size(0) + side - 1) / side) * ((cols.size(0) + side - 1) / side);
}

void check_copyable(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.stride(1) == 1, name, " must have two dimensions, the second of stride 1");
  STD_TORCH_CHECK(t.size(0) > 0 && t.size(0) <= kLargestSide && t.size(1) > 0, name, " is empty or too large");
  // The copy engine's conditions.
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.stride(0) % 8 == 0, name,
                  " must be aligned to 16 bytes with a stride of 8 elements' multiple, got stride ", t.stride(0));
}

Variant checked_variant(int64_t number, const Tensor& rows) {
  STD_TORCH_CHECK(number >= 0 && number < gapkernels::kVariants, "there are ", gapkernels::kVariants,
                  " variants, got number ", number);
  const Variant variant = static_cast<Variant>(number);
  STD_TORCH_CHECK(variant != Variant::kResident || rows.size(1) <= gapkernels::kLargestResidentDim, "rows of at most ",
                  gapkernels::kLargestResidentDim, " numbers can stay in shared memory, got ", rows.size(1));
  return variant;
}

// Of the moment of a block's gradient.
int64_t num_partials(int num_rows, int num_cols, Variant variant) {
  return variant == Variant::kWide ? gapkernels::num_parts<gapkernels::kWideTile>(num_rows, num_cols)
                                   : gapkernels::num_parts<gapkernels::kTile>(num_rows, num_cols);
}

const float* floats(const Tensor& t, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == size && t.is_contiguous(), name, " must be ",
                  size, " contiguous float32 numbers, got ", t.numel());
  return static_cast<const float*>(t.const_data_ptr());
}

Matrix matrix_of(const Tensor& rows, const Tensor& row_factors, const Tensor& cols, const Tensor& col_factors,
                 const Tensor& scale, bool biased, bool symmetric) {
  check_copyable(rows, "rows");
  check_copyable(cols, "cols");
  STD_TORCH_CHECK(rows.size(1) == cols.size(1) && rows.scalar_type() == cols.scalar_type(),
                  "rows and cols must agree in length and type, got lengths ", rows.size(1), " and ", cols.size(1));
  STD_TORCH_CHECK(!symmetric || rows.size(0) == cols.size(0), "a symmetric matrix must be square, got ", rows.size(0),
                  " rows and ", cols.size(0), " columns");
  const bool is_double = scale.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(scale.numel() == 1 && (is_double || scale.scalar_type() == ScalarType::Float),
                  "scale must be one float32 or float64 number");
  return {rows.const_data_ptr(),
          rows.stride(0),
          floats(row_factors, rows.size(0), "row_factors"),
          cols.const_data_ptr(),
          cols.stride(0),
          floats(col_factors, cols.size(0), "col_factors"),
          scale.const_data_ptr(),
          is_double,
          biased,
          symmetric};
}

// None has no numbers.
gapkernels::Kept kept_of(const Tensor& entries, const Tensor& rows, const Tensor& cols) {
  if (entries.numel() == 0) return {nullptr, 0};
  check_copyable(entries, "kept");
  STD_TORCH_CHECK(entries.scalar_type() == ScalarType::BFloat16 && entries.size(0) == rows.size(0) &&
                      entries.size(1) == cols.size(0),
                  "kept must be bfloat16 of ", rows.size(0), " rows and ", cols.size(0), " columns, got ",
                  entries.size(0), " and ", entries.size(1));
  return {entries.mutable_data_ptr(), entries.stride(0)};
}

void* current_stream([[maybe_unused]] const Tensor& t) {
  void* stream = nullptr;
#ifdef USE_CUDA
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
#endif
  return stream;
}

void check_success(const char* error, const char* kernel) {
  STD_TORCH_CHECK(error == nullptr, kernel, " could not be launched: ", error);
}

void similarity_stats(std::vector<Tensor> rows, std::vector<Tensor> row_factors, std::vector<Tensor> cols,
                      std::vector<Tensor> col_factors, std::vector<Tensor> scales, std::vector<bool> biased,
                      std::vector<bool> symmetric, std::optional<Tensor> largest, int64_t diagonal, double headroom,
                      int64_t variant, Tensor row_sums, Tensor col_sums, std::vector<Tensor> kept) {
  const size_t count = rows.size();
  STD_TORCH_CHECK(count >= 1 && count <= gapkernels::kMaxMatrices, "1 to ", gapkernels::kMaxMatrices,
                  " matrices are accepted, got ", count);
  STD_TORCH_CHECK(row_factors.size() == count && cols.size() == count && col_factors.size() == count &&
                      scales.size() == count && biased.size() == count && symmetric.size() == count &&
                      (kept.empty() || kept.size() == count),
                  "lists must have one entry for each of the ", count, " matrices");
  const int64_t matrices = static_cast<int64_t>(count), tiles = matrices * num_tiles(rows[0], cols[0]);
  STD_TORCH_CHECK(tiles <= kMostTiles, "one launch walks over at most ", kMostTiles, " tiles, got ", tiles);
  gapkernels::StatsArguments arguments{};
  arguments.num_matrices = static_cast<int>(count);
  arguments.element = element_of(rows[0]);
  arguments.variant = checked_variant(variant, rows[0]);
  arguments.num_rows = static_cast<int>(rows[0].size(0));
  arguments.num_cols = static_cast<int>(cols[0].size(0));
  arguments.dim = static_cast<int>(rows[0].size(1));
  arguments.diagonal = static_cast<int>(diagonal);
  arguments.headroom = static_cast<float>(headroom);
  for (size_t m = 0; m < count; ++m) {
    STD_TORCH_CHECK(rows[m].size(0) == rows[0].size(0) && cols[m].size(0) == cols[0].size(0) &&
                        rows[m].size(1) == rows[0].size(1) && rows[m].scalar_type() == rows[0].scalar_type(),
                    "matrices must agree in shape and type; number ", m, " differs from the first");
    arguments.matrices[m] =
        matrix_of(rows[m], row_factors[m], cols[m], col_factors[m], scales[m], biased[m], symmetric[m]);
    if (!kept.empty()) arguments.kept[m] = kept_of(kept[m], rows[m], cols[m]);
    STD_TORCH_CHECK(arguments.kept[m].entries == nullptr || !biased[m], "entries of a biased matrix are not kept");
  }
  arguments.largest = largest.has_value() ? floats(*largest, matrices, "largest") : nullptr;
  arguments.row_sums = const_cast<float*>(floats(row_sums, matrices * arguments.num_rows, "row_sums"));
  arguments.col_sums = const_cast<float*>(floats(col_sums, matrices * arguments.num_cols, "col_sums"));
  check_success(gapkernels::similarity_stats(arguments, current_stream(rows[0])), "similarity_stats");
}

void similarity_grad(Tensor rows, Tensor row_factors, Tensor cols, Tensor col_factors, Tensor scale, bool biased,
                     std::optional<Tensor> row_log_sums, std::optional<Tensor> col_log_sums, int64_t diagonal,
                     double unit, Tensor reference, int64_t variant, std::optional<Tensor> scale_partials, Tensor out) {
  gapkernels::GradArguments arguments{};
  arguments.matrix = matrix_of(rows, row_factors, cols, col_factors, scale, biased, false);
  arguments.element = element_of(rows);
  arguments.variant = checked_variant(variant, rows);
  arguments.num_rows = static_cast<int>(rows.size(0));
  arguments.num_cols = static_cast<int>(cols.size(0));
  arguments.dim = static_cast<int>(rows.size(1));
  arguments.diagonal = static_cast<int>(diagonal);
  arguments.unit = static_cast<float>(unit);
  arguments.reference = floats(reference, 1, "reference");
  STD_TORCH_CHECK(biased || (row_log_sums.has_value() && col_log_sums.has_value()), "a pair needs its log sums");
  if (!biased) {
    arguments.row_log_sums = floats(*row_log_sums, arguments.num_rows, "row_log_sums");
    arguments.col_log_sums = floats(*col_log_sums, arguments.num_cols, "col_log_sums");
  }
  if (scale_partials.has_value()) {
    const int64_t places = num_partials(arguments.num_rows, arguments.num_cols, arguments.variant);
    STD_TORCH_CHECK(scale_partials->scalar_type() == ScalarType::Double && scale_partials->is_contiguous() &&
                        scale_partials->numel() >= places,
                    "scale_partials must be ", places, " or more contiguous float64 numbers");
    arguments.scale_partials = static_cast<double*>(scale_partials->mutable_data_ptr());
  }
  check_copyable(out, "out");
  STD_TORCH_CHECK(out.scalar_type() == rows.scalar_type() && out.size(0) >= rows.size(0) && out.size(1) >= cols.size(0),
                  "out must have the operands' type and room for the block");
  arguments.out = out.mutable_data_ptr();
  arguments.out_stride = out.stride(0);
  check_success(gapkernels::similarity_grad(arguments, current_stream(rows)), "similarity_grad");
}

// Room for a product of as many rows.
float* total_of(const Tensor& t, int64_t height, int64_t width, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 2 && t.size(0) == height && t.size(1) == width &&
                      t.stride(1) == 1,
                  name, " must be float32 of ", height, " rows and ", width, " columns, the second stride 1");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.stride(0) % 4 == 0, name,
                  " must be aligned to 16 bytes with a stride of 4 elements' multiple, got stride ", t.stride(0));
  return static_cast<float*>(t.mutable_data_ptr());
}

void both_products(Tensor h, Tensor cols, Tensor rows, std::optional<Tensor> total_rows,
                   std::optional<Tensor> total_cols, bool first_rows, bool first_cols) {
  check_copyable(h, "h");
  check_copyable(cols, "cols");
  check_copyable(rows, "rows");
  const int64_t num_rows = h.size(0), num_cols = h.size(1), dim = cols.size(1);
  STD_TORCH_CHECK(cols.size(0) == num_cols && rows.size(0) == num_rows && rows.size(1) == dim, "h of ", num_rows,
                  " rows and ", num_cols, " columns needs as many rows and columns of one length, got ", rows.size(0),
                  " of ", rows.size(1), " and ", cols.size(0), " of ", dim);
  STD_TORCH_CHECK(cols.scalar_type() == h.scalar_type() && rows.scalar_type() == h.scalar_type(),
                  "h, cols and rows must be of one type");
  gapkernels::ProductArguments arguments{};
  arguments.element = element_of(h);
  arguments.num_rows = static_cast<int>(num_rows);
  arguments.num_cols = static_cast<int>(num_cols);
  arguments.dim = static_cast<int>(dim);
  arguments.h = h.const_data_ptr();
  arguments.h_stride = h.stride(0);
  arguments.cols = cols.const_data_ptr();
  arguments.col_stride = cols.stride(0);
  arguments.rows = rows.const_data_ptr();
  arguments.row_stride = rows.stride(0);
  const int64_t steps = num_tiles(rows, cols) * ((dim + gapkernels::kTile - 1) / gapkernels::kTile);
  STD_TORCH_CHECK(steps <= kMostTiles / 4, "one launch walks over at most ", kMostTiles / 4,
                  " cubes of side 128, got ", steps);
  const std::optional<Tensor>* totals[] = {&total_rows, &total_cols};
  const int64_t heights[] = {num_rows, num_cols};
  const char* names[] = {"total_rows", "total_cols"};
  const bool first[] = {first_rows, first_cols};
  bool wanted = false;
  for (int p = 0; p < gapkernels::kProducts; ++p) {
    arguments.first[p] = first[p];
    if (!totals[p]->has_value()) continue;
    arguments.totals[p] = total_of(**totals[p], heights[p], dim, names[p]);
    arguments.total_strides[p] = (*totals[p])->stride(0);
    wanted = true;
  }
  if (wanted) check_success(gapkernels::both_products(arguments, current_stream(h)), "both_products");
}

}  // namespace

STABLE_TORCH_LIBRARY(gapkernels_cuda, m) {
  m.def(
      "similarity_stats(Tensor[] rows, Tensor[] row_factors, Tensor[] cols, Tensor[] col_factors, Tensor[] scales, "
      "bool[] biased, bool[] symmetric, Tensor? largest, int diagonal, float headroom, int variant, "
      "Tensor(a!) row_sums, Tensor(b!) col_sums, Tensor(c!)[] kept) -> ()");
  m.def(
      "similarity_grad(Tensor rows, Tensor row_factors, Tensor cols, Tensor col_factors, Tensor scale, bool biased, "
      "Tensor? row_log_sums, Tensor? col_log_sums, int diagonal, float unit, Tensor reference, int variant, "
      "Tensor(a!)? scale_partials, Tensor(b!) out) -> ()");
  m.def(
      "both_products(Tensor h, Tensor cols, Tensor rows, Tensor(a!)? total_rows, Tensor(b!)? total_cols, "
      "bool first_rows, bool first_cols) -> ()");
}

// For tensors of any device: where the kernels are missing, tests put a plain C++ version in their place.
STABLE_TORCH_LIBRARY_IMPL(gapkernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("similarity_stats", TORCH_BOX(&similarity_stats));
  m.impl("similarity_grad", TORCH_BOX(&similarity_grad));
  m.impl("both_products", TORCH_BOX(&both_products));
}
