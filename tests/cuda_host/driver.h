// Runs a launch under the schedules of the emulator and prints one line per schedule.
#pragma once

#include <cstdio>
#include <functional>
#include <string>

#include "cuda/simt.h"

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
