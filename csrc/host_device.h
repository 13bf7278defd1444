// Functions that the kernels of every backend compile from one text.
#pragma once

#ifdef __CUDACC__
#define VICINAL_HD __host__ __device__ __forceinline__
#else
#define VICINAL_HD inline
#endif
