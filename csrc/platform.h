// One spelling for "compiles for the host and for the device".
#pragma once

#if defined(__CUDACC__)
#define RAT_HD __host__ __device__ __forceinline__
#else
#define RAT_HD inline
#endif
