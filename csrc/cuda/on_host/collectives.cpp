// Warp collectives of the emulator, on the arguments that the lanes left on their stacks. Layouts: see
// simt.h.
#include "collectives.h"

#include <cstring>
#include <vector>

namespace vicinal::on_host {

namespace {

float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

const float* half_values() {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (uint32_t bits = 0; bits < values.size(); ++bits) {
      __half_raw raw;
      raw.x = static_cast<unsigned short>(bits);
      values[bits] = __half2float(__half(raw));
    }
    return values;
  }();
  return table.data();
}

// Value of the i-th 16-bit element of a fragment.
float element(Op op, const uint32_t* registers, int i) {
  const uint32_t bits = registers[i / 2] >> (16 * (i % 2)) & 0xffff;
  return op == kMmaF16 ? half_values()[bits] : from_bits(bits << 16);
}

struct Tiles {
  float a[16][16], b[16][8];
};

void gather_16_bit(Op op, void* const* args, Tiles& t) {
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mma = static_cast<const MmaArgs*>(args[lane]);
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int i = 0; i < 8; ++i)
      t.a[group + 8 * (i / 2 % 2)][pair + i % 2 + 8 * (i / 4)] = element(op, mma->a, i);
    for (int i = 0; i < 4; ++i) t.b[pair + i % 2 + 8 * (i / 2)][group] = element(op, mma->b, i);
  }
}

void gather_tf32(void* const* args, Tiles& t) {
  constexpr uint32_t kept = 0xffffe000u;
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mma = static_cast<const MmaArgs*>(args[lane]);
    const int group = lane / 4, in_group = lane % 4;
    for (int i = 0; i < 4; ++i)
      t.a[group + 8 * (i % 2)][in_group + 4 * (i / 2)] = from_bits(mma->a[i] & kept);
    for (int i = 0; i < 2; ++i) t.b[in_group + 4 * i][group] = from_bits(mma->b[i] & kept);
  }
}

}  // namespace

const char* name_of(Op op) {
  switch (op) {
    case kSyncWarp:
      return "sync_warp";
    case kShuffle:
      return "shfl";
    case kLdmatrix:
      return "ldmatrix";
    default:
      return "mma";
  }
}

void shuffle_lanes(unsigned lanes, void* const* args) {
  uint64_t values[32];
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes >> lane & 1) values[lane] = static_cast<ShuffleArgs*>(args[lane])->value;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    auto* shuffle = static_cast<ShuffleArgs*>(args[lane]);
    // The value of a lane that has left is undefined on the device: all bits set here.
    shuffle->value = lanes >> shuffle->from_lane & 1 ? values[shuffle->from_lane] : ~uint64_t{0};
  }
}

int distribute_matrices(void* const* args) {
  const auto* first = static_cast<const LdmatrixArgs*>(args[0]);
  uint16_t words[32][8];
  int conflicts = 0;
  for (int matrix = 0; matrix < first->matrices; ++matrix) {
    int rows_in_bank[8] = {}, most = 0;
    for (int row = 0; row < 8; ++row) {
      const auto* load = static_cast<const LdmatrixArgs*>(args[8 * matrix + row]);
      memcpy(words[8 * matrix + row], load->data, 16);
      const int bank = static_cast<int>(reinterpret_cast<uintptr_t>(load->row) / 16 % 8);
      if (++rows_in_bank[bank] > most) most = rows_in_bank[bank];
    }
    conflicts += most - 1;
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto* load = static_cast<const LdmatrixArgs*>(args[lane]);
    const int major = lane / 4, minor = 2 * (lane % 4);
    for (int matrix = 0; matrix < load->matrices; ++matrix) {
      const uint16_t (*m)[8] = words + 8 * matrix;
      const uint32_t low = load->transposed ? m[minor][major] : m[major][minor];
      const uint32_t high = load->transposed ? m[minor + 1][major] : m[major][minor + 1];
      load->out[matrix] = low | high << 16;
    }
  }
  return conflicts;
}

void multiply_tiles(Op op, void* const* args) {
  const int depth = op == kMmaTf32 ? 8 : 16;
  Tiles t;
  op == kMmaTf32 ? gather_tf32(args, t) : gather_16_bit(op, args, t);
  float sums[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < depth; ++k) {
      for (int col = 0; col < 8; ++col) sums[row][col] += t.a[row][k] * t.b[k][col];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* c = static_cast<const MmaArgs*>(args[lane])->c;
    for (int i = 0; i < 4; ++i) c[i] += sums[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
}

}  // namespace vicinal::on_host
