#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

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

void attend_fwd(const AttendFwd& p, int threads) { current().fwd(p, threads); }
void attend_bwd(const AttendBwd& p, int threads) { current().bwd(p, threads); }

}  // namespace vicinal::cpu
