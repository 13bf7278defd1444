#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "attend.h"
#include "memory.h"
#include "vicinal_config.h"

#define DECLARE(isa)                                \
  namespace vicinal::isa {                          \
  void attend_fwd(const AttendFwd& p, int threads); \
  void attend_bwd(const AttendBwd& p, int threads); \
  }
VICINAL_FOR_EACH_ISA(DECLARE)
#undef DECLARE

namespace vicinal::cpu {
namespace {

struct Entry {
  const char* name;
  void (*fwd)(const AttendFwd&, int);
  void (*bwd)(const AttendBwd&, int);
};

#define ENTRY(isa) {#isa, &vicinal::isa::attend_fwd, &vicinal::isa::attend_bwd},
constexpr Entry kEntries[] = {VICINAL_FOR_EACH_ISA(ENTRY)};
#undef ENTRY

bool runs(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!std::strcmp(name, "avx2")) return avx2;
  if (!std::strcmp(name, "avx512")) return avx512;
  if (!std::strcmp(name, "avx512bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return !std::strcmp(name, "portable");
}

const std::string& available() {
  static const std::string names = [] {
    std::string text;
    for (const Entry& e : kEntries) {
      if (runs(e.name)) text += (text.empty() ? "" : " ") + std::string(e.name);
    }
    return text;
  }();
  return names;
}

const Entry* find(const char* name) {
  const Entry* best = nullptr;
  for (const Entry& e : kEntries) {
    if (runs(e.name) && (!*name || !std::strcmp(name, e.name))) best = &e;
  }
  return best;
}

// The bytes from the first element that a kernel writes to the last one.
struct Span {
  uintptr_t begin = 0, end = 0;

  static Span of(const Rows& t, int64_t batch, int64_t tokens, int64_t heads, int64_t dim, int64_t bytes) {
    if (!t.data || batch * tokens * heads * dim <= 0) return {};
    const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data);
    const int64_t last = (batch - 1) * t.stride_b + (tokens - 1) * t.stride_n + (heads - 1) * t.stride_h;
    return {begin, begin + static_cast<uintptr_t>((last + dim) * bytes)};
  }
  Span with(const Span& other) const {  // one span where they overlap, as in a packed gradient
    if (other.begin >= end || begin >= other.end) return *this;
    return {begin < other.begin ? begin : other.begin, end > other.end ? end : other.end};
  }
};

// Asks for huge pages below an output that the allocator may just have taken from the system: the faults of
// small ones cost as much as the kernel (67 against 13 ms for 144 MB on a virtual Zen 5, one thread).
void advise_huge(const Span& span) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t(2) << 20, kLeast = 2 * kPage;
  const uintptr_t begin = (span.begin + kPage - 1) & ~(kPage - 1), end = span.end & ~(kPage - 1);
  if (span.end - span.begin >= kLeast && begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only advice: it may fail
#else
  (void)span;
#endif
}

int64_t bytes_of(DType dtype) { return dtype == kF64 ? 8 : dtype == kF32 ? 4 : 2; }

std::atomic<const Entry*> chosen{nullptr};

const Entry& current() {
  const Entry* e = chosen.load(std::memory_order_relaxed);
  if (!e) {
    const char* name = std::getenv("VICINAL_CPU_ISA");
    e = find(name ? name : "");
    if (!e)
      throw std::runtime_error(std::string("VICINAL_CPU_ISA=") + name +
                               " is not available; available: " + available());
    chosen = e;
  }
  return *e;
}

}  // namespace

void* thread_scratch(size_t bytes) {
  struct Memory {
    void* data = nullptr;
    size_t size = 0;
    ~Memory() { std::free(data); }
  };
  thread_local Memory memory;
  if (memory.size < bytes) {
    std::free(memory.data);
    memory.size = (bytes + 4095) / 4096 * 4096;
    memory.data = std::aligned_alloc(4096, memory.size);
    if (!memory.data) std::abort();
  }
  return memory.data;
}

const char* available_isas() { return available().c_str(); }
const char* isa() { return current().name; }

void set_isa(const char* name) {
  const Entry* e = *name ? find(name) : nullptr;
  if (*name && !e) {
    throw std::invalid_argument("no instruction set '" + std::string(name) + "'; available: " + available());
  }
  chosen = e;
}

void attend_fwd(const AttendFwd& p, int threads) {
  const Attend& a = p.a;
  advise_huge(Span::of(p.out, a.batch, a.n_q, a.heads, a.head_dim_v, bytes_of(a.dtype)));
  current().fwd(p, threads);
}

void attend_bwd(const AttendBwd& p, int threads) {
  const Attend& a = p.a;
  const int64_t size = bytes_of(a.dtype);
  const Span dq = Span::of(p.dq, a.batch, a.n_q, a.heads, a.head_dim, size);
  const Span dk = Span::of(p.dk, a.batch, a.n_k, a.heads, a.head_dim, size);
  const Span dv = Span::of(p.dv, a.batch, a.n_k, a.heads, a.head_dim_v, size);
  advise_huge(dq.with(dk).with(dv)), advise_huge(dk), advise_huge(dv);
  current().bwd(p, threads);
}

}  // namespace vicinal::cpu
