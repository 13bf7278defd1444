// Runs a launch under the schedules of the emulator and prints one line per schedule. Under nvcc: once, on
// the device.
#pragma once

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "cuda/simt.h"

#ifdef __CUDACC__

template <class T>
struct Managed {  // allocator of memory that host and device share
  using value_type = T;
  Managed() = default;
  template <class U>
  Managed(const Managed<U>&) {}
  T* allocate(size_t count) {
    void* memory = nullptr;
    if (cudaMallocManaged(&memory, count * sizeof(T)) != cudaSuccess) std::abort();
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t) { cudaFree(memory); }
  bool operator==(const Managed&) const { return true; }
  bool operator!=(const Managed&) const { return false; }
};
template <class T>
using Vector = std::vector<T, Managed<T>>;

inline const char* vicinal_host_error_text() { return cudaGetErrorString(cudaGetLastError()); }

inline bool under_schedules(int, const std::function<std::string()>& run) {
  const std::string wrong = run();
  std::printf("device: %s\n", wrong.empty() ? "right" : wrong.c_str());
  return wrong.empty();
}

// Waits for the launch whose error code this is.
inline bool done(cudaError_t error) { return error == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess; }

#else

template <class T>
using Vector = std::vector<T>;

inline bool done(cudaError_t error) { return error == cudaSuccess; }

struct NamedSchedule {
  const char* name;
  int order, copies;
  unsigned seed;
};

inline constexpr NamedSchedule kSchedules[] = {
    {"forward eager", vicinal::on_host::kForward, vicinal::on_host::kEager, 1},
    {"reverse lazy", vicinal::on_host::kReverse, vicinal::on_host::kLazy, 1},
    {"random 1", vicinal::on_host::kRandomOrder, vicinal::on_host::kRandomCopies, 1},
    {"random 2", vicinal::on_host::kRandomOrder, vicinal::on_host::kRandomCopies, 2},
    {"random 3", vicinal::on_host::kRandomOrder, vicinal::on_host::kRandomCopies, 3},
};

// `run` launches and says what is wrong with the results ("" if nothing). True if no schedule complains.
inline bool under_schedules(int count, const std::function<std::string()>& run) {
  bool all_right = true;
  for (int i = 0; i < count; ++i) {
    const NamedSchedule& schedule = kSchedules[i];
    vicinal_host_schedule(schedule.order, schedule.copies, schedule.seed);
    const std::string wrong = run();
    all_right = all_right && wrong.empty();
    std::printf("%s: %s\n", schedule.name, wrong.empty() ? "right" : wrong.c_str());
    std::fflush(stdout);
  }
  return all_right;
}

#endif  // __CUDACC__
