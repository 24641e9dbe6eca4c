// What the kernels take from torch's library: its thread pool and its matrix products. And memory that is used again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

// A number in bfloat16, by its bits.
struct Bf16 {
    uint16_t bits;
};

int num_threads();

// Calls task(t, thread) for every t < count; threads take the next task when they are done with one.
// One thread, the caller, where there is no more than one task or `parallel` is false.
void run_tasks(int64_t count, bool parallel, const std::function<void(int64_t task, int thread)>& task);

// Whether the library multiplies in bf16 here (AMX or AVX512-BF16), which is then the fastest of its types.
bool has_bf16_products();

// c[m, n] = a[m, k]·b[k, n], or added to c. Rows of a and c are contiguous, `ld` numbers apart.
// In bf16 b holds pairs of rows interleaved, [k/2][n][2], rows of pairs ldb·2 numbers apart, and k is even.
void product(int64_t m, int64_t n, int64_t k, const Bf16* a, int64_t lda, const Bf16* b, int64_t ldb, float* c,
             int64_t ldc, bool add);
void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
             int64_t ldc, bool add);
void product(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb, double* c,
             int64_t ldc, bool add);

// Memory for the length of a call, or of a tensor, aligned to cache lines; not initialised. What was taken last is kept
// for the next call, up to 64 MiB. Under the address sanitizer only what was taken may be touched.
class Workspace {
  public:
    explicit Workspace(size_t bytes);
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    template <class T>
    T* take(int64_t count) {
        T* result = reinterpret_cast<T*>(next_);
        next_ += bytes<T>(count);
#ifdef __SANITIZE_ADDRESS__
        ASAN_UNPOISON_MEMORY_REGION(result, static_cast<size_t>(count) * sizeof(T));
#endif
        return result;
    }

    template <class T>
    static size_t bytes(int64_t count) {
        return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64 + guard;
    }

  private:
#ifdef __SANITIZE_ADDRESS__
    static constexpr size_t guard = 64;
#else
    static constexpr size_t guard = 0;
#endif
    char* memory_;
    char* next_;
    size_t size_;
};
