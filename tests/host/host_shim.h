// Lets g++ (10 or newer, C++20) compile the .cu files of common/kernels and run their kernels block by block, thread by
// thread. Each CUDA thread runs to its end before the next begins; with BARRIERS defined, for a file that has
// __syncthreads, every thread of a block is a thread of its own instead, and warps can multiply matrices (host_warp.h).
#pragma once
#include <pthread.h>

#include <cstddef>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "host_warp.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

#ifdef BARRIERS
inline pthread_barrier_t block_barrier;
inline void __syncthreads() { pthread_barrier_wait(&block_barrier); }
#endif

template <class Body>
void for_each_index(const dim3& size, dim3& index, Body body) {
  for (index.z = 0; index.z < size.z; ++index.z)
    for (index.y = 0; index.y < size.y; ++index.y)
      for (index.x = 0; index.x < size.x; ++index.x) body();
}

template <class... Parameters, std::size_t... Index>
void invoke(void (*kernel)(Parameters...), void** arguments, std::index_sequence<Index...>) {
  kernel(*static_cast<std::remove_const_t<Parameters>*>(arguments[Index])...);
}

template <class Body>
void run_block(Body body) {
#ifdef BARRIERS
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  std::vector<std::thread> threads;
  std::vector<HostWarp> warps((count + 31) / 32);
  pthread_barrier_init(&block_barrier, nullptr, count);
  for (HostWarp& warp : warps) pthread_barrier_init(&warp.barrier, nullptr, 32);
  for_each_index(blockDim, threadIdx, [&] {
    HostWarp* warp = &warps[threads.size() / 32];
    threads.emplace_back([grid = gridDim, block = blockDim, at = blockIdx, thread = threadIdx, body, warp,
                          lane = (int)threads.size() % 32] {
      gridDim = grid, blockDim = block, blockIdx = at, threadIdx = thread;
      host_warp = warp, host_lane = lane;
      body();
    });
  });
  for (std::thread& thread : threads) thread.join();
  for (HostWarp& warp : warps) pthread_barrier_destroy(&warp.barrier);
  pthread_barrier_destroy(&block_barrier);
#else
  for_each_index(blockDim, threadIdx, body);
#endif
}

// arguments[i] points at the value of parameter i, as for cuLaunchKernel.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments) {
  gridDim = grid;
  blockDim = block;
  for_each_index(grid, blockIdx, [&] {
    run_block([=] { invoke(kernel, arguments, std::index_sequence_for<Parameters...>{}); });
  });
}

template <class... Parameters>
constexpr std::size_t parameter_count(void (*)(Parameters...)) {
  return sizeof...(Parameters);
}
