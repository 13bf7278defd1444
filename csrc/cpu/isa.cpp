// Compiled once per instruction set, like every kernel beside it; says what its flags really gave.

namespace vicinal::VICINAL_ISA {

int float_lanes() {
#if defined(__AVX512F__)
  return 16;
#elif defined(__AVX2__)
  return 8;
#else
  return 4;
#endif
}

}  // namespace vicinal::VICINAL_ISA
