// A shift and the 1x1 convolution that follows it (Wu et al., CVPR 2018), forward only:
//   y[n, o, i, j] = bias[o] + sum over c of weight[o, c] * x[n, c, i * stride + dy(c), j * stride + dx(c)],
// zero outside the image, dy and dx as in shift2d.cu. x and y NCHW ("planes") or channels-last ("rows"), bf16 and fp16 on
// tensor cores, fp32 on tensor cores after rounding to TF32 ("tf32"), or as it is on the others ("fp32"); fp32 sums.
//
// A block of 256 threads makes 256 output pixels x 16 * tiles outputs, from 64 bytes of channels at a time: stage x and
// weights in shared memory, barrier, multiply, barrier. The shift costs additions to addresses only:
//   rows: x is staged as it lies, with the pixels around the tile; a read adds its channel's offset. The loads of the next
//     channels are under way during the products of these.
//   planes: neighbouring threads stage neighbouring pixels, each channel from where its shift puts it.
// A warp has 32 pixels. Its reads for tensor cores meet 32 different banks, whatever the shifts, where the stride is 1 and 8
// neighbouring pixels are in one row.

constexpr int PIXELS = 256;  // of a block, and its threads
constexpr int RUNS = 4;      // 16-byte runs of channels staged at a time
constexpr int PITCH = 20;    // words from one staged pixel of rows, or output of weights, to the next: 16 and 4 unused
constexpr int SLOTS = 400;   // staged pixels of rows, at most
constexpr int PLANE = 264;   // elements from one staged channel of planes to the next: 256 and 8 unused
constexpr int LOADS = (SLOTS * RUNS + PIXELS - 1) / PIXELS;  // of a thread, per stage of rows
struct alignas(16) Words {
  unsigned word[4];
};
struct Sizes {
  int batch, channels, height, width, outputs, out_height, out_width, stride, k, step_y, step_x;
  int tile_images, tile_rows, tile_columns;  // rows: of output; their product is at most PIXELS
};

// What the hardware does in one instruction; tests/host has the same functions for the host.
#ifdef __CUDACC__
#define CONVERT(name, from, to, instruction, in, out)    \
  __device__ inline to name(from value) {                \
    to result;                                           \
    asm(instruction " %0, %1;" : out(result) : in(value)); \
    return result;                                         \
  }
CONVERT(f16_of_float, float, unsigned short, "cvt.rn.f16.f32", "f", "=h")
CONVERT(float_of_f16, unsigned short, float, "cvt.f32.f16", "h", "=f")
// sum (16 outputs x 8 pixels) += a (16 outputs x channels) * b (channels x 8 pixels), called by all 32 lanes together. Lane
// 4 * g + q has of a: words q of rows g and g + 8, then words q + 4 of both; of b: words q and q + 4 of pixel g; of sum:
// (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1). 16 channels are 8 words of two; of TF32, 8 channels are 8 words.
#if __CUDA_ARCH__ >= 800
#define MMA(name, shape, type)                                                                                            \
  __device__ inline void name(float(&sum)[4], const unsigned(&a)[4], const unsigned(&b)[2]) {                             \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "   \
                 "{%0,%1,%2,%3};"                                                                                         \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                     \
  }
MMA(mma_bf16, "m16n8k16", "bf16")
MMA(mma_f16, "m16n8k16", "f16")
MMA(mma_tf32, "m16n8k8", "tf32")
#endif
#endif

// The types: their elements, from and to fp32, as a factor of a product, and 32 bits of a factor that is gathered from
// shared memory: channels 2 * at and 2 * at + 1 of 16 bits, or channel `at` of 32.
struct Fp32 {
  typedef unsigned Element;
  static __device__ float widened(unsigned value) { return __uint_as_float(value); }
  static __device__ unsigned rounded(float value) { return __float_as_uint(value); }
};
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
struct Pairs {
  typedef unsigned short Element;
  static __device__ unsigned factor(unsigned word) { return word; }
  static __device__ unsigned gather(const Element* x, const int* offset, int at) {
    return x[offset[2 * at]] | (unsigned)x[offset[2 * at + 1]] << 16;
  }
};
struct Bf16 : Pairs {
  static __device__ float widened(unsigned short value) { return __uint_as_float((unsigned)value << 16); }
  static __device__ unsigned short rounded(float value) {  // to nearest, ties to even
    const unsigned bits = __float_as_uint(value);
    return value != value ? 0x7fff : (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  static __device__ void multiply(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma_bf16(sum, a, b); }
};
struct Fp16 : Pairs {
  static __device__ float widened(unsigned short value) { return float_of_f16(value); }
  static __device__ unsigned short rounded(float value) { return f16_of_float(value); }
  static __device__ void multiply(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma_f16(sum, a, b); }
};
struct Tf32 : Fp32 {
  static __device__ unsigned factor(unsigned bits) {  // 10 bits of mantissa, ties away from zero
    return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & ~0x1fffu;
  }
  static __device__ unsigned gather(const Element* from, const int* offset, int at) { return factor(from[offset[at]]); }
  static __device__ void multiply(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma_tf32(sum, a, b); }
};
#endif

// Where a channel's outputs come from: displacement, the same in elements of x (planes), and whether there is such a channel.
struct alignas(16) Shift {
  int dy, dx, move, exists;
};

// What a block keeps in shared memory: the staged channels of x and weights, and tables that spare divisions.
template <class Type, bool rows, int tiles>
struct Shared {
  static constexpr int channels = 64 / (int)sizeof(typename Type::Element);
  Words x[rows ? SLOTS * PITCH / 4 : PLANE * RUNS];
  Words weight[16 * tiles * PITCH / 4];
  long long out[PIXELS];         // index in y of a pixel's output 0, or -1
  int base[PIXELS];              // where a pixel's reads begin in x above
  int source[rows ? SLOTS : 1];  // index in x of a staged pixel, or -1 outside of the image
  Shift shift[channels];         // of the staged channels
  int offset[channels];          // what their reads above add to base
  float bias[16 * tiles];
};

// Fill the tables of pixels. Returns where this thread's pixel begins in x (planes), -1 if it has none.
template <class Type, bool tiles_of_rows, int tiles>
__device__ inline long long find_pixels(Shared<Type, tiles_of_rows, tiles>& shared, const Sizes& s, int& i, int& j) {
  const int p = threadIdx.x, rows = s.tile_rows, columns = s.tile_columns;
  int n;
  bool exists;
  if constexpr (tiles_of_rows) {
    const int half = s.k / 2, high = s.step_y * half, wide = s.step_x * half;
    const int slot_rows = (rows - 1) * s.stride + 1 + 2 * high, slot_columns = (columns - 1) * s.stride + 1 + 2 * wide;
    const int down = (s.out_height + rows - 1) / rows, across = (s.out_width + columns - 1) / columns;
    const int first_n = blockIdx.x / (down * across) * s.tile_images;
    const int first_i = blockIdx.x / across % down * rows, first_j = blockIdx.x % across * columns;
    const int image = p / (rows * columns), row = p / columns % rows, column = p % columns;
    n = first_n + image, i = first_i + row, j = first_j + column;
    exists = image < s.tile_images && n < s.batch && i < s.out_height && j < s.out_width;
    const int slot = (image * slot_rows + row * s.stride + high) * slot_columns + column * s.stride + wide;
    shared.base[p] = (exists ? slot : high * slot_columns + wide) * (PITCH * 4 / (int)sizeof(typename Type::Element));
    for (int at = p; at < SLOTS; at += PIXELS) {
      const int source_n = first_n + at / (slot_rows * slot_columns);
      const int source_i = first_i * s.stride - high + at / slot_columns % slot_rows;
      const int source_j = first_j * s.stride - wide + at % slot_columns;
      const bool inside = at < s.tile_images * slot_rows * slot_columns && source_n < s.batch && 0 <= source_i &&
                          source_i < s.height && 0 <= source_j && source_j < s.width;
      shared.source[at] = inside ? (source_n * s.height + source_i) * s.width + source_j : -1;
    }
  } else {
    const long long pixel = (long long)blockIdx.x * PIXELS + p;
    exists = pixel < (long long)s.batch * s.out_height * s.out_width;
    const int at = exists ? (int)pixel : 0;
    n = at / (s.out_height * s.out_width), i = at / s.out_width % s.out_height, j = at % s.out_width;
    shared.base[p] = p;
  }
  const long long position = (long long)i * s.out_width + j, image = (long long)s.out_height * s.out_width;
  shared.out[p] = !exists ? -1 : (n * image + (tiles_of_rows ? position : 0)) * s.outputs + (tiles_of_rows ? 0 : position);
  return exists ? ((long long)n * s.channels * s.height + i * s.stride) * s.width + j * s.stride : -1;
}

// The displacements of the channels from `first` on.
template <class Type, bool rows, int tiles>
__device__ inline void find_channels(Shared<Type, rows, tiles>& shared, const Sizes& s, int first) {
  const int local = threadIdx.x, c = first + local;
  if (local >= shared.channels) return;
  const bool moves = c < s.channels / (s.k * s.k) * (s.k * s.k);
  const int dy = moves ? s.step_y * (c / s.k % s.k - s.k / 2) : 0, dx = moves ? s.step_x * (c % s.k - s.k / 2) : 0;
  const int slot_columns = (s.tile_columns - 1) * s.stride + 1 + s.k / 2 * s.step_x * 2;
  const long long distance = ((long long)local * s.height + dy) * s.width + dx;
  shared.shift[local] = {dy, dx, (int)distance, c < s.channels};
  shared.offset[local] =
      rows ? (dy * slot_columns + dx) * (PITCH * 4 / (int)sizeof(typename Type::Element)) + local : local * PLANE;
}

// Rows: this thread's runs of x, from channel `first` on, into registers. Loads are unconditional, so that all are in flight.
template <class Type, int tiles>
__device__ inline void load_rows(Words (&held)[LOADS], const Shared<Type, true, tiles>& shared, const Words* __restrict__ x,
                                 int channels, int first) {
  const int run_channels = 16 / (int)sizeof(typename Type::Element), runs = channels / run_channels;
#pragma unroll
  for (int u = 0; u < LOADS; ++u) {
    const int at = threadIdx.x + u * PIXELS, slot = at / RUNS, run = first / run_channels + at % RUNS;
    const int source = slot < SLOTS ? shared.source[slot] : -1;
    const bool inside = source >= 0 && run < runs;
    const Words loaded = x[inside ? (long long)source * runs + run : 0];
    held[u] = inside ? loaded : Words{};
  }
}

template <class Type, int tiles>
__device__ inline void store_rows(Shared<Type, true, tiles>& shared, const Words (&held)[LOADS]) {
#pragma unroll
  for (int u = 0; u < LOADS; ++u) {
    const int at = threadIdx.x + u * PIXELS;
    if (at < SLOTS * RUNS) shared.x[at / RUNS * (PITCH / 4) + at % RUNS] = held[u];
  }
}

// Planes: this thread's pixel in every staged channel, read from where the shift puts it, 8 loads in flight. pixel: where it
// begins in x, or -1; i, j: its row and column there.
template <class Type, int tiles>
__device__ inline void stage_planes(Shared<Type, false, tiles>& shared, const typename Type::Element* __restrict__ x,
                                    const Sizes& s, long long pixel, int i, int j, int first) {
  typedef typename Type::Element Element;
  Element* target = reinterpret_cast<Element*>(shared.x) + threadIdx.x;
  const Element* from = x + (pixel < 0 ? 0 : pixel) + (long long)first * s.height * s.width;
  for (int local = 0; local < shared.channels; local += 8) {
    Element loaded[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const Shift shift = shared.shift[local + c];
      const bool inside = (pixel >= 0) & (shift.exists != 0) & ((unsigned)(i + shift.dy) < (unsigned)s.height) &
                          ((unsigned)(j + shift.dx) < (unsigned)s.width);
      const Element value = from[inside ? shift.move : 0];
      loaded[c] = inside ? value : Element{};
    }
#pragma unroll
    for (int c = 0; c < 8; ++c) target[(local + c) * PLANE] = loaded[c];
  }
}

// One run of weights per thread.
template <class Type, bool rows, int tiles>
__device__ inline void stage_weights(Shared<Type, rows, tiles>& shared, const Words* __restrict__ weight, const Sizes& s,
                                     int first) {
  const int run_channels = 16 / (int)sizeof(typename Type::Element), runs = s.channels / run_channels;
  const int local = threadIdx.x / RUNS, output = blockIdx.y * 16 * tiles + local;
  const int run = first / run_channels + threadIdx.x % RUNS;
  if (local < 16 * tiles)
    shared.weight[local * (PITCH / 4) + threadIdx.x % RUNS] =
        output < s.outputs && run < runs ? weight[(long long)output * runs + run] : Words{};
}

// The products of the staged channels: tensor cores. sum[4 * pixel group + tile] are 16 outputs x 8 pixels.
template <class Type, bool rows, int tiles>
struct Product {
  float sum[4 * tiles][4];

  __device__ void add(const Shared<Type, rows, tiles>& shared, int left) {
    const int lane = threadIdx.x % 32, group = lane / 4, q = lane % 4, warp = threadIdx.x / 32;
    const unsigned* weight = shared.weight[0].word;
    const typename Type::Element* x = reinterpret_cast<const typename Type::Element*>(shared.x);
#pragma unroll
    for (int part = 0; part < 16; part += 8) {  // words of channels
      if (part * shared.channels >= left * 16) return;  // the same for all threads
      unsigned a[tiles][4];
#pragma unroll
      for (int tile = 0; tile < tiles; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[tile][i] = Type::factor(weight[(tile * 16 + group + i % 2 * 8) * PITCH + part + q + i / 2 * 4]);
#pragma unroll
      for (int eight = 0; eight < 4; ++eight) {
        const auto* from = x + shared.base[warp * 32 + eight * 8 + group];
        const unsigned b[2] = {Type::gather(from, shared.offset, part + q), Type::gather(from, shared.offset, part + q + 4)};
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile) Type::multiply(sum[eight * tiles + tile], a[tile], b);
      }
    }
  }

  // Call put(pixel of the block, output of the block, sum) for each sum of this thread.
  template <class Put>
  __device__ void for_each(Put put) const {
    const int lane = threadIdx.x % 32, group = lane / 4, q = lane % 4, warp = threadIdx.x / 32;
#pragma unroll
    for (int at = 0; at < 4 * tiles; ++at)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        put(warp * 32 + at / tiles * 8 + 2 * q + i % 2, at % tiles * 16 + group + i / 2 * 8, sum[at][i]);
  }
};

// Without tensor cores: a thread has one pixel, and reads four channels of an output's weights at a time.
template <bool rows, int tiles>
struct Product<Fp32, rows, tiles> {
  float sum[16 * tiles];

  __device__ void add(const Shared<Fp32, rows, tiles>& shared, int) {
    const unsigned* from = shared.x[0].word + shared.base[threadIdx.x];
#pragma unroll 1
    for (int c = 0; c < shared.channels; c += 4) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(from[shared.offset[c + i]]);
#pragma unroll
      for (int output = 0; output < 16 * tiles; ++output) {
        const Words weight = shared.weight[output * (PITCH / 4) + c / 4];
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[output] += __uint_as_float(weight.word[i]) * x[i];
      }
    }
  }

  template <class Put>
  __device__ void for_each(Put put) const {
#pragma unroll
    for (int output = 0; output < 16 * tiles; ++output) put((int)threadIdx.x, output, sum[output]);
  }
};

template <class Type, bool rows, int tiles>
__device__ inline void shift_conv1x1(const void* __restrict__ x, const Words* __restrict__ weight,
                                     const typename Type::Element* __restrict__ bias, typename Type::Element* __restrict__ y,
                                     int has_bias, const Sizes& s) {
  __shared__ Shared<Type, rows, tiles> shared;
  Product<Type, rows, tiles> product{};
  [[maybe_unused]] Words held[rows ? LOADS : 1];
  int i, j;
  [[maybe_unused]] const long long pixel = find_pixels(shared, s, i, j);
  const int first_output = blockIdx.y * 16 * tiles, own = first_output + threadIdx.x;
  if (threadIdx.x < 16 * tiles) shared.bias[threadIdx.x] = has_bias && own < s.outputs ? Type::widened(bias[own]) : 0.0f;
  __syncthreads();
  if constexpr (rows) load_rows(held, shared, static_cast<const Words*>(x), s.channels, 0);
  for (int first = 0; first < s.channels; first += shared.channels) {
    find_channels(shared, s, first);
    stage_weights(shared, weight, s, first);
    if constexpr (rows) {
      store_rows(shared, held);
    } else {
      __syncthreads();  // the displacements
      stage_planes(shared, static_cast<const typename Type::Element*>(x), s, pixel, i * s.stride, j * s.stride, first);
    }
    __syncthreads();
    if constexpr (rows)  // after the last channels, of none: one address
      load_rows(held, shared, static_cast<const Words*>(x), s.channels, first + shared.channels);
    product.add(shared, s.channels - first);
    __syncthreads();
  }
  const long long step = rows ? 1 : (long long)s.out_height * s.out_width;
  product.for_each([&](int at, int local, float sum) {
    const int output = first_output + local;
    if (shared.out[at] >= 0 && output < s.outputs) y[shared.out[at] + output * step] = Type::rounded(sum + shared.bias[local]);
  });
}

// Grid (pixels / 256 or tiles, outputs / (16 * tiles)), block 256. weight, and x of rows, begin at multiples of 16 bytes;
// channels are a multiple of 16 bytes.
#define SHIFT_CONV1X1(name, Type, rows, tiles, blocks)                                                                   \
  extern "C" __global__ void __launch_bounds__(256, blocks) name(                                                        \
      const void* __restrict__ x, const Words* __restrict__ weight, const Type::Element* __restrict__ bias,              \
      Type::Element* __restrict__ y, int has_bias, int batch, int channels, int height, int width, int outputs,          \
      int out_height, int out_width, int stride, int k, int step_y, int step_x, int tile_images, int tile_rows,          \
      int tile_columns) {                                                                                                \
    const Sizes sizes = {batch, channels, height, width, outputs, out_height, out_width, stride, k, step_y, step_x,      \
                         tile_images, tile_rows, tile_columns};                                                          \
    shift_conv1x1<Type, rows, tiles>(x, weight, bias, y, has_bias, sizes);                                               \
  }
// small, medium, large: blocks of a multiprocessor that registers must suffice for.
#define SHIFT_CONV1X1_OF_TYPE(name, Type, small, medium, large)            \
  SHIFT_CONV1X1(shift_conv1x1_##name##_planes_16, Type, false, 1, small)   \
  SHIFT_CONV1X1(shift_conv1x1_##name##_planes_32, Type, false, 2, medium)  \
  SHIFT_CONV1X1(shift_conv1x1_##name##_planes_64, Type, false, 4, 2)       \
  SHIFT_CONV1X1(shift_conv1x1_##name##_rows_16, Type, true, 1, small)      \
  SHIFT_CONV1X1(shift_conv1x1_##name##_rows_32, Type, true, 2, medium)     \
  SHIFT_CONV1X1(shift_conv1x1_##name##_rows_64, Type, true, 4, large)

SHIFT_CONV1X1_OF_TYPE(fp32, Fp32, 2, 1, 1)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
SHIFT_CONV1X1_OF_TYPE(bf16, Bf16, 3, 2, 1)
SHIFT_CONV1X1_OF_TYPE(fp16, Fp16, 3, 2, 1)
SHIFT_CONV1X1_OF_TYPE(tf32, Tf32, 3, 2, 1)
#endif
