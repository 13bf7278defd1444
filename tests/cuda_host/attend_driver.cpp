// Runs one attend launch from a case file on the emulator and writes the buffers back.
// Case file: kind ("fwd" or "bwd", 8 bytes), order, copies, seed, shared memory limit (int64 each), the
// parameter struct of attend.h (int64 size, bytes), the offsets of its pointers (int64 count, each int64),
// the buffers (int64 count, each: int64 address that the pointers refer to, int64 size, bytes). Buffers get
// memory of exactly their size, so that AddressSanitizer knows their ends.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "attend.h"
#include "cuda/simt.h"

namespace {

struct Buffer {
  int64_t address, size;
  unsigned char* data;
};

void read_bytes(FILE* file, void* to, size_t size) {
  if (size && fread(to, 1, size, file) != size) std::exit(3);
}

int64_t read_number(FILE* file) {
  int64_t value;
  read_bytes(file, &value, sizeof value);
  return value;
}

template <class Params>
Params relocated(const std::vector<unsigned char>& bytes, const std::vector<int64_t>& pointers,
                 const std::vector<Buffer>& buffers) {
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

int run_bwd(const vicinal::AttendBwd& p) {
  const int64_t bytes = vicinal::cuda::attend_bwd_workspace(p);
  void* workspace = malloc(bytes);
  memset(workspace, 0xff, bytes);
  const int error = vicinal::cuda::attend_bwd(p, workspace, nullptr);
  free(workspace);
  return error;
}

}  // namespace

int main(int argc, char** argv) {
  FILE* file = argc == 2 ? fopen(argv[1], "r+b") : nullptr;
  if (!file) return 2;
  char kind[8];
  read_bytes(file, kind, sizeof kind);
  const int64_t order = read_number(file), copies = read_number(file), seed = read_number(file);
  const int64_t shared = read_number(file);
  std::vector<unsigned char> params(read_number(file));
  read_bytes(file, params.data(), params.size());
  std::vector<int64_t> pointers(read_number(file));
  for (int64_t& offset : pointers) offset = read_number(file);
  std::vector<Buffer> buffers(read_number(file));
  const long first = ftell(file);
  for (Buffer& buffer : buffers) {
    buffer.address = read_number(file);
    buffer.size = read_number(file);
    buffer.data = static_cast<unsigned char*>(malloc(buffer.size));
    read_bytes(file, buffer.data, buffer.size);
  }
  vicinal_host_schedule(static_cast<int>(order), static_cast<int>(copies), static_cast<unsigned>(seed));
  vicinal_host_shared_memory(shared);
  const int error =
      strcmp(kind, "fwd")
          ? run_bwd(relocated<vicinal::AttendBwd>(params, pointers, buffers))
          : vicinal::cuda::attend_fwd(relocated<vicinal::AttendFwd>(params, pointers, buffers), nullptr);
  if (error) {
    std::fprintf(stderr, "launch failed with error %d: %s\n", error, vicinal_host_error_text());
    return 1;
  }
  fseek(file, first, SEEK_SET);
  for (const Buffer& buffer : buffers) {
    fseek(file, 2 * sizeof(int64_t), SEEK_CUR);
    fwrite(buffer.data, 1, buffer.size, file);
    free(buffer.data);
  }
  std::printf("%ld %zu\n", vicinal_host_bank_conflicts(), vicinal_host_largest_block());
  return fclose(file);
}
