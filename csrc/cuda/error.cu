// The text of a launch error, for bindings that see no CUDA header.
#include <cuda_runtime.h>

#include "../attend.h"

namespace vicinal::cuda {

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace vicinal::cuda
