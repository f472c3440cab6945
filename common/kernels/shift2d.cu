// The shift operation (Wu et al., CVPR 2018, Sec. 3.1): every channel moves by its own whole-pixel displacement, zero
// outside the image. y[n, c, i, j] = x[n, c, i + dy(c), j + dx(c)],
//   dx(c) = step_x * (c % k - k / 2), dy(c) = step_y * (c / k % k - k / 2) for c < C / (k * k) * (k * k), else 0.
// step_y, step_x: the dilation, negative for the backward pass, clamped to the image's size by the caller.
//
// It moves bytes and computes nothing, so the kernels know element sizes, not types. Each thread owns outputs and gathers
// their sources: no atomics, no shared memory, no barrier. Channel, row and column come from block and thread indices; the
// two divisions by k are done once per thread. Every loop strides by the whole grid, so any grid size is correct.

struct alignas(16) Bytes16 {
  unsigned long long low, high;
};

__device__ inline int displacement_y(int c, int channels, int k, int step) {
  return c < channels / (k * k) * (k * k) ? step * (c / k % k - k / 2) : 0;
}

__device__ inline int displacement_x(int c, int channels, int k, int step) {
  return c < channels / (k * k) * (k * k) ? step * (c % k - k / 2) : 0;
}

// The sizeof(Chunk) bytes that begin `bytes` into the pair (a, b), 0 <= bytes < sizeof(Chunk). Little endian.
template <class Chunk>
__device__ inline Chunk straddle(Chunk a, Chunk b, int bytes) {
  if (bytes == 0) return a;
  return (Chunk)((a >> 8 * bytes) | (b << 8 * ((int)sizeof(Chunk) - bytes)));
}

template <>
__device__ inline Bytes16 straddle(Bytes16 a, Bytes16 b, int bytes) {
  if (bytes < 8) return {straddle(a.low, a.high, bytes), straddle(a.high, b.low, bytes)};
  return {straddle(a.high, b.low, bytes - 8), straddle(b.low, b.high, bytes - 8)};
}

// NCHW. Rows are `chunks` aligned chunks of bytes, as large as their length and address allow, so that a row of any dtype
// moves in 16-byte accesses where it can. An output chunk lies in at most two source chunks, and since rows are whole
// chunks each of these is either in the row or outside: the zero fill needs no mask.
// Block (chunk, row, channel) x grid (channels, rows, batch).
template <class Chunk>
__device__ inline void shift_planes(const Chunk* __restrict__ x, Chunk* __restrict__ y, int batch, int channels, int height,
                                    int chunks, int item, int k, int step_y, int step_x) {
  const int size = (int)sizeof(Chunk);
  for (int c = blockIdx.x * blockDim.z + threadIdx.z; c < channels; c += gridDim.x * blockDim.z) {
    const int dy = displacement_y(c, channels, k, step_y);
    const int dx = displacement_x(c, channels, k, step_x) * item;  // bytes
    const int skip = dx & (size - 1), first = (dx - skip) / size;  // whole chunks, rounded down, and the bytes left over
    for (int n = blockIdx.z; n < batch; n += gridDim.z) {
      const long long plane = ((long long)n * channels + c) * height;
#pragma unroll 4
      for (int i = blockIdx.y * blockDim.y + threadIdx.y; i < height; i += gridDim.y * blockDim.y) {
        const bool row_inside = 0 <= i + dy && i + dy < height;
        const Chunk* source = x + (plane + (row_inside ? i + dy : i)) * chunks;
        Chunk* target = y + (plane + i) * chunks;
        for (int j = threadIdx.x; j < chunks; j += blockDim.x) {
          const int a = j + first, b = a + 1;
          const Chunk left = row_inside && 0 <= a && a < chunks ? source[a] : Chunk{};
          const Chunk right = row_inside && skip != 0 && 0 <= b && b < chunks ? source[b] : Chunk{};
          target[j] = straddle(left, right, skip);
        }
      }
    }
  }
}

// Channels-last. A thread keeps its channel, and so its displacement, and walks over pixels: neighbouring threads read
// neighbouring channels. A block does `rows` rows in a row, so that their k source rows are read from L1 after the first.
// Block (channel, column) x grid (channels, row groups, batch).
template <class Element>
__device__ inline void shift_rows(const Element* __restrict__ x, Element* __restrict__ y, int batch, int channels, int height,
                                  int width, int rows, int k, int step_y, int step_x) {
  for (int c = blockIdx.x * blockDim.x + threadIdx.x; c < channels; c += gridDim.x * blockDim.x) {
    const int dy = displacement_y(c, channels, k, step_y), dx = displacement_x(c, channels, k, step_x);
    const long long move = ((long long)dy * width + dx) * channels;
    for (int n = blockIdx.z; n < batch; n += gridDim.z) {
      for (int group = blockIdx.y; (long long)group * rows < height; group += gridDim.y) {
        const int end = height - group * rows < rows ? height : group * rows + rows;
        for (int i = group * rows; i < end; ++i) {
          const bool row_inside = 0 <= i + dy && i + dy < height;
          const long long row = ((long long)n * height + i) * width;
#pragma unroll 4
          for (int j = threadIdx.y; j < width; j += blockDim.y) {
            const long long at = (row + j) * channels + c;
            y[at] = row_inside && 0 <= j + dx && j + dx < width ? x[at + move] : Element{};
          }
        }
      }
    }
  }
}

#define SHIFT2D_PLANES(name, Chunk)                                                                                       \
  extern "C" __global__ void name(const Chunk* __restrict__ x, Chunk* __restrict__ y, int batch, int channels, int height, \
                                  int chunks, int item, int k, int step_y, int step_x) {                                  \
    shift_planes(x, y, batch, channels, height, chunks, item, k, step_y, step_x);                                         \
  }
#define SHIFT2D_ROWS(name, Element)                                                                                         \
  extern "C" __global__ void name(const Element* __restrict__ x, Element* __restrict__ y, int batch, int channels,         \
                                  int height, int width, int rows, int k, int step_y, int step_x) {                        \
    shift_rows(x, y, batch, channels, height, width, rows, k, step_y, step_x);                                             \
  }

SHIFT2D_PLANES(shift2d_planes_1, unsigned char)
SHIFT2D_PLANES(shift2d_planes_2, unsigned short)
SHIFT2D_PLANES(shift2d_planes_4, unsigned int)
SHIFT2D_PLANES(shift2d_planes_8, unsigned long long)
SHIFT2D_PLANES(shift2d_planes_16, Bytes16)
SHIFT2D_ROWS(shift2d_rows_1, unsigned char)
SHIFT2D_ROWS(shift2d_rows_2, unsigned short)
SHIFT2D_ROWS(shift2d_rows_4, unsigned int)
SHIFT2D_ROWS(shift2d_rows_8, unsigned long long)
