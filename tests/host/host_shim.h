// Lets g++ (10 or newer, C++20) compile the .cu files of common/kernels and run their kernels block by block, thread by
// thread. For kernels without barriers and warp intrinsics: each CUDA thread runs to its end before the next begins.
#pragma once
#include <cstddef>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

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

// arguments[i] points at the value of parameter i, as for cuLaunchKernel.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments) {
  gridDim = grid;
  blockDim = block;
  for_each_index(grid, blockIdx, [&] {
    for_each_index(block, threadIdx, [&] { invoke(kernel, arguments, std::index_sequence_for<Parameters...>{}); });
  });
}

template <class... Parameters>
constexpr std::size_t parameter_count(void (*)(Parameters...)) {
  return sizeof...(Parameters);
}
