#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "attend.h"
#include "context.h"
#include "edge.h"
#include "hash.h"
#include "huge_pages.h"
#include "joint.h"
#include "linear.h"
#include "memory.h"
#include "vicinal_config.h"

#define DECLARE(isa)                                  \
  namespace vicinal::isa {                            \
  void attend_fwd(const AttendFwd& p, int threads);   \
  void attend_bwd(const AttendBwd& p, int threads);   \
  void context_fwd(const ContextFwd& p, int threads); \
  void context_bwd(const ContextBwd& p, int threads); \
  void linear_fwd(const LinearFwd& p, int threads);   \
  void linear_bwd(const LinearBwd& p, int threads);   \
  void linear_step(const LinearStep& p, int threads); \
  void joint_fwd(const JointFwd& p, int threads);     \
  void joint_bwd(const JointBwd& p, int threads);     \
  void hash_fwd(const HashFwd& p, int threads);       \
  void hash_bwd(const HashBwd& p, int threads);       \
  void edge_fwd(const EdgeFwd& p, int threads);       \
  void edge_bwd(const EdgeBwd& p, int threads);       \
  double fma_probe(double seconds, int threads);      \
  }
VICINAL_FOR_EACH_ISA(DECLARE)
#undef DECLARE

namespace vicinal::cpu {
namespace {

// The kernels of an instruction set.
struct Entry {
  const char* name;
  void (*attend_fwd)(const AttendFwd&, int);
  void (*attend_bwd)(const AttendBwd&, int);
  void (*context_fwd)(const ContextFwd&, int);
  void (*context_bwd)(const ContextBwd&, int);
  void (*linear_fwd)(const LinearFwd&, int);
  void (*linear_bwd)(const LinearBwd&, int);
  void (*linear_step)(const LinearStep&, int);
  void (*joint_fwd)(const JointFwd&, int);
  void (*joint_bwd)(const JointBwd&, int);
  void (*hash_fwd)(const HashFwd&, int);
  void (*hash_bwd)(const HashBwd&, int);
  void (*edge_fwd)(const EdgeFwd&, int);
  void (*edge_bwd)(const EdgeBwd&, int);
  double (*fma_probe)(double, int);
};

#define ENTRY(isa)   \
  {#isa,             \
   isa::attend_fwd,  \
   isa::attend_bwd,  \
   isa::context_fwd, \
   isa::context_bwd, \
   isa::linear_fwd,  \
   isa::linear_bwd,  \
   isa::linear_step, \
   isa::joint_fwd,   \
   isa::joint_bwd,   \
   isa::hash_fwd,    \
   isa::hash_bwd,    \
   isa::edge_fwd,    \
   isa::edge_bwd,    \
   isa::fma_probe},
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
  current().attend_fwd(p, threads);
}

void attend_bwd(const AttendBwd& p, int threads) {
  const Attend& a = p.a;
  const int64_t size = bytes_of(a.dtype);
  const Span dq = Span::of(p.dq, a.batch, a.n_q, a.heads, a.head_dim, size);
  const Span dk = Span::of(p.dk, a.batch, a.n_k, a.heads, a.head_dim, size);
  const Span dv = Span::of(p.dv, a.batch, a.n_k, a.heads, a.head_dim_v, size);
  advise_huge(dq.with(dk).with(dv)), advise_huge(dk), advise_huge(dv);
  current().attend_bwd(p, threads);
}

void context_fwd(const ContextFwd& p, int threads) { current().context_fwd(p, threads); }
void context_bwd(const ContextBwd& p, int threads) { current().context_bwd(p, threads); }
void linear_fwd(const LinearFwd& p, int threads) { current().linear_fwd(p, threads); }
void linear_bwd(const LinearBwd& p, int threads) { current().linear_bwd(p, threads); }
void linear_step(const LinearStep& p, int threads) { current().linear_step(p, threads); }
void joint_fwd(const JointFwd& p, int threads) { current().joint_fwd(p, threads); }
void joint_bwd(const JointBwd& p, int threads) { current().joint_bwd(p, threads); }
void hash_fwd(const HashFwd& p, int threads) { current().hash_fwd(p, threads); }
void hash_bwd(const HashBwd& p, int threads) { current().hash_bwd(p, threads); }

void edge_fwd(const EdgeFwd& p, int threads) {
  const Edge& a = p.a;
  const int64_t size = bytes_of(a.dtype);
  advise_huge(Span::of(p.out, 1, a.graph.n_dst, a.heads, a.dim_v, size));
  advise_huge(Span::of(p.edge, 1, a.edges, a.heads, a.dim, size));
  current().edge_fwd(p, threads);
}

void edge_bwd(const EdgeBwd& p, int threads) {
  const Edge& a = p.a;
  const int64_t size = bytes_of(a.dtype);
  advise_huge(Span::of(p.dq, 1, a.graph.n_dst, a.heads, a.dim, size));
  advise_huge(Span::of(p.dk, 1, a.graph.n_src, a.heads, a.dim, size));
  advise_huge(Span::of(p.dv, 1, a.graph.n_src, a.heads, a.dim_v, size));
  for (const Rows& t : {p.dedge_k, p.dedge_mul}) advise_huge(Span::of(t, 1, a.edges, a.heads, a.dim, size));
  for (const Rows& t : {p.dedge_v, p.dedge_gate})
    advise_huge(Span::of(t, 1, a.edges, a.heads, a.dim_v, size));
  current().edge_bwd(p, threads);
}

double fma_probe(double seconds, int threads) { return current().fma_probe(seconds, threads); }

}  // namespace vicinal::cpu
