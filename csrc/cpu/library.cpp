// The only file that sees torch's headers.

#include "library.h"

#include <sys/mman.h>

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>

int num_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

namespace {

// The thread that multiplied in bf16 has tile registers to give back.
thread_local bool holds_tiles = false;

void release_tiles() {
    if (holds_tiles) at::native::cpublas::brgemm_release(true);
    holds_tiles = false;
}

}  // namespace

void run_tasks(int64_t count, bool parallel, const std::function<void(int64_t, int)>& task) {
    const int64_t threads = parallel ? std::min<int64_t>(num_threads(), count) : 1;
    if (threads <= 1) {
        for (int64_t t = 0; t < count; ++t) task(t, 0);
        release_tiles();
        return;
    }
    std::atomic<int64_t> next{0};
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        const int thread = at::get_thread_num();
        for (int64_t t = next++; t < count; t = next++) task(t, thread);
        release_tiles();
    });
}

bool has_bf16_products() {
#if defined(EMULATE_BF16_PRODUCTS)
    return true;
#elif defined(__AVX512BF16__)
    // Settings of the library may forbid what the processor has: it is asked once.
    static const bool answer = [] {
        alignas(64) Bf16 a[16 * 32] = {}, b[32 * 16] = {};
        alignas(64) float c[16 * 16];
        try {
            product(16, 16, 32, a, 32, b, 16, c, 16, false);
            release_tiles();
            return true;
        } catch (const std::exception&) {
            return false;
        }
    }();
    return answer;
#else
    return false;
#endif
}

void product(int64_t m, int64_t n, int64_t k, const Bf16* a, int64_t lda, const Bf16* b, int64_t ldb, float* c,
             int64_t ldc, bool add) {
#ifdef EMULATE_BF16_PRODUCTS
    const auto number = [](Bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); };
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            float total = 0;
            for (int64_t l = 0; l < k; ++l) total += number(a[i * lda + l]) * number(b[(l / 2 * ldb + j) * 2 + l % 2]);
            c[i * ldc + j] = add ? c[i * ldc + j] + total : total;
        }
    }
#else
    holds_tiles = true;
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const at::BFloat16*>(a),
                                reinterpret_cast<const at::BFloat16*>(b), c, true);
#endif
}

void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
             int64_t ldc, bool add) {
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, false);
}

// float64 serves to check the other types: plain loops over four rows, which the compiler turns into vector code.
void product(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb, double* c,
             int64_t ldc, bool add) {
    constexpr int64_t rows = 4, cols = 16;
    for (int64_t i = 0; i < m; i += rows) {
        for (int64_t j = 0; j < n; j += cols) {
            double total[rows][cols] = {};
            if (m - i >= rows && n - j >= cols) {
                for (int64_t l = 0; l < k; ++l) {
                    for (int64_t p = 0; p < rows; ++p) {
                        for (int64_t q = 0; q < cols; ++q) total[p][q] += a[(i + p) * lda + l] * b[l * ldb + j + q];
                    }
                }
            } else {
                for (int64_t l = 0; l < k; ++l) {
                    for (int64_t p = 0; p < std::min(rows, m - i); ++p) {
                        for (int64_t q = 0; q < std::min(cols, n - j); ++q) {
                            total[p][q] += a[(i + p) * lda + l] * b[l * ldb + j + q];
                        }
                    }
                }
            }
            for (int64_t p = 0; p < std::min(rows, m - i); ++p) {
                for (int64_t q = 0; q < std::min(cols, n - j); ++q) {
                    double& entry = c[(i + p) * ldc + j + q];
                    entry = add ? entry + total[p][q] : total[p][q];
                }
            }
        }
    }
}

namespace {

// H and its transposition are walked across more pages than are looked up fast.
constexpr size_t huge_page = size_t{2} << 20;

// Between calls blocks of this size in all are kept, the last ones given back. An evaluation takes up to five at a time;
// getting new pages for them took a sixth of a step's processor time at N = 2048.
constexpr size_t smallest = size_t{64} << 10, largest_total = size_t{64} << 20;
struct Block {
    char* memory;
    size_t size;
};

// Without a destructor: a thread may give a block back while the process ends.
class Pool {
  public:
    // The smallest that is large enough and not much larger, which others will ask for; or none.
    Block take(size_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex_);
        int best = -1;
        for (int b = 0; b < count_; ++b) {
            const size_t size = blocks_[b].size;
            if (size >= bytes && size <= 2 * bytes + smallest && (best < 0 || size < blocks_[best].size)) best = b;
        }
        return best < 0 ? Block{nullptr, 0} : remove(best);
    }

    void give_back(Block block) {
        if (block.size > largest_total) return std::free(block.memory);
        const std::lock_guard<std::mutex> lock(mutex_);
        while (count_ == capacity || total_ + block.size > largest_total) std::free(remove(0).memory);
        blocks_[count_++] = block;
        total_ += block.size;
    }

  private:
    static constexpr int capacity = 16;

    Block remove(int at) {
        const Block block = blocks_[at];
        std::copy(blocks_ + at + 1, blocks_ + count_--, blocks_ + at);
        total_ -= block.size;
        return block;
    }

    std::mutex mutex_;
    Block blocks_[capacity];  // the one given back last at the end
    int count_ = 0;
    size_t total_ = 0;
};
Pool pool;

}  // namespace

Workspace::Workspace(size_t bytes) {
    const Block block = pool.take(bytes);
    memory_ = block.memory;
    size_ = block.size;
    if (memory_ == nullptr) {
        size_ = (std::max(bytes, smallest) + 4095) / 4096 * 4096;
        const bool large = size_ >= huge_page;
        void* memory = nullptr;
        if (posix_memalign(&memory, large ? huge_page : 4096, size_) != 0) throw std::bad_alloc();
        memory_ = static_cast<char*>(memory);
#ifdef MADV_HUGEPAGE
        if (large) madvise(memory_, size_, MADV_HUGEPAGE);
#endif
    }
    next_ = memory_;
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(memory_, size_);
#endif
}

Workspace::~Workspace() {
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(memory_, size_);
#endif
    pool.give_back({memory_, size_});
}
