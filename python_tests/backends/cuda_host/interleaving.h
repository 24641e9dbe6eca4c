// Warps, barriers and shared memory of a cluster for tests of who waits for whom: fibers that take turns at random,
// barriers that count arrivals and bytes as those of the hardware do, and operands that know what they hold.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace gapkernels {

constexpr int kWarps = 4;          // of a consumer
constexpr int kPatience = 20'000;  // turns without an event, after which nothing will happen any more

class Fibers {
 public:
  explicit Fibers(unsigned seed) : random_(seed) {}

  void add(std::function<void()> body) {
    fibers_.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers_.back();
    fiber.body = std::move(body);
    fiber.stack.resize(64 * 1024);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Fibers::enter), 0);
  }

  // `between` runs between turns. Ends when all fibers have, when `problem` is not empty, or when nothing happens.
  void run(std::string& problem, const std::function<void()>& between) {
    for (int idle = 0; problem.empty(); ++idle) {
      std::vector<Fiber*> alive;
      for (auto& fiber : fibers_) {
        if (!fiber->ended) alive.push_back(fiber.get());
      }
      if (alive.empty()) return;
      if (happened_) idle = 0;
      happened_ = false;
      if (idle > kPatience) problem = "nobody can go on";
      current_ = alive[pick(alive.size())];
      running_ = this;
      swapcontext(&scheduler_, &current_->context);
      between();
    }
  }

  void yield() { swapcontext(&current_->context, &scheduler_); }
  void happen() { happened_ = true; }
  size_t pick(size_t count) { return random_() % count; }

  // A few turns of others, sometimes many: a warp may lose any race.
  void dawdle() {
    for (size_t turns = pick(16) == 0 ? pick(200) : pick(3); turns > 0; --turns) yield();
  }

 private:
  struct Fiber {
    std::function<void()> body;
    std::vector<char> stack;
    ucontext_t context;
    bool ended = false;
  };

  static void enter() {
    Fiber* own = running_->current_;
    own->body();
    own->ended = true;
  }

  static inline Fibers* running_ = nullptr;
  std::mt19937 random_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  ucontext_t scheduler_;
  Fiber* current_ = nullptr;
  bool happened_ = false;
};

struct Mbarrier {
  int expected = 0;
  int pending = 0;
  int bytes = 0;
  unsigned completed = 0;  // phases

  void init(int arrivals) { expected = pending = arrivals; }
  bool passes(uint32_t phase) const { return (completed & 1) != phase; }

  bool change(int arrivals, int announced) {
    pending -= arrivals;
    bytes += announced;
    if (pending < 0) return false;
    if (pending == 0 && bytes == 0) {
      ++completed;
      pending = expected;
    }
    return true;
  }
};

// What a part of shared memory holds: a step of rows or columns of a matrix.
struct Contents {
  int matrix = -1;
  int start = -1;
  int step = -1;
  int version = 0;  // copies begun so far

  bool is(int wanted_matrix, int wanted_start, int wanted_step) const {
    return matrix == wanted_matrix && start == wanted_start && step == wanted_step;
  }
};

// A cluster of blocks whose roles are fibers: copies land at a random time after they were issued, each on its own.
class Simulation {
 protected:
  explicit Simulation(unsigned seed) : fibers_(seed) {}

  // What went wrong, or nothing; counts the tiles that were multiplied.
  std::string run(int& tiles) {
    fibers_.run(problem_, [this] { land(); });
    tiles = tiles_;
    if (problem_.empty() && !copies_.empty()) problem_ = "copies arrive after the end";
    return problem_;
  }

  void change(Mbarrier& barrier, int arrivals, int bytes) {
    fibers_.happen();
    if (!barrier.change(arrivals, bytes)) fail("more arrivals than expected");
  }

  void wait(const Mbarrier& barrier, uint32_t phase) {
    while (!barrier.passes(phase)) fibers_.yield();
  }

  void copy(Contents& target, Contents value, Mbarrier& barrier) {
    value.version = target.version + 1;
    target = Contents{-1, -1, -1, value.version};
    copies_.push_back({&target, value, &barrier});
  }

  void fail(const char* what) {
    if (problem_.empty()) problem_ = what;
  }

  Fibers fibers_;
  int tiles_ = 0;

 private:
  struct Copy {
    Contents* target;
    Contents value;
    Mbarrier* barrier;
  };

  // Some of the copies under way.
  void land() {
    while (!copies_.empty() && fibers_.pick(3) == 0) {
      const size_t which = fibers_.pick(copies_.size());
      const Copy copy = copies_[which];
      copies_.erase(copies_.begin() + which);
      if (copy.target->version != copy.value.version) fail("two copies to one place");
      *copy.target = copy.value;
      change(*copy.barrier, 0, -1);
    }
  }

  std::vector<Copy> copies_;
  std::string problem_;
};

}  // namespace gapkernels
