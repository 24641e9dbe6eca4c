// The Python module: one function for each of gapkernels/backends/contract.py, called with the contract's own objects.
//
// Tensors come and go through torch's DLPack exchange table, plain C functions that cost some 50 ns each: no header of
// torch's C++ or Python interface is needed, and a call costs little more than its work. Named tuples are read by
// position; the order of their fields here is that of contract.py and spec.py.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/dlpack.h>

#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "vector.h"

namespace {

// ---- Python objects -------------------------------------------------------------------------------------------------

struct PythonError {};  // an exception is set

class Object {  // owns a reference
  public:
    explicit Object(PyObject* p = nullptr) : p_(p) {
        if (p == nullptr && PyErr_Occurred()) throw PythonError();
    }
    Object(Object&& o) noexcept : p_(o.release()) {}
    Object& operator=(Object&& o) noexcept {
        std::swap(p_, o.p_);
        return *this;
    }
    ~Object() { Py_XDECREF(p_); }
    PyObject* get() const { return p_; }
    PyObject* release() {
        PyObject* p = p_;
        p_ = nullptr;
        return p;
    }

  private:
    PyObject* p_;
};

PyObject* item(PyObject* sequence, Py_ssize_t i) {
    return PyList_Check(sequence) ? PyList_GET_ITEM(sequence, i) : PyTuple_GET_ITEM(sequence, i);
}
Py_ssize_t length(PyObject* sequence) {
    return PyList_Check(sequence) ? PyList_GET_SIZE(sequence) : PyTuple_GET_SIZE(sequence);
}
int64_t integer(PyObject* o) {
    const int64_t value = PyLong_AsLongLong(o);
    if (value == -1 && PyErr_Occurred()) throw PythonError();
    return value;
}
bool truth(PyObject* o) { return PyObject_IsTrue(o) == 1; }

// The contract's named tuples, given by bind().
enum ResultType { operand_type, row_statistics_type, centroids_type, log_sums_type, saved_type, forward_type, prepared_type, softplus_type,
                  num_types };
PyObject* result_types[num_types];
Py_ssize_t result_fields[num_types];

// Fields that are not given come last and are None.
template <class... Fields>
PyObject* named_tuple(ResultType type, Fields... fields) {
    PyTypeObject* cls = reinterpret_cast<PyTypeObject*>(result_types[type]);
    Object result(cls->tp_alloc(cls, result_fields[type]));
    Py_ssize_t i = 0;
    (PyTuple_SET_ITEM(result.get(), i++, fields), ...);
    for (; i < result_fields[type]; ++i) {
        Py_INCREF(Py_None);
        PyTuple_SET_ITEM(result.get(), i, Py_None);
    }
    return result.release();
}

PyObject* none() {
    Py_INCREF(Py_None);
    return Py_None;
}

// ---- tensors --------------------------------------------------------------------------------------------------------

const DLPackExchangeAPI* torch_api = nullptr;

DLTensor view(PyObject* tensor) {
    DLTensor result;
    if (torch_api->dltensor_from_py_object_no_sync(tensor, &result) != 0) throw PythonError();
    result.data = static_cast<char*>(result.data) + result.byte_offset;
    return result;
}

constexpr DLDataType dl_type(Type type) {
    switch (type) {
        case Type::bf16:
            return {kDLBfloat, 16, 1};
        case Type::f16:
            return {kDLFloat, 16, 1};
        case Type::f32:
            return {kDLFloat, 32, 1};
        default:
            return {kDLFloat, 64, 1};
    }
}

Type type_of(const DLTensor& t) {
    if (t.dtype.code == kDLBfloat && t.dtype.bits == 16) return Type::bf16;
    if (t.dtype.code == kDLFloat && t.dtype.bits == 16) return Type::f16;
    if (t.dtype.code == kDLFloat && t.dtype.bits == 32) return Type::f32;
    if (t.dtype.code == kDLFloat && t.dtype.bits == 64) return Type::f64;
    throw std::invalid_argument("the CPU kernels take floating-point tensors");
}

Rows rows_of(PyObject* tensor) {
    const DLTensor t = view(tensor);
    if (t.ndim != 2) throw std::invalid_argument("a matrix of rows was expected, got " + std::to_string(t.ndim) + " dimensions");
    if (t.strides && t.shape[1] > 1 && t.strides[1] != 1) throw std::invalid_argument("rows must be contiguous");
    return {t.data, type_of(t), t.shape[0], t.shape[1], t.strides ? t.strides[0] : t.shape[1]};
}

// Contiguous numbers in float or double.
Numbers numbers_of(PyObject* tensor) {
    if (tensor == Py_None) return {nullptr, false};
    const DLTensor t = view(tensor);
    int64_t expected = 1;
    for (int d = t.ndim - 1; d >= 0; --d) {
        if (t.shape[d] > 1 && t.strides && t.strides[d] != expected) throw std::invalid_argument("numbers must be contiguous");
        expected *= t.shape[d];
    }
    const Type type = type_of(t);
    if (type != Type::f32 && type != Type::f64) throw std::invalid_argument("float32 or float64 was expected");
    return {t.data, type == Type::f64};
}

double* doubles_of(PyObject* tensor) {
    const Numbers numbers = numbers_of(tensor);
    if (!numbers.wide) throw std::invalid_argument("float64 was expected");
    return static_cast<double*>(numbers.data);
}

// Contiguous numbers in int64; null for None.
const int64_t* ids_of(PyObject* tensor) {
    if (tensor == Py_None) return nullptr;
    const DLTensor t = view(tensor);
    if (t.dtype.code != kDLInt || t.dtype.bits != 64 || t.ndim != 1 || (t.strides && t.shape[0] > 1 && t.strides[0] != 1)) {
        throw std::invalid_argument("contiguous int64 ids were expected");
    }
    return static_cast<const int64_t*>(t.data);
}

float widened(uint16_t bits, Type type) {
    float lanes[Vec<float>::size];
    uint16_t in[Vec<float>::size] = {bits};
    (type == Type::bf16 ? from_bf16(in) : from_f16(in)).store(lanes);
    return lanes[0];
}

double number_at(const DLTensor& t, int64_t i) {
    const Type type = type_of(t);
    switch (type) {
        case Type::f64:
            return static_cast<const double*>(t.data)[i];
        case Type::f32:
            return static_cast<const float*>(t.data)[i];
        default:
            return widened(static_cast<const uint16_t*>(t.data)[i], type);
    }
}

double scalar_of(PyObject* tensor) { return number_at(view(tensor), 0); }

void set_error(void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); }

// A tensor that torch allocated, not initialised.
class NewTensor {
  public:
    NewTensor(std::initializer_list<int64_t> shape, Type type) {
        DLTensor prototype = {};
        prototype.device = {kDLCPU, 0};
        prototype.dtype = dl_type(type);
        prototype.ndim = static_cast<int32_t>(shape.size());
        prototype.shape = const_cast<int64_t*>(shape.begin());
        if (torch_api->managed_tensor_allocator(&prototype, &managed_, nullptr, set_error) != 0) throw PythonError();
    }
    NewTensor(const NewTensor&) = delete;
    NewTensor& operator=(const NewTensor&) = delete;
    ~NewTensor() {
        if (managed_ && managed_->deleter) managed_->deleter(managed_);
    }
    template <class T = void>
    T* data() const {
        return static_cast<T*>(managed_->dl_tensor.data);
    }
    PyObject* release() {
        void* object = nullptr;
        DLManagedTensorVersioned* managed = managed_;
        managed_ = nullptr;  // to_py_object takes it
        if (torch_api->managed_tensor_to_py_object_no_sync(managed, &object) != 0) throw PythonError();
        return static_cast<PyObject*>(object);
    }

  private:
    DLManagedTensorVersioned* managed_ = nullptr;
};

// A tensor of bytes in memory that is used again once it has gone: what is allocated anew at every step is paid for page
// by page.
class ReusedBytes {
  public:
    explicit ReusedBytes(size_t bytes) : owner_(std::make_unique<Owner>(bytes)) {
        DLManagedTensorVersioned& managed = owner_->managed;
        managed.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
        managed.manager_ctx = owner_.get();
        managed.deleter = [](DLManagedTensorVersioned* self) { delete static_cast<Owner*>(self->manager_ctx); };
        managed.dl_tensor.data = owner_->memory.take<char>(owner_->size);
        managed.dl_tensor.device = {kDLCPU, 0};
        managed.dl_tensor.ndim = 1;
        managed.dl_tensor.dtype = {kDLUInt, 8, 1};
        managed.dl_tensor.shape = &owner_->size;
        managed.dl_tensor.strides = &owner_->stride;
    }
    char* data() const { return static_cast<char*>(owner_->managed.dl_tensor.data); }
    PyObject* release() {
        void* object = nullptr;
        if (torch_api->managed_tensor_to_py_object_no_sync(&owner_.release()->managed, &object) != 0) throw PythonError();
        return static_cast<PyObject*>(object);
    }

  private:
    struct Owner {
        DLManagedTensorVersioned managed = {};
        int64_t size, stride = 1;
        Workspace memory;
        explicit Owner(size_t bytes)
            : size(static_cast<int64_t>(bytes)), memory(Workspace::bytes<char>(static_cast<int64_t>(bytes))) {}
    };
    std::unique_ptr<Owner> owner_;
};

PyObject* new_scalar(double value) {
    NewTensor t({}, Type::f64);
    *t.data<double>() = value;
    return t.release();
}

// ---- the contract's values ------------------------------------------------------------------------------------------

Spec spec_of(PyObject* o) {
    return {integer(item(o, 0)), truth(item(o, 1)), truth(item(o, 2)), truth(item(o, 3)),
            truth(item(o, 4)),   truth(item(o, 5)), truth(item(o, 6))};
}

std::vector<Rows> all_rows_of(PyObject* list) {
    std::vector<Rows> rows;
    for (Py_ssize_t m = 0; m < length(list); ++m) rows.push_back(rows_of(item(list, m)));
    return rows;
}

Matrix matrix_of(PyObject* o) {
    Matrix m;
    m.rows = rows_of(item(o, 0));
    m.cols = rows_of(item(o, 2));
    const Numbers row_factor = numbers_of(item(o, 1)), col_factor = numbers_of(item(o, 3));
    m.row_factor = row_factor.data;
    m.col_factor = col_factor.data;
    m.biased = truth(item(o, 7));
    m.symmetric = truth(item(o, 8));
    m.scale = scalar_of(item(o, 4)) * log2_e;
    m.largest = m.biased ? 0 : item(o, 5) == Py_None ? m.scale : m.scale * scalar_of(item(o, 5));
    m.diagonal = integer(item(o, 6));
    m.row_ids = ids_of(item(o, 9));
    m.col_ids = ids_of(item(o, 10));
    m.row_limit = item(o, 11) == Py_None ? nullptr : doubles_of(item(o, 11));
    m.col_limit = item(o, 12) == Py_None ? nullptr : doubles_of(item(o, 12));
    m.entries = nullptr;
    m.kept_entries = 0;
    const bool wide = m.rows.type == Type::f64;
    if (item(o, 13) != Py_None) {
        const DLTensor entries = view(item(o, 13));
        m.entries = entries.data;
        m.kept_entries = entries.shape[0] / bytes_of(compute_type(m.rows.type));
    }
    if (m.rows.type != m.cols.type || m.rows.dim != m.cols.dim || (row_factor.data && row_factor.wide != wide) ||
        (col_factor.data && col_factor.wide != wide)) {
        throw std::invalid_argument("rows, columns and factors of a matrix must agree in type and length");
    }
    return m;
}

struct NoGil {
    PyThreadState* state = PyEval_SaveThread();
    ~NoGil() { PyEval_RestoreThread(state); }
};

// Operands from rows whose norms are known: the rows themselves where products can read them, else a copy.
PyObject* make_operand(PyObject* embedding, const Rows& rows, const Spec& spec, bool moderate, NewTensor* factor) {
    const Type type = operand_type_of(rows.type);
    const bool scaled = spec.normalize && !moderate;
    if (can_be_operand(rows) && !scaled) {
        Py_INCREF(embedding);
        return named_tuple(operand_type, embedding, factor ? factor->release() : none());
    }
    const int64_t dim = padded(rows.dim, type);
    NewTensor copy({rows.count, dim}, type);
    const Numbers numbers{factor ? factor->data() : nullptr, compute_type(type) == Type::f64};
    {
        NoGil no_gil;
        copy_rows(rows, {copy.data(), type, rows.count, dim, dim}, scaled ? &numbers : nullptr);
    }
    return named_tuple(operand_type, copy.release(), factor ? factor->release() : none());
}

// ---- functions ------------------------------------------------------------------------------------------------------

PyObject* py_row_statistics(PyObject* const* args) {
    PyObject* embeddings = args[0];
    const Spec spec = spec_of(args[1]);
    const std::vector<Rows> rows = all_rows_of(embeddings);
    const int modalities = static_cast<int>(rows.size());
    const int64_t n = rows[0].count, dim = rows[0].dim, pairs = static_cast<int64_t>(nce_pairs(modalities, spec).size());
    const Type type = compute_type(rows[0].type);
    const bool wide = type == Type::f64;
    NewTensor cosines({pairs, n}, Type::f64), sums({(modalities + 1) * dim + sum_scalars}, Type::f64);
    std::vector<std::unique_ptr<NewTensor>> factors;
    std::vector<Numbers> numbers;
    for (int m = 0; pairs && spec.normalize && m < modalities; ++m) {
        factors.push_back(std::make_unique<NewTensor>(std::initializer_list<int64_t>{n}, type));
        numbers.push_back({factors.back()->data(), wide});
    }
    std::vector<bool> moderate;
    {
        NoGil no_gil;
        moderate = row_statistics(rows, spec, numbers, cosines.data<double>(), sums.data<double>());
    }
    Object operands(PyList_New(pairs ? modalities : 0));
    for (int m = 0; pairs && m < modalities; ++m) {
        PyList_SET_ITEM(operands.get(), m,
                        make_operand(item(embeddings, m), rows[m], spec, moderate[m], factors.empty() ? nullptr : factors[m].get()));
    }
    Object statistics(named_tuple(row_statistics_type, cosines.release(), sums.release()));
    return PyTuple_Pack(2, operands.get(), statistics.get());
}

PyObject* py_operand(PyObject* const* args) {
    const Rows rows = rows_of(args[0]);
    const Spec spec = spec_of(args[1]);
    if (!spec.normalize) return make_operand(args[0], rows, spec, true, nullptr);
    const Type type = compute_type(rows.type);
    NewTensor factor({rows.count}, type);
    bool moderate;
    {
        NoGil no_gil;
        moderate = inverse_norms(rows, {factor.data(), type == Type::f64});
    }
    return make_operand(args[0], rows, spec, moderate, &factor);
}

PyObject* py_centroids(PyObject* const* args) {
    const std::vector<Rows> rows = all_rows_of(args[0]);
    const double* sums = doubles_of(args[1]);
    const double uniformity_t = scalar_of(args[2]);
    const int64_t total_rows = integer(args[3]), n = rows[0].count;
    const Spec spec = spec_of(args[4]);
    const Type type = centroid_type(rows[0].type, total_rows, rows[0].dim, spec), factor_type = compute_type(type);
    const int64_t dim = padded(rows[0].dim, type);
    NewTensor out({n, dim}, type), bias({n}, factor_type), scale({}, Type::f64);
    {
        NoGil no_gil;
        centroids(rows, sums, uniformity_t, total_rows, spec, {out.data(), type, n, dim, dim},
                  {bias.data(), factor_type == Type::f64}, scale.data<double>());
    }
    return named_tuple(centroids_type, out.release(), bias.release(), scale.release());
}

PyObject* py_log_sums(PyObject* const* args) {
    std::vector<Matrix> matrices;
    for (Py_ssize_t i = 0; i < length(args[0]); ++i) matrices.push_back(matrix_of(item(args[0], i)));
    const int64_t count = static_cast<int64_t>(matrices.size());
    int64_t budget = integer(args[1]);
    Object entries(PyTuple_New(budget > 0 ? count : 0));
    for (int64_t i = 0; i < length(entries.get()); ++i) {
        Object kept(none());
        const int64_t numbers = numbers_to_keep(matrices[i], budget);
        if (numbers > 0) {
            const int64_t bytes = numbers * bytes_of(compute_type(matrices[i].rows.type));
            ReusedBytes tiles(bytes);
            matrices[i].entries = tiles.data();
            matrices[i].kept_entries = numbers;
            budget -= bytes;
            kept = Object(tiles.release());
        }
        PyTuple_SET_ITEM(entries.get(), i, kept.release());
    }
    NewTensor rows({count, matrices[0].rows.count}, Type::f64), cols({count, matrices[0].cols.count}, Type::f64);
    {
        NoGil no_gil;
        log_sums(matrices, rows.data<double>(), cols.data<double>());
    }
    return named_tuple(log_sums_type, rows.release(), cols.release(), entries.release());
}

PyObject* py_softplus_sums(PyObject* const* args) {
    const Matrix matrix = matrix_of(args[0]);
    const double bias = scalar_of(args[1]);
    NewTensor softplus({matrix.rows.count}, Type::f64), sigmoid({matrix.rows.count}, Type::f64);
    {
        NoGil no_gil;
        softplus_sums(matrix, bias, softplus.data<double>(), sigmoid.data<double>());
    }
    return named_tuple(softplus_type, softplus.release(), sigmoid.release());
}

PyObject* py_terms(PyObject* const* args) {
    PyObject *embeddings = args[0], *statistics = args[1], *pair_sums = args[3], *centroid_logs = args[4], *scalars = args[5];
    const Rows first = rows_of(item(embeddings, 0));
    const DLTensor cosines = view(item(statistics, 0)), all_cosines = view(args[2]);
    TermsTask task;
    task.spec = spec_of(args[7]);
    task.first_row = integer(args[6]);
    task.dim = first.dim;
    task.modalities = static_cast<int>(length(embeddings));
    task.num_pairs = static_cast<int>(cosines.shape[0]);
    task.num_rows = cosines.shape[1];
    task.total_rows = all_cosines.shape[1];
    task.logit_scale = scalar_of(item(scalars, 0));
    const double* weights = doubles_of(item(scalars, 1));
    std::copy(weights, weights + 3, task.weights);
    task.uniformity_t = scalar_of(item(scalars, 2));
    task.sums = doubles_of(item(statistics, 1));
    task.all_cosines = doubles_of(args[2]);
    task.row_logs = pair_sums == Py_None ? nullptr : doubles_of(item(pair_sums, 0));
    task.col_logs = pair_sums == Py_None ? nullptr : doubles_of(item(pair_sums, 1));
    task.centroid_logs = centroid_logs == Py_None ? nullptr : doubles_of(centroid_logs);
    const bool with_centroids = task.centroid_logs != nullptr;
    NewTensor row_log_sum({task.num_pairs, task.num_rows}, Type::f64), col_log_sum({task.num_pairs, task.total_rows}, Type::f64);
    NewTensor negative_mass({task.num_pairs, task.num_rows}, Type::f64);
    NewTensor centroid_log_sum({with_centroids ? task.num_rows : 0}, Type::f64);
    NewTensor centroid_summary({with_centroids ? 2 : 0}, Type::f64);
    task.row_log_sum = row_log_sum.data<double>();
    task.col_log_sum = col_log_sum.data<double>();
    task.negative_mass = negative_mass.data<double>();
    task.centroid_log_sum = centroid_log_sum.data<double>();
    task.centroid_summary = centroid_summary.data<double>();
    {
        NoGil no_gil;
        terms(task);
    }
    const Type type = compute_type(first.type);
    NewTensor loss({}, type), values({5}, type);
    const bool wide = type == Type::f64;
    Numbers{loss.data(), wide}.set(0, task.loss);
    for (int t = 0; t < 5; ++t) Numbers{values.data(), wide}.set(t, task.terms[t]);
    PyObject *own_cosines = item(statistics, 0), *own_sums = item(statistics, 1);
    Py_INCREF(own_cosines);
    Py_INCREF(own_sums);
    Object saved(named_tuple(saved_type, row_log_sum.release(), col_log_sum.release(), negative_mass.release(), own_cosines,
                             own_sums, centroid_log_sum.release(), centroid_summary.release()));
    return named_tuple(forward_type, loss.release(), values.release(), saved.release());
}

PyObject* py_softmax_sums(PyObject* const* args) {
    PyObject *saved = args[0], *scalars = args[1];
    const DLTensor row_log_sum = view(item(saved, 0)), sums = view(item(saved, 4)), summary = view(item(saved, 6));
    SoftmaxTask task;
    task.num_pairs = static_cast<int>(row_log_sum.shape[0]);
    task.num_rows = row_log_sum.shape[1];
    task.total_rows = integer(args[2]);
    task.logit_scale = scalar_of(item(scalars, 0));
    task.row_log_sum = doubles_of(item(saved, 0));
    task.col_log_sum = doubles_of(item(saved, 1));
    task.num_cols = view(item(saved, 1)).shape[1];
    task.negative_mass = doubles_of(item(saved, 2));
    task.cosines = doubles_of(item(saved, 3));
    task.cosine_sum = doubles_of(item(saved, 4))[sums.shape[0] - 1];
    NewTensor rows({task.num_pairs, task.num_rows}, Type::f64), cols({task.num_pairs, task.num_cols}, Type::f64);
    task.rows = rows.data<double>();
    task.cols = cols.data<double>();
    {
        NoGil no_gil;
        softmax_sums(task);
    }
    const double centroid_reference = summary.shape[0] ? doubles_of(item(saved, 6))[1] : 0;
    Object reference(new_scalar(task.reference)), other(new_scalar(centroid_reference));
    return named_tuple(prepared_type, rows.release(), cols.release(), reference.release(), other.release(),
                       new_scalar(task.positive_moment));
}

PyObject* py_add_products(PyObject* const* args) {
    const Matrix block = matrix_of(args[0]);
    PyObject *sums = args[1], *prepared = args[2];
    Products products = {};
    const auto weights = [&](Py_ssize_t i) { return item(sums, i) == Py_None ? nullptr : doubles_of(item(sums, i)); };
    products.sigmoid = sums != Py_None && length(sums) == 3;  // bias, row_weight, negative_mass
    if (products.sigmoid) {
        products.bias = scalar_of(item(sums, 0));
        products.row_weight = weights(1);
    } else if (sums != Py_None) {  // row, col, negative_mass, row_weight, col_weight
        products.row_log = doubles_of(item(sums, 0));
        products.col_log = doubles_of(item(sums, 1));
        products.row_weight = weights(3);
        products.col_weight = weights(4);
    }
    products.reference = scalar_of(item(prepared, sums == Py_None ? 3 : 2));
    const auto accumulator = [&](PyObject* tensor, const Rows& like, void*& data, int64_t& stride) {
        if (tensor == Py_None) return;
        const Rows rows = rows_of(tensor);
        if (rows.type != compute_type(block.rows.type) || rows.count != like.count || rows.dim < like.dim) {
            throw std::invalid_argument("products must have the shape of their operand, in float32 (float64 for float64)");
        }
        data = const_cast<void*>(rows.data);
        stride = rows.stride;
    };
    accumulator(args[3], block.rows, products.rows, products.row_stride);
    accumulator(args[4], block.cols, products.cols, products.col_stride);
    products.moment = args[5] == Py_None ? nullptr : doubles_of(args[5]);
    products.first_rows = truth(args[6]);
    products.first_cols = truth(args[7]);
    {
        NoGil no_gil;
        add_products(block, products);
    }
    return none();
}

PyObject* py_moment_buffer(PyObject* const*) {
    NewTensor moment({1}, Type::f64);
    *moment.data<double>() = 0;
    return moment.release();
}

PyObject* py_row_gradients(PyObject* const* args) {
    PyObject *targets = args[0], *slice = args[1], *factors = args[2], *products = args[3], *evaluation = args[5], *out = args[6];
    PyObject *scalars = item(evaluation, 1), *saved = item(evaluation, 3), *prepared = item(evaluation, 5);
    GradientOfRows task;
    task.embeddings = all_rows_of(item(evaluation, 0));
    const int64_t n = task.embeddings[0].count, dim = task.embeddings[0].dim;
    task.spec = spec_of(item(evaluation, 2));
    Py_ssize_t start, stop, step;
    if (PySlice_Unpack(slice, &start, &stop, &step) < 0) throw PythonError();
    task.num_rows = PySlice_AdjustIndices(n, &start, &stop, step);
    task.first_row = start;
    for (Py_ssize_t t = 0; t < length(targets); ++t) {
        task.targets.push_back(static_cast<int>(integer(item(targets, t))));
        task.factors.push_back(numbers_of(item(factors, t)));
        PyObject* product = item(products, t);
        task.products.push_back(product == Py_None ? Rows{} : rows_of(product));
        task.out.push_back(rows_of(item(out, t)));
    }
    task.centroid_products = args[4] == Py_None ? Rows{} : rows_of(args[4]);
    task.negative_mass = doubles_of(item(saved, 2));
    task.sums = doubles_of(item(saved, 4));
    task.logit_scale = scalar_of(item(scalars, 0));
    task.uniformity_t = scalar_of(item(scalars, 2));
    task.unit = 1;
    task.total_rows = integer(item(evaluation, 6));
    task.world_size = integer(item(evaluation, 7));
    const double* upstream = doubles_of(item(evaluation, 4));
    task.nce = upstream[0];
    task.atp = upstream[1];
    task.cu = upstream[2];
    task.centroid_stretch = 1;
    if (task.centroid_products.data) {
        task.centroid_log_sum = doubles_of(item(saved, 5));
        task.centroid_total = doubles_of(item(saved, 6))[0];
        task.centroid_reference = scalar_of(item(prepared, 3));
        if (centroid_type(task.embeddings[0].type, task.total_rows, dim, task.spec) == Type::f16) {
            task.centroid_stretch = centroid_stretch(task.sums, static_cast<int>(task.embeddings.size()), dim, task.total_rows);
        }
    }
    {
        NoGil no_gil;
        row_gradients(task);
    }
    return none();
}

PyObject* py_scale_gradient(PyObject* const* args) {
    PyObject *moment = args[0], *evaluation = args[1];
    PyObject *scalars = item(evaluation, 1), *saved = item(evaluation, 3), *prepared = item(evaluation, 5);
    const int64_t pairs = view(item(saved, 0)).shape[0];
    double gradient = 0;
    if (moment != Py_None && pairs) {
        const DLTensor t = view(moment);
        const double* parts = doubles_of(moment);
        for (int64_t i = 0; i < t.shape[0]; ++i) gradient += parts[i];
        gradient = gradient_of_scale(gradient, scalar_of(item(prepared, 4)), scalar_of(item(scalars, 0)),
                                     doubles_of(item(evaluation, 4))[0], pairs, integer(item(evaluation, 6)));
    }
    return new_scalar(gradient);
}

// ---- whole evaluations ----------------------------------------------------------------------------------------------

StepTask step_task(PyObject* spec, PyObject* tensors) {
    StepTask task;
    task.spec = spec_of(spec);
    task.kept_bytes = integer(item(spec, 7));
    task.logit_scale = scalar_of(item(tensors, 0));
    const double* weights = doubles_of(item(tensors, 1));
    std::copy(weights, weights + 3, task.weights);
    task.uniformity_t = scalar_of(item(tensors, 2));
    for (Py_ssize_t m = 3; m < length(tensors); ++m) task.embeddings.push_back(rows_of(item(tensors, m)));
    return task;
}

// spec, (scale, weights, sharpness, embeddings...), whether a backward pass follows → (loss, terms, workspace)
PyObject* py_step_forward(PyObject* const* args) {
    StepTask task = step_task(args[0], args[1]);
    if (!truth(args[2])) task.kept_bytes = 0;
    ReusedBytes workspace(step_workspace(task));
    StepResult result;
    {
        NoGil no_gil;
        step_forward(task, workspace.data(), result);
    }
    const Type type = compute_type(task.embeddings[0].type);
    NewTensor loss({}, type), values({5}, type);
    Numbers{loss.data(), type == Type::f64}.set(0, result.loss);
    for (int t = 0; t < 5; ++t) Numbers{values.data(), type == Type::f64}.set(t, result.terms[t]);
    Object first(loss.release()), second(values.release()), third(workspace.release());
    return PyTuple_Pack(3, first.get(), second.get(), third.get());
}

// spec, (scale, ...), gradients of the loss and of the terms or None, workspace, needs_grad of the embeddings and of the
// scale → the gradients needed
PyObject* py_step_backward(PyObject* const* args) {
    const StepTask task = step_task(args[0], args[1]);
    const double of_loss = args[2] == Py_None ? 0 : scalar_of(args[2]);
    double upstream[3];
    for (int64_t t = 0; t < 3; ++t) upstream[t] = task.weights[t] * of_loss;
    if (args[3] != Py_None) {
        const DLTensor of_terms = view(args[3]);
        const int64_t stride = of_terms.strides ? of_terms.strides[0] : 1;
        for (int64_t t = 0; t < 3; ++t) {
            const double own = number_at(of_terms, t * stride);
            upstream[t] = args[2] == Py_None ? own : upstream[t] + own;
        }
    }
    const DLTensor workspace = view(args[4]);
    const Py_ssize_t modalities = static_cast<Py_ssize_t>(task.embeddings.size());
    std::vector<std::unique_ptr<NewTensor>> gradients(modalities);
    std::vector<Rows> out(modalities, Rows{});
    for (Py_ssize_t m = 0; m < modalities; ++m) {
        if (!truth(item(args[5], m))) continue;
        const Rows& rows = task.embeddings[m];
        gradients[m] = std::make_unique<NewTensor>(std::initializer_list<int64_t>{rows.count, rows.dim}, rows.type);
        out[m] = {gradients[m]->data(), rows.type, rows.count, rows.dim, rows.dim};
    }
    const bool of_scale = truth(item(args[5], modalities));
    double scale_gradient = 0;
    {
        NoGil no_gil;
        step_backward(task, static_cast<char*>(workspace.data), upstream, out, of_scale ? &scale_gradient : nullptr);
    }
    Object result(PyList_New(0));
    const auto append = [&](PyObject* gradient) {
        Object owned(gradient);
        if (PyList_Append(result.get(), owned.get()) != 0) throw PythonError();
    };
    for (const std::unique_ptr<NewTensor>& gradient : gradients) {
        if (gradient) append(gradient->release());
    }
    if (of_scale) append(new_scalar(scale_gradient));
    return result.release();
}

// bind(exchange table, names of the contract's tuples in the order of ResultType)
PyObject* py_bind(PyObject* const* args) {
    torch_api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(args[0], "dlpack_exchange_api"));
    if (torch_api == nullptr) throw PythonError();
    if (torch_api->header.version.major != DLPACK_MAJOR_VERSION) throw std::runtime_error("another version of DLPack");
    for (int t = 0; t < num_types; ++t) {
        Py_INCREF(item(args[1], t));
        Py_XDECREF(result_types[t]);
        result_types[t] = item(args[1], t);
        Object fields(PyObject_GetAttrString(result_types[t], "_fields"));
        result_fields[t] = PyTuple_GET_SIZE(fields.get());
    }
    return none();
}

// ---- module ---------------------------------------------------------------------------------------------------------

template <PyObject* (*function)(PyObject* const*), int arity>
PyObject* checked(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count != arity) {
        PyErr_Format(PyExc_TypeError, "%d positional arguments expected, got %zd", arity, count);
        return nullptr;
    }
    try {
        return function(args);
    } catch (const PythonError&) {
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

#define FUNCTION(name, arity) \
    {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(checked<py_##name, arity>)), METH_FASTCALL, nullptr}

PyMethodDef methods[] = {
    FUNCTION(bind, 2),
    FUNCTION(row_statistics, 2),
    FUNCTION(operand, 2),
    FUNCTION(centroids, 5),
    FUNCTION(log_sums, 2),
    FUNCTION(softplus_sums, 2),
    FUNCTION(terms, 8),
    FUNCTION(softmax_sums, 3),
    FUNCTION(add_products, 8),
    FUNCTION(moment_buffer, 1),
    FUNCTION(row_gradients, 7),
    FUNCTION(scale_gradient, 2),
    FUNCTION(step_forward, 3),
    FUNCTION(step_backward, 6),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "gapkernels_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_gapkernels_cpu() { return PyModule_Create(&definition); }
