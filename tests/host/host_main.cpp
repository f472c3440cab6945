// Runs kernels of one .cu file on the host. KERNEL_SOURCE: the file; KERNELS: its kernels as KERNEL(name) KERNEL(name) ...
// Standard input, repeated:   name gx gy gz bx by bz count, then per argument   s BYTES\n<bytes>   for a scalar or
//                             b BYTES OFFSET\n<bytes>   for a buffer, placed OFFSET bytes behind a 16-byte boundary.
// Standard output, per launch: the bytes of its buffers afterwards, in order. Built with the address and undefined-behaviour
// sanitizers: buffers are separate heap blocks of exactly their size, so any access outside of one ends the program.
#include "host_shim.h"

#include KERNEL_SOURCE

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

static void run(const std::string& name, dim3 grid, dim3 block, std::vector<void*>& arguments) {
#define KERNEL(function)                                                                \
  if (name == #function) {                                                              \
    if (arguments.size() != parameter_count(function)) std::exit(3);                    \
    return launch(function, grid, block, arguments.data());                             \
  }
  KERNELS
  std::fprintf(stderr, "no kernel %s\n", name.c_str());
  std::exit(3);
}

static char* read_bytes(std::size_t size, std::size_t offset) {
  char* block = static_cast<char*>(std::malloc(size + offset));
  if (std::fread(block + offset, 1, size, stdin) != size) std::exit(4);
  return block;
}

int main() {
  char name[256];
  dim3 grid, block;
  int count;
  while (std::scanf("%255s %u %u %u %u %u %u %d", name, &grid.x, &grid.y, &grid.z, &block.x, &block.y, &block.z, &count) == 8) {
    std::vector<char*> blocks(count), pointers(count);
    std::vector<std::size_t> sizes(count);
    std::vector<void*> arguments(count);
    for (int i = 0; i < count; ++i) {
      char kind;
      std::size_t offset = 0;
      if (std::scanf(" %c %zu", &kind, &sizes[i]) != 2 || (kind == 'b' && std::scanf("%zu", &offset) != 1)) return 4;
      std::getchar();  // the newline before the bytes
      blocks[i] = read_bytes(sizes[i], offset);
      pointers[i] = blocks[i] + offset;
      arguments[i] = kind == 'b' ? static_cast<void*>(&pointers[i]) : blocks[i];
      if (kind == 's') sizes[i] = 0;
    }
    run(name, grid, block, arguments);
    for (int i = 0; i < count; ++i) {
      if (sizes[i]) std::fwrite(pointers[i], 1, sizes[i], stdout);
      std::free(blocks[i]);
    }
  }
  return std::fflush(stdout);
}
