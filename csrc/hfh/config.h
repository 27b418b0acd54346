#pragma once

#if defined(__CUDACC__)
#define HFH_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HFH_HOST_DEVICE inline __attribute__((always_inline))
#endif

// The same headers are compiled once for each instruction set and linked into one library. Each
// copy needs names of its own, or the linker could keep an AVX-512 copy of a function and call it
// on a machine without AVX-512.
#if defined(HFH_CAPABILITY)
#define HFH_NAMESPACE_BEGIN \
  namespace hfh {           \
  inline namespace HFH_CAPABILITY {
#define HFH_NAMESPACE_END \
  }                       \
  }
#else
#define HFH_NAMESPACE_BEGIN namespace hfh {
#define HFH_NAMESPACE_END }
#endif
