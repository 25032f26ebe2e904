// The kernels' bodies on the CPU, for tests: these stand in for cpu/ops.cpp in a module of its own,
// so that the Python tests drive them as they drive the core (see RAT_EXT_KERNELS_ON_HOST
// in CMakeLists.txt).
//
// The threads of a block are coroutines that run one after the other from barrier to barrier. So a
// barrier that only some of them reach is an error here, not a hang, and the order in which they
// run between two barriers can be turned: a result that depends on it shows a missing barrier.
#include <ucontext.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "launches.h"

namespace rat::cpu {
namespace {

constexpr int kStack = 64 * 1024;

struct Threads {
  int count = 0, running = 0;
  int64_t block = 0, blocks = 0;
  std::vector<ucontext_t> contexts;
  std::vector<std::vector<char>> stacks;
  std::vector<char> done;
  std::vector<std::array<char, cuda::kScratchPerWarp>> exchanged;
  alignas(16) char scratch[cuda::kScratch];
  ucontext_t scheduler;
  void (*entry)(const void*, Threads*) = nullptr;
  const void* body = nullptr;

  void wait() { swapcontext(&contexts[running], &scheduler); }
};

thread_local Threads* current = nullptr;

class HostThread {
 public:
  explicit HostThread(Threads* threads) : threads_(threads), rank_(threads->running) {}
  int rank() const { return rank_; }
  int size() const { return threads_->count; }
  int64_t block() const { return threads_->block; }
  int64_t blocks() const { return threads_->blocks; }
  void sync() const { threads_->wait(); }
  void* scratch() const { return threads_->scratch; }

  template <typename V>
  V shuffle_xor(V value, int offset) const {
    std::memcpy(threads_->exchanged[rank_].data(), &value, sizeof value);
    sync();
    std::memcpy(&value, threads_->exchanged[rank_ ^ offset].data(), sizeof value);
    sync();
    return value;
  }

  uint32_t ballot(bool vote) const {
    uint32_t votes = vote ? uint32_t{1} << rank_ % cuda::kWarp : 0;
    for (int offset = 1; offset < cuda::kWarp; offset *= 2) votes |= shuffle_xor(votes, offset);
    return votes;
  }

 private:
  Threads* threads_;
  int rank_;
};

void run_thread() {
  Threads* threads = current;
  threads->entry(threads->body, threads);
  threads->done[threads->running] = 1;
}  // uc_link goes on with the scheduler

// Runs blocks with the order of threads that `where` picks: 1 forward, 2 backward, else odd ones
// first.
struct HostLauncher {
  int where;

  int turn(int i, int count) const {
    if (where == 1) return i;
    if (where == 2) return count - 1 - i;
    return i < count / 2 ? 2 * i + 1 : 2 * (i - count / 2);
  }

  template <typename Body>
  void operator()(const Body& body, int64_t blocks, int count) const {
    if (count % cuda::kWarp != 0 || count > cuda::kMaxThreads) {
      throw std::logic_error("threads must be whole warps");
    }
    Threads threads;
    threads.count = count;
    // Fewer blocks than work in places, so that the walk over the grid is run as well.
    threads.blocks = blocks > 3 ? (blocks + 1) / 2 : blocks;
    threads.contexts.resize(count);
    threads.stacks.assign(count, std::vector<char>(kStack));
    threads.exchanged.resize(count);
    threads.body = &body;
    threads.entry = [](const void* own, Threads* all) {
      (*static_cast<const Body*>(own))(HostThread(all));
    };
    current = &threads;
    for (threads.block = 0; threads.block < threads.blocks; ++threads.block) {
      run_block(threads);
    }
  }

  void run_block(Threads& threads) const {
    const int count = threads.count;
    std::memset(threads.scratch, 0xff, sizeof threads.scratch);
    threads.done.assign(count, 0);
    for (int i = 0; i < count; ++i) {
      ucontext_t& context = threads.contexts[i];
      getcontext(&context);
      context.uc_stack.ss_sp = threads.stacks[i].data();
      context.uc_stack.ss_size = kStack;
      context.uc_link = &threads.scheduler;
      makecontext(&context, run_thread, 0);
    }
    int finished = 0;
    while (finished == 0) {
      for (int i = 0; i < count; ++i) {
        threads.running = turn(i, count);
        swapcontext(&threads.scheduler, &threads.contexts[threads.running]);
        finished += threads.done[threads.running];
      }
      if (finished != 0 && finished != count) {
        throw std::logic_error("some threads of a block ended while others wait at a barrier");
      }
    }
  }
};

}  // namespace

void inspect(int where, RowsView x, Bounds bounds, MatrixView flags) {
  cuda::inspect(HostLauncher{where}, x, bounds, flags);
}

void start(int where, MatrixView logits, MatrixView seed, const State& state) {
  cuda::start(HostLauncher{where}, logits, seed, state);
}

void aim(int where, RowsView gradient, RowsView x, RowsView direction, Bounds bounds,
         const State& state) {
  cuda::aim(HostLauncher{where}, gradient, x, direction, bounds, state);
}

void perturb(int where, RowsView x, RowsView direction, RowIndex index, MatrixView probes,
             Bounds bounds, RowsView out) {
  cuda::perturb(HostLauncher{where}, x, direction, index, probes, bounds, out);
}

void advance(int where, MatrixView logits, RowIndex index, const State& state) {
  cuda::advance(HostLauncher{where}, logits, index, state);
}

void extrapolate(int where, MatrixView logits, RowIndex index, double h, const State& state) {
  cuda::extrapolate(HostLauncher{where}, logits, index, h, state);
}

void compact(int where, RowIndex index, MatrixView brackets, int32_t* active, int32_t* count) {
  cuda::compact(HostLauncher{where}, index, brackets, active, count);
}

}  // namespace rat::cpu
