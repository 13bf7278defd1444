// Case files: a launch of a CUDA kernel on the emulator, and the buffers that it reads and writes.
// Kind (8 bytes), order, copies, seed, shared memory limit (int64 each), the parameter struct (int64 size,
// bytes), the offsets of its pointers (int64 count, each int64), the buffers (int64 count, each: int64
// address that the pointers refer to, int64 size, bytes). Buffers get memory of exactly their size, so that
// AddressSanitizer knows their ends.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/simt.h"

namespace case_file {

struct Buffer {
  int64_t address, size;
  unsigned char* data;
};

inline void read_bytes(FILE* file, void* to, size_t size) {
  if (size && fread(to, 1, size, file) != size) std::exit(3);
}

inline int64_t read_number(FILE* file) {
  int64_t value;
  read_bytes(file, &value, sizeof value);
  return value;
}

struct Case {
  char kind[8];
  std::vector<unsigned char> params;
  std::vector<int64_t> pointers;
  std::vector<Buffer> buffers;
};

// The parameters, with pointers to the buffers here.
template <class Params>
Params params_of(const Case& c) {
  const auto& [kind, bytes, pointers, buffers] = c;
  if (bytes.size() != sizeof(Params)) std::exit(4);
  std::vector<unsigned char> copy = bytes;
  for (int64_t offset : pointers) {
    int64_t address;
    memcpy(&address, &copy[offset], sizeof address);
    for (const Buffer& buffer : buffers) {
      if (address < buffer.address || address >= buffer.address + buffer.size) continue;
      unsigned char* moved = buffer.data + (address - buffer.address);
      memcpy(&copy[offset], &moved, sizeof moved);
      break;
    }
  }
  Params params;
  memcpy(&params, copy.data(), sizeof params);
  return params;
}

// launch(case, workspace): `workspace(bytes)` gives memory that starts as NaN.
template <class Launch>
int run(int argc, char** argv, Launch launch) {
  FILE* file = argc == 2 ? fopen(argv[1], "r+b") : nullptr;
  if (!file) return 2;
  Case c;
  read_bytes(file, c.kind, sizeof c.kind);
  const int64_t order = read_number(file), copies = read_number(file), seed = read_number(file);
  const int64_t shared = read_number(file);
  c.params.resize(read_number(file));
  read_bytes(file, c.params.data(), c.params.size());
  c.pointers.resize(read_number(file));
  for (int64_t& offset : c.pointers) offset = read_number(file);
  c.buffers.resize(read_number(file));
  const long first = ftell(file);
  for (Buffer& buffer : c.buffers) {
    buffer.address = read_number(file);
    buffer.size = read_number(file);
    buffer.data = static_cast<unsigned char*>(malloc(buffer.size));
    read_bytes(file, buffer.data, buffer.size);
  }
  vicinal_host_schedule(static_cast<int>(order), static_cast<int>(copies), static_cast<unsigned>(seed));
  vicinal_host_shared_memory(shared);
  std::vector<void*> taken;
  const auto workspace = [&](int64_t bytes) {
    taken.push_back(malloc(bytes));
    memset(taken.back(), 0xff, bytes);
    return taken.back();
  };
  const int error = launch(c, workspace);
  for (void* memory : taken) free(memory);
  if (error) {
    std::fprintf(stderr, "launch failed with error %d: %s\n", error, vicinal_host_error_text());
    return 1;
  }
  fseek(file, first, SEEK_SET);
  for (const Buffer& buffer : c.buffers) {
    fseek(file, 2 * sizeof(int64_t), SEEK_CUR);
    fwrite(buffer.data, 1, buffer.size, file);
    free(buffer.data);
  }
  std::printf("%ld %zu\n", vicinal_host_bank_conflicts(), vicinal_host_largest_block());
  return fclose(file);
}

}  // namespace case_file
