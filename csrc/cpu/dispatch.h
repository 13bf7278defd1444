// The choice of the instruction set at run time.
#pragma once

namespace vicinal::cpu {

// The instruction sets that were compiled and that this machine runs, best last, separated by spaces.
const char* available_isas();
// The one in use: the environment variable VICINAL_CPU_ISA, or else the best one. Throws std::runtime_error
// when the variable names one that is not available.
const char* isa();
// Throws std::invalid_argument, naming what is available, for any other name; "" goes back to the default.
void set_isa(const char* name);
// Float32 GFLOP/s that `threads` threads reach together on multiply-adds out of registers, for `seconds`.
double fma_probe(double seconds, int threads);

}  // namespace vicinal::cpu
