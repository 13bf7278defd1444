// Text of the emulator's error reports.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>

#include "cuda_on_host.h"

namespace vicinal::on_host {

inline std::string format(const char* pattern, ...) {
  char text[512];
  va_list args;
  va_start(args, pattern);
  vsnprintf(text, sizeof text, pattern, args);
  va_end(args);
  return text;
}

inline std::string show(Place at) {
  const char* slash = strrchr(at.file_name(), '/');
  return format("%s:%u", slash ? slash + 1 : at.file_name(), static_cast<unsigned>(at.line()));
}

inline bool same(Place a, Place b) { return a.line() == b.line() && !strcmp(a.file_name(), b.file_name()); }

}  // namespace vicinal::on_host
