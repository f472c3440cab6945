// The shift operation (Wu et al., CVPR 2018, Sec. 3.1): every channel moves by its own whole-pixel displacement, zero
// outside the image. y[n, c, i, j] = x[n, c, i + dy(c), j + dx(c)],
//   dx(c) = step_x * (c % k - k / 2), dy(c) = step_y * (c / k % k - k / 2) for c < C / (k * k) * (k * k), else 0.
// step_y, step_x: the dilation, negative for the backward pass, clamped to the image's size by the caller.
//
// It moves bytes and computes nothing, so the kernels know element sizes, not types. Each thread owns outputs and gathers
// their sources: no atomics, no shared memory, no barrier. Channel, row and column come from block and thread indices; the
// divisions are done once per thread. Every loop strides by the whole grid, so any grid size is correct.

constexpr int BATCH = 4;  // rows

struct alignas(16) Bytes16 {
  unsigned long long low, high;
};

__device__ inline int displacement_y(int c, int channels, int k, int step) {
  return c < channels / (k * k) * (k * k) ? step * (c / k % k - k / 2) : 0;
}

__device__ inline int displacement_x(int c, int channels, int k, int step) {
  return c < channels / (k * k) * (k * k) ? step * (c % k - k / 2) : 0;
}

// The sizeof(Chunk) bytes that begin `bytes` into the pair (a, b), 0 <= bytes < sizeof(Chunk). Little endian, no branch.
template <class Chunk>
__device__ inline Chunk straddle(Chunk a, Chunk b, int bytes) {
  const unsigned long long pair = a | (unsigned long long)b << 8 * (int)sizeof(Chunk);
  return (Chunk)(pair >> 8 * bytes);
}

template <>
__device__ inline unsigned long long straddle(unsigned long long a, unsigned long long b, int bytes) {
  return (a >> 8 * bytes) | (b << 1 << (63 - 8 * bytes));
}

template <>
__device__ inline Bytes16 straddle(Bytes16 a, Bytes16 b, int bytes) {
  const bool upper = bytes >= 8;
  const unsigned long long first = upper ? a.high : a.low, middle = upper ? b.low : a.high, last = upper ? b.high : b.low;
  return {straddle(first, middle, bytes & 7), straddle(middle, last, bytes & 7)};
}

// NCHW. Rows are `chunks` aligned chunks of bytes, as large as their length and address allow, so that a row of any dtype
// moves in 16-byte accesses where it can. An output chunk lies in at most two source chunks, and since rows are whole
// chunks each of these is either in the row or outside: the zero fill needs no mask. Loads are unconditional, from some
// chunk inside, so that those of BATCH rows are in flight together.
// Block (chunk, row, channel) x grid (channels, rows, batch).
template <class Chunk>
__device__ inline void shift_planes(const Chunk* __restrict__ x, Chunk* __restrict__ y, int batch, int channels, int height,
                                    int chunks, int item, int k, int step_y, int step_x) {
  const int size = (int)sizeof(Chunk), apart = gridDim.y * blockDim.y;
  for (int c = blockIdx.x * blockDim.z + threadIdx.z; c < channels; c += gridDim.x * blockDim.z) {
    const int dy = displacement_y(c, channels, k, step_y);
    const int dx = displacement_x(c, channels, k, step_x) * item;  // bytes
    const int skip = dx & (size - 1), first = (dx - skip) / size;  // whole chunks, rounded down, and the bytes left over
    for (int n = blockIdx.z; n < batch; n += gridDim.z) {
      const long long plane = ((long long)n * channels + c) * height;
      for (int j = threadIdx.x; j < chunks; j += blockDim.x) {
        const int a = j + first, b = a + 1;
        const bool has_a = 0 <= a && a < chunks, has_b = 0 <= b && b < chunks;
        const int at_a = has_a ? a : j, at_b = has_b && skip != 0 ? b : at_a;
        for (int top = blockIdx.y * blockDim.y + threadIdx.y; top < height; top += BATCH * apart) {
          Chunk left[BATCH], right[BATCH];
#pragma unroll
          for (int r = 0; r < BATCH; ++r) {
            const int i = top + r * apart + dy;
            const Chunk* source = x + (plane + (0 <= i && i < height ? i : top)) * chunks;
            left[r] = source[at_a], right[r] = source[at_b];
          }
#pragma unroll
          for (int r = 0; r < BATCH; ++r) {
            const int i = top + r * apart;
            const bool row_inside = 0 <= i + dy && i + dy < height;
            const Chunk first_part = row_inside && has_a ? left[r] : Chunk{};
            const Chunk rest = row_inside && has_b ? right[r] : Chunk{};
            if (i < height) y[(plane + i) * chunks + j] = straddle(first_part, rest, skip);
          }
        }
      }
    }
  }
}

// Channels-last, any k and any number of channels. A thread keeps its channel, and so its displacement, and walks over
// pixels: neighbouring threads read neighbouring channels. A block does `rows` rows in a row, so that their k source rows
// are read from L1 after the first.
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

struct alignas(16) Words {
  unsigned word[4];
};

// Which bytes of one 16-byte run of channels come from the row above (0), the same (1) or the row below (2), and from the
// column to the left, the same or to the right.
struct Masks {
  Words from[3][3];
};

// The 16 bytes of elements of `item` bytes that begin at channel c, in a column that has one to its left and right or not.
template <int item>
__device__ inline Masks make_masks(int c, int channels, int step_y, int step_x, bool has_left, bool has_right) {
  Masks masks{};
#pragma unroll
  for (int i = 0; i < 16; i += item < 4 ? item : 4) {
    const int channel = c + i / item;
    const int dy = displacement_y(channel, channels, 3, step_y), dx = displacement_x(channel, channels, 3, step_x);
    const int row = dy < 0 ? 0 : dy > 0 ? 2 : 1, column = dx < 0 ? 0 : dx > 0 ? 2 : 1;
    const bool inside = column == 0 ? has_left : column == 1 || has_right;
    const unsigned element = item == 1 ? 0xffu : item == 2 ? 0xffffu : 0xffffffffu, bits = inside ? element << i % 4 * 8 : 0;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap)  // no index that depends on data: the masks stay in registers
      masks.from[tap / 3][tap % 3].word[i / 4] |= tap == row * 3 + column ? bits : 0;
  }
  return masks;
}

// The runs of channels in row i, left, here and right; zero in a row outside. Loads are unconditional, from the nearest
// row inside, and so are those of columns outside, which the masks leave out.
struct Row {
  Words column[3];
};

__device__ inline Row load_row(const Words* __restrict__ x, int i, int height, long long pitch, int left, int right) {
  const bool inside = 0 <= i && i < height;
  const Words* source = x + (inside ? i : i < 0 ? 0 : height - 1) * pitch;
  Row row = {source[left], source[0], source[right]};
#pragma unroll
  for (int column = 0; column < 3; ++column)
#pragma unroll
    for (int i = 0; i < 4; ++i) row.column[column].word[i] = inside ? row.column[column].word[i] : 0;
  return row;
}

__device__ inline Words pick(Words sum, const Row& source, const Words (&mask)[3]) {
#pragma unroll
  for (int column = 0; column < 3; ++column)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.word[i] |= source.column[column].word[i] & mask[column].word[i];
  return sum;
}

// Channels-last, k = 3, pixels of `chunks` aligned runs of 16 bytes. A thread keeps its run of channels and its column and
// walks down `rows` rows that are `step` apart. Each source row is loaded once, in its three columns, and contributes to
// three outputs, selected by masks: 3 loads of 16 bytes per output, 2 of which neighbouring threads share in L1.
// Block (run and column together) x grid (runs and columns, groups of rows, batch). Group g: segment g / step of the rows
// congruent to g % step.
template <int item>
__device__ inline void shift_runs(const Words* __restrict__ x, Words* __restrict__ y, int batch, int channels, int height,
                                  int width, int chunks, int rows, int step_y, int step_x) {
  const int step = step_y < 0 ? -step_y : step_y, side = step_x < 0 ? -step_x : step_x;
  const int groups = ((height + step - 1) / step + rows - 1) / rows * step;
  const long long pitch = (long long)width * chunks;
  for (int at = blockIdx.x * blockDim.x + threadIdx.x; at < width * chunks; at += gridDim.x * blockDim.x) {
    const int column = at / chunks;
    const bool has_left = column >= side, has_right = column + side < width;
    const int left = has_left ? -side * chunks : 0, right = has_right ? side * chunks : 0;
    const Masks masks = make_masks<item>(at % chunks * (16 / item), channels, step_y, step_x, has_left, has_right);
    for (int group = blockIdx.y; group < groups; group += gridDim.y) {
      const int first = group % step + group / step * rows * step;
      const int rest = first < height ? (height - first + step - 1) / step : 0, count = rest < rows ? rest : rows;
      for (int n = blockIdx.z; n < batch; n += gridDim.z) {
        const long long image = n * height * pitch + at;
        // What the next output row has from the row above it; what this one has from above and from itself.
        Words next = pick(Words{}, load_row(x + image, first - step, height, pitch, left, right), masks.from[0]);
        Row row[BATCH] = {load_row(x + image, first, height, pitch, left, right)};
        Words here = pick(next, row[0], masks.from[1]);
        next = pick(Words{}, row[0], masks.from[0]);
        for (int m = 0; m < count; m += BATCH) {
#pragma unroll
          for (int r = 0; r < BATCH; ++r)
            row[r] = load_row(x + image, first + (m + r + 1) * step, height, pitch, left, right);
#pragma unroll
          for (int r = 0; r < BATCH; ++r) {
            const Words moved = pick(here, row[r], masks.from[2]);
            if (m + r < count) y[image + (first + (m + r) * step) * pitch] = moved;
            here = pick(next, row[r], masks.from[1]);
            next = pick(Words{}, row[r], masks.from[0]);
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
#define SHIFT2D_RUNS(name, item)                                                                                           \
  extern "C" __global__ void __launch_bounds__(256, 2) name(const Words* __restrict__ x, Words* __restrict__ y, int batch, \
                                                            int channels, int height, int width, int chunks, int rows,     \
                                                            int step_y, int step_x) {                                      \
    shift_runs<item>(x, y, batch, channels, height, width, chunks, rows, step_y, step_x);                                  \
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
SHIFT2D_RUNS(shift2d_runs_1, 1)
SHIFT2D_RUNS(shift2d_runs_2, 2)
SHIFT2D_RUNS(shift2d_runs_4, 4)
SHIFT2D_RUNS(shift2d_runs_8, 8)
