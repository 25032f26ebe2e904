// The kernels' bodies on the CPU, for tests: these stand in for csrc/cpu in a module of its own,
// so that the Python tests drive them as they drive the core (see RAT_EXT_KERNELS_ON_HOST in
// CMakeLists.txt).
//
// `threads`, which means nothing here, chooses the order in which a block's threads run: 1
// ascending, 2 descending, else shuffled by that seed. In every order each warp runs as far ahead
// of the others as the barriers let it, and each thread as far ahead of its warp: where a barrier
// is missing, what it should have waited for has not happened at all.
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/compact.h"
#include "cuda/elements.h"
#include "cuda/logits.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace rat::cuda {
namespace {

constexpr size_t kStackBytes = size_t{1} << 17;
constexpr int64_t kMaxBlocks = 3;  // so that the loops over the grid take several turns

struct Barrier {
  int expected = 0;
  int arrived = 0;
  uint64_t generation = 0;
};

// A thread of the block: a coroutine that runs until it has to wait for others.
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* fake_stack = nullptr;  // AddressSanitizer's
  const Barrier* barrier = nullptr;
  uint64_t generation = 0;
  bool done = false;
  int turn = 0;  // which of the two exchange slots is next

  bool blocked() const { return barrier != nullptr && barrier->generation == generation; }
};

class Block {
 public:
  struct Slot {
    alignas(16) unsigned char bytes[kScratchPerWarp];
  };

  Block(int threads, int order)
      : fibers_(static_cast<size_t>(threads)),
        exchange_(2 * static_cast<size_t>(threads)),
        warps_(static_cast<size_t>(threads / kWarp)),
        warp_order_(warps_.size()),
        lane_order_(kWarp),
        order_(order),
        random_(static_cast<unsigned>(order)) {
    all_.expected = threads;
    for (Barrier& warp : warps_) warp.expected = kWarp;
    for (std::vector<int>* list : {&warp_order_, &lane_order_}) {
      std::iota(list->begin(), list->end(), 0);
      if (order_ == 2) std::reverse(list->begin(), list->end());
    }
  }

  int threads() const { return static_cast<int>(fibers_.size()); }
  Slot* scratch() { return scratch_; }
  Slot& slot(int turn, int rank) { return exchange_[static_cast<size_t>(turn * threads() + rank)]; }
  Fiber& fiber(int rank) { return fibers_[static_cast<size_t>(rank)]; }

  void sync(int rank) { wait(rank, all_); }
  void sync_warp(int rank) { wait(rank, warps_[static_cast<size_t>(rank / kWarp)]); }

  // Calls body(rank) in every thread.
  template <typename Body>
  void run(const Body& body) {
    // Shared memory starts with what an earlier block left.
    std::memset(static_cast<void*>(scratch_), 0xff, sizeof scratch_);
    body_ = &body;
    call_ = [](const void* callable, int rank) { (*static_cast<const Body*>(callable))(rank); };
    running_ = this;
    for (Fiber& fiber : fibers_) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Block::enter, 0);
      fiber.barrier = nullptr;
      fiber.done = false;
    }
    finished_ = 0;
    while (finished_ < threads()) {
      bool stuck = true;
      shuffle(warp_order_);
      for (const int warp : warp_order_) {
        while (run_warp(warp)) stuck = false;
      }
      if (stuck) throw std::logic_error("threads of a block wait at different barriers");
    }
  }

 private:
  void shuffle(std::vector<int>& list) {
    if (order_ > 2) std::shuffle(list.begin(), list.end(), random_);
  }

  // Returns whether any of its threads could run.
  bool run_warp(int warp) {
    bool ran = false;
    shuffle(lane_order_);
    for (const int lane : lane_order_) {
      current_ = warp * kWarp + lane;
      Fiber& next = fiber(current_);
      if (next.done || next.blocked()) continue;
      switch_to(&main_fake_stack_, &main_, next.context, next.stack.get());
      finished_ += next.done ? 1 : 0;
      ran = true;
    }
    return ran;
  }

  void wait(int rank, Barrier& barrier) {
    if (++barrier.arrived == barrier.expected) {
      barrier.arrived = 0;
      ++barrier.generation;
      return;
    }
    fiber(rank).barrier = &barrier;
    fiber(rank).generation = barrier.generation;
    leave(rank);
  }

  static void enter() {
    Block& block = *running_;
    finish_switch(nullptr);
    const int rank = block.current_;
    block.call_(block.body_, rank);
    block.fiber(rank).done = true;
    block.leave(rank);
  }

  void leave(int rank) {
    Fiber& self = fiber(rank);
    switch_to(self.done ? nullptr : &self.fake_stack, &self.context, main_, nullptr);
  }

#if defined(__SANITIZE_ADDRESS__)
  void switch_to(void** fake_stack, ucontext_t* from, const ucontext_t& to, const char* stack) {
    const void* bottom = stack != nullptr ? stack : main_stack_;
    const size_t size = stack != nullptr ? kStackBytes : main_stack_bytes_;
    __sanitizer_start_switch_fiber(fake_stack, bottom, size);
    swapcontext(from, &to);
    finish_switch(fake_stack != nullptr ? *fake_stack : nullptr);
  }
  static void finish_switch(void* fake_stack) {
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
    // A fiber learns here where the main stack is, from which it was entered.
    if (fake_stack == nullptr) {
      running_->main_stack_ = bottom;
      running_->main_stack_bytes_ = size;
    }
  }
  const void* main_stack_ = nullptr;
  size_t main_stack_bytes_ = 0;
#else
  static void switch_to(void**, ucontext_t* from, const ucontext_t& to, const char*) {
    swapcontext(from, &to);
  }
  static void finish_switch(void*) {}
#endif

  inline static thread_local Block* running_ = nullptr;

  std::vector<Fiber> fibers_;
  std::vector<Slot> exchange_;
  std::vector<Barrier> warps_;
  Barrier all_;
  Slot scratch_[kMaxThreads / kWarp];
  std::vector<int> warp_order_, lane_order_;
  int order_;
  std::minstd_rand random_;
  ucontext_t main_;
  void* main_fake_stack_ = nullptr;
  int current_ = 0;
  int finished_ = 0;
  const void* body_ = nullptr;
  void (*call_)(const void*, int) = nullptr;
};

// One thread of a grid. See DeviceThread (launcher.cuh).
class HostThread {
 public:
  HostThread(Block& members, int rank, int64_t block, int64_t blocks)
      : members_(members), rank_(rank), block_(block), blocks_(blocks) {}

  int rank() const { return rank_; }
  int size() const { return members_.threads(); }
  int64_t block() const { return block_; }
  int64_t blocks() const { return blocks_; }
  void sync() const { members_.sync(rank_); }
  void* scratch() const { return members_.scratch(); }

  template <typename V>
  V shuffle_xor(V value, int offset) const {
    const int turn = publish(value);
    std::memcpy(&value, members_.slot(turn, rank_ ^ offset).bytes, sizeof value);
    return value;
  }

  uint32_t ballot(bool vote) const {
    const int turn = publish(vote);
    uint32_t votes = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
      const int other = rank_ - rank_ % kWarp + lane;
      votes |= uint32_t{members_.slot(turn, other).bytes[0]} << lane;
    }
    return votes;
  }

 private:
  // Shows `value` to the warp, in the slots that are returned. They are not written again before
  // the warp has met once more, when all have read them.
  template <typename V>
  int publish(const V& value) const {
    static_assert(std::is_trivially_copyable_v<V> && sizeof(V) <= sizeof(Block::Slot));
    Fiber& self = members_.fiber(rank_);
    const int turn = self.turn;
    self.turn ^= 1;
    std::memcpy(members_.slot(turn, rank_).bytes, &value, sizeof value);
    members_.sync_warp(rank_);
    return turn;
  }

  Block& members_;
  int rank_;
  int64_t block_, blocks_;
};

class HostLauncher {
 public:
  explicit HostLauncher(int order) : order_(order) {}

  template <typename Kernel>
  void operator()(const Kernel& kernel, int64_t blocks, int threads) const {
    if (blocks == 0) return;
    if (blocks < 0 || threads <= 0 || threads > Kernel::kMaxBlock || threads % kWarp != 0) {
      throw std::logic_error(std::string(kernel.op.kName) + " is launched with a block of " +
                             std::to_string(threads) + " threads");
    }
    blocks = std::min(blocks, kMaxBlocks);
    Block members(threads, order_);
    for (int64_t block = 0; block < blocks; ++block) {
      members.run([&](int rank) { kernel(HostThread(members, rank, block, blocks)); });
    }
  }

 private:
  int order_;
};

}  // namespace
}  // namespace rat::cuda

namespace rat::cpu {

void run(Threads order, const Operation& operation) {
  const cuda::HostLauncher launch(order.most);
  std::visit([&](const auto& op) { cuda::launch_on(launch, op); }, operation);
}

}  // namespace rat::cpu
