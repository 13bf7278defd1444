// Fibers, scheduler, barriers and warp collectives behind cuda_on_host.h. Always compiled without sanitizers;
// tells them about fibers and orderings where they are linked in. Blocks run one after another, each CUDA
// thread on its own stack.
//
// Threads switch only inside primitives, so a schedule is (which runnable thread goes on, when cp.async
// copies, block order). Only sync_threads and sync_warp order memory for the race detector: shuffles,
// ldmatrix and mma do not, as in PTX.
#include "cuda_on_host.h"

#include <sys/mman.h>

#include <bit>
#include <cstring>
#include <numeric>
#include <vector>

#include "collectives.h"
#include "fibers.h"
#include "report.h"

namespace vicinal::on_host {

Thread* current = nullptr;

namespace {

constexpr size_t kPage = 4096, kGap = 256;
constexpr int kMaxThreads = 1024, kMaxArrays = 64;

struct PendingCopy {
  Copy copy;
  int group;
};

// A stack, the sanitizers' identity of it, and the CUDA thread that runs on it now.
struct Fiber : Thread {
  Stack stack;
  int id = 0;
  bool exited = false;
  const char* waits_in = nullptr;
  Place waits_at{};
  std::vector<PendingCopy> copies;  // those before `copied` are done
  size_t copied = 0;
  int group = 0;
};

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
  Place at{};
  char tags[2];
};

struct Group {  // lanes of one warp inside one collective
  unsigned mask = 0, arrived = 0, generation = 0;
  Op op{};
  Place at{};
  void* args[32];
  char tags[2];
};

struct Warp {
  unsigned exited = 0;
  Group groups[32];  // by lowest lane of the mask
};

struct Machine {
  Order order = kForward;
  Copies copies = kEager;
  uint32_t random = 1;
  std::string error;
  long bank_conflicts = 0;

  void (*entry)(void*) = nullptr;
  void* args = nullptr;
  std::vector<Fiber*> pool;
  size_t next_in_pool = 0;
  std::vector<Fiber*> fibers;  // of the running block, by thread id
  uint64_t runnable[kMaxThreads / 64];
  int live = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0, shared_room = 0, shared_limit = 227 * 1024, largest_block = 0;
  Fiber main;  // the caller of launch; no stack of its own
  char launch_tag, done_tag;
} m;

Fiber* self() { return static_cast<Fiber*>(current); }

uint32_t random_bits() {
  m.random ^= m.random << 13;
  m.random ^= m.random >> 17;
  m.random ^= m.random << 5;
  return m.random >> 8;
}

void set_runnable(int id) { m.runnable[id / 64] |= uint64_t{1} << (id % 64); }

int pick() {  // next runnable thread by the schedule, or -1
  const int words = kMaxThreads / 64;
  if (m.order == kReverse) {
    for (int w = words - 1; w >= 0; --w) {
      if (m.runnable[w]) return w * 64 + 63 - std::countl_zero(m.runnable[w]);
    }
    return -1;
  }
  const int n = static_cast<int>(m.fibers.size());
  const int start = m.order == kRandomOrder ? static_cast<int>(random_bits() % n) : 0;
  uint64_t head = m.runnable[start / 64] & (~uint64_t{0} << (start % 64));
  if (head) return start / 64 * 64 + std::countr_zero(head);
  for (int i = 1; i <= words; ++i) {
    const int w = (start / 64 + i) % words;
    if (m.runnable[w]) return w * 64 + std::countr_zero(m.runnable[w]);
  }
  return -1;
}

void switch_to(Fiber* to, bool for_good = false) {
  Fiber* from = self();
  if (to == from) return;
  current = to;
  switch_stack(from->stack, to->stack, for_good);
}

[[noreturn]] void fail(const std::string& text) {
  m.error = text;
  if (current == &m.main) std::abort();
  release(&m.done_tag);
  switch_to(&m.main);
  __builtin_unreachable();
}

std::string whereabouts() {
  const uint3 b = m.fibers[0]->block_idx;
  std::string text = format("deadlock in block (%u, %u, %u)", b.x, b.y, b.z);
  auto state = [](const Fiber* f) {
    return f->exited ? std::string("exited") : std::string("in ") + f->waits_in + " at " + show(f->waits_at);
  };
  const int n = static_cast<int>(m.fibers.size());
  for (int first = 0, last; first < n; first = last + 1) {
    const std::string what = state(m.fibers[first]);
    for (last = first; last + 1 < n && state(m.fibers[last + 1]) == what;) ++last;
    text += format("; threads %d-%d %s", first, last, what.c_str());
  }
  return text;
}

// Lets another thread go on; the caller has already been queued or noted as waiting.
void go_on(bool for_good = false) {
  const int next = pick();
  if (next < 0) {
    if (m.live > 0) fail(whereabouts());
    return switch_to(&m.main, for_good);
  }
  m.runnable[next / 64] &= ~(uint64_t{1} << (next % 64));
  switch_to(m.fibers[next], for_good);
}

void wait_in(const char* what, Place at) {
  self()->waits_in = what;
  self()->waits_at = at;
  go_on();
}

void open_barrier_if_full() {
  if (m.live == 0 || m.barrier.arrived < m.live) return;
  for (Fiber* f : m.fibers) {
    if (!f->exited) set_runnable(f->id);
  }
  m.barrier.arrived = 0;
  ++m.barrier.generation;
}

// Computes for the whole group and lets its lanes go on once every live lane of the mask has arrived.
bool finish_if_full(int warp, Group& group) {
  if (!group.arrived || (group.mask & ~m.warps[warp].exited & ~group.arrived)) return false;
  if (group.op == kShuffle) shuffle_lanes(group.arrived, group.args);
  if (group.op == kLdmatrix) m.bank_conflicts += distribute_matrices(group.args);
  if (group.op >= kMmaBf16) multiply_tiles(group.op, group.args);
  for (unsigned rest = group.arrived; rest; rest &= rest - 1)
    set_runnable(warp * 32 + std::countr_zero(rest));
  group.arrived = 0;
  ++group.generation;
  return true;
}

void exit_thread() {
  Fiber* f = self();
  if (f->copied < f->copies.size()) fail(format("thread %d exits with cp.async copies under way", f->id));
  release(&m.done_tag);
  f->exited = true;
  --m.live;
  Warp& warp = m.warps[f->id / 32];
  warp.exited |= 1u << (f->id % 32);
  open_barrier_if_full();
  for (Group& group : warp.groups) finish_if_full(f->id / 32, group);
  go_on(true);
}

void fiber_main() {
  entered(m.main.stack);
  acquire(&m.launch_tag);
  m.entry(m.args);
  exit_thread();
}

// Under the race detector identities and stacks rotate from block to block: one that came back at once would
// seem ordered after itself and hide races between blocks.
Fiber* fiber_for(int id, int threads) {
  const size_t size = has_race_detector() ? 8 * threads + 7 : threads;
  if (m.next_in_pool >= size) m.next_in_pool = 0;
  if (m.next_in_pool == m.pool.size()) {
    m.pool.push_back(new Fiber);
    m.pool.back()->stack = new_stack();
  }
  Fiber* f = m.pool[m.next_in_pool++];
  start_at(f->stack, fiber_main);
  f->id = id;
  f->exited = false;
  f->copies.clear();
  f->copied = 0;
  f->group = 0;
  return f;
}

void map_shared(size_t bytes) {
  m.shared_bytes = bytes;
  m.shared_room = (bytes + kMaxArrays * (kGap + 16) + kPage - 1) / kPage * kPage;
  void* memory = mmap(nullptr, m.shared_room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  m.shared = static_cast<unsigned char*>(memory);
  memset(m.shared, 0xff, m.shared_room);
  poison(m.shared, m.shared_room);
}

void run_block(uint3 block_idx, dim3 grid, dim3 block, size_t smem) {
  const int threads = static_cast<int>(block.x * block.y * block.z);
  map_shared(smem);
  m.barrier = Barrier{};
  m.warps.assign((threads + 31) / 32, Warp{});
  if (threads % 32) m.warps.back().exited = ~0u << (threads % 32);
  m.fibers.clear();
  for (int id = 0; id < threads; ++id) {
    Fiber* f = fiber_for(id, threads);
    const unsigned x = id;
    f->thread_idx = uint3{x % block.x, x / block.x % block.y, x / (block.x * block.y)};
    f->block_idx = block_idx;
    f->block_dim = block;
    f->grid_dim = grid;
    m.fibers.push_back(f);
    set_runnable(id);
  }
  m.live = threads;
  release(&m.launch_tag);
  go_on();
  memset(m.runnable, 0, sizeof m.runnable);
  unpoison(m.shared, m.shared_room);
  munmap(m.shared, m.shared_room);
}

}  // namespace

unsigned char* shared_base() { return m.shared; }
size_t shared_limit() { return m.shared_limit; }

unsigned char* take_shared(unsigned char** next, size_t* used, size_t bytes, Place at) {
  unsigned char* array = *next;
  const size_t rounded = (bytes + 15) / 16 * 16;
  *used += rounded;
  *next += rounded + kGap;
  if (*used > m.shared_bytes) {
    fail(format("shared memory: %zu bytes taken, the launch gave %zu, at ", *used, m.shared_bytes) +
         show(at));
  }
  unpoison(array, bytes);
  return array;
}

void sync_block(Place at) {
  Barrier& barrier = m.barrier;
  if (barrier.arrived && !same(barrier.at, at)) {
    fail("sync_threads reached from two places: " + show(barrier.at) + " and " + show(at));
  }
  barrier.at = at;
  void* tag = &barrier.tags[barrier.generation % 2];
  release(tag);
  ++barrier.arrived;
  open_barrier_if_full();
  wait_in("sync_threads", at);
  acquire(tag);
}

void collective(Op op, unsigned mask, void* args, Place at) {
  Fiber* f = self();
  const int lane = f->id % 32, warp = f->id / 32;
  if (!(mask >> lane & 1)) lane_outside(lane, at);
  Group& group = m.warps[warp].groups[std::countr_zero(mask)];
  if (!group.arrived) {
    group.mask = mask;
    group.op = op;
    group.at = at;
  } else if (group.op != op || group.mask != mask || !same(group.at, at)) {
    fail(format("divergent collectives in warp %d: %s (mask %08x) at ", warp, name_of(group.op), group.mask) +
         show(group.at) + format(" and %s (mask %08x) at ", name_of(op), mask) + show(at));
  }
  void* tag = &group.tags[group.generation % 2];
  if (op == kSyncWarp) release(tag);
  group.args[lane] = args;
  group.arrived |= 1u << lane;
  finish_if_full(warp, group);
  wait_in(name_of(op), at);
  if (op == kSyncWarp) acquire(tag);
}

int lane_id() { return self()->id % 32; }

void lane_outside(int lane, Place at) {
  fail(format("lane %d is outside the mask of the collective at ", lane) + show(at));
}

void check_aligned(const void* pointer, int bytes, const char* what, Place at) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) {
    fail(format("%s not aligned to %d bytes at ", what, bytes) + show(at));
  }
}

void check_copy(const Copy& copy, Place at) {
  check_aligned(copy.to, copy.bytes, "cp.async destination", at);
  if (copy.valid) check_aligned(copy.from, copy.bytes, "cp.async source", at);
  if (copy.valid < 0 || copy.valid > copy.bytes)
    fail(format("cp.async of %d valid bytes at ", copy.valid) + show(at));
}

bool copy_at_once() { return m.copies == kEager || (m.copies == kRandomCopies && random_bits() % 2); }
void queue_copy(const Copy& copy) { self()->copies.push_back({copy, self()->group}); }
void commit_copies() { ++self()->group; }

bool next_copy(int groups_left, Copy* copy) {
  Fiber* f = self();
  if (f->copied == f->copies.size() || f->copies[f->copied].group >= f->group - groups_left) return false;
  *copy = f->copies[f->copied++].copy;
  if (f->copied == f->copies.size()) {
    f->copies.clear();
    f->copied = 0;
  }
  return true;
}

cudaError_t run_grid(void (*entry)(void*), void* args, dim3 grid, dim3 block, size_t smem) {
  m.error.clear();
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, threads = uint64_t{block.x} * block.y * block.z;
  if (!blocks || !threads || threads > kMaxThreads || smem > m.shared_limit || grid.y > 65535 ||
      grid.z > 65535) {
    m.error = format("launch of %ux%ux%u blocks, %ux%ux%u threads, %zu bytes of shared memory is impossible",
                     grid.x, grid.y, grid.z, block.x, block.y, block.z, smem);
    return cudaErrorInvalidConfiguration;
  }
  if (smem > m.largest_block) m.largest_block = smem;
  m.entry = entry;
  m.args = args;
  current = &m.main;
  name_main(m.main.stack);
  uint64_t first = m.order == kReverse ? blocks - 1 : 0, step = m.order == kReverse ? blocks - 1 : 1;
  if (m.order == kRandomOrder) {
    first = random_bits() % blocks;
    for (step = 1 + random_bits() % blocks; std::gcd(step, blocks) != 1;) ++step;
  }
  for (uint64_t i = 0; i < blocks && m.error.empty(); ++i) {
    const uint64_t b = (first + i * step) % blocks;
    const auto x = static_cast<unsigned>(b % grid.x), rest = static_cast<unsigned>(b / grid.x);
    run_block(uint3{x, rest % grid.y, rest / grid.y}, grid, block, smem);
  }
  acquire(&m.done_tag);
  return m.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace vicinal::on_host

using namespace vicinal::on_host;

extern "C" {
void vicinal_host_schedule(int order, int copies, unsigned seed) {
  m.order = static_cast<Order>(order);
  m.copies = static_cast<Copies>(copies);
  m.random = seed ? seed : 1;
}
const char* vicinal_host_error_text() { return m.error.c_str(); }
void vicinal_host_shared_memory(size_t bytes) { m.shared_limit = bytes; }
size_t vicinal_host_largest_block() { return m.largest_block; }
long vicinal_host_bank_conflicts() { return m.bank_conflicts; }
}
