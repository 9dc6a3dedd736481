// Lets megablocks 0.10 compile with CUDA 13: its CCCL 3 dropped the trailing `debug_synchronous` argument of
// cub::DeviceScan, which megablocks still passes. launch/install.sh includes this ahead of every CUDA source with
// NVCC_PREPEND_FLAGS="-include <this file>". On older toolkits it is empty.
#pragma once
#if defined(__CUDACC__)
#include <cuda_runtime.h>
#if CUDART_VERSION >= 13000
// The namespace megablocks itself asks for; cub must be parsed before the macros below rewrite its names.
#define CUB_WRAPPED_NAMESPACE megablocks
#include <cub/cub.cuh>
#define ExclusiveSum(storage, bytes, in, out, n, stream, debug) ExclusiveSum(storage, bytes, in, out, n, stream)
#define InclusiveSum(storage, bytes, in, out, n, stream, debug) InclusiveSum(storage, bytes, in, out, n, stream)
#endif
#endif
