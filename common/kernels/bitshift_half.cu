// Packed power-of-two weights with activations of 16 bits, bfloat16 or float16 (compute capability 8.0 or newer). The
// packed form is that of bitshift_pack.py, as in bitshift.cu. Linear layers for few rows of x: codes become 16-bit floats
// in registers, exactly, and tensor cores multiply and add in float32. For many rows, and for convolutions: all codes
// become 16-bit floats in memory, for the library's product.
//
// Decoding. A word of a plane has four bytes, one row (output) each; in a plane of 4-bit fields a byte has the inputs
// 2 * pair and 2 * pair + 1 of that row. __byte_perm puts one byte of two words into both bytes of both halves of a
// register, so that signs and magnitudes of two weights move to the places of a 16-bit float's sign and exponent by a shift
// and an AND each. The magnitude m as exponent is the value times a constant, zero included; multiplying by `scale` (a
// power of two, in both halves) makes it the weight. Codes without a zero have `offset` added to their exponent.

typedef unsigned int Word;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// What the hardware does in one instruction; tests/host has the same functions for the host. mma: sum += a * b, 16 x 16
// times 16 x 8. Thread 4 * g + t has of a: rows g, g + 8, g, g + 8, columns 2t and 2t + 1, in the last two plus 8; of b:
// rows 2t and 2t + 1, then plus 8, of column g; of sum: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
#ifdef __CUDACC__
#define INSTRUCTION(Result, name, parameters, ...) \
  __device__ inline Result name parameters {       \
    Result result;                                 \
    asm(__VA_ARGS__);                              \
    return result;                                 \
  }
INSTRUCTION(Word, fma_bf16x2, (Word a, Word b, Word c), "fma.rn.bf16x2 %0, %1, %2, %3;"
            : "=r"(result) : "r"(a), "r"(b), "r"(c))
INSTRUCTION(Word, fma_f16x2, (Word a, Word b, Word c), "fma.rn.f16x2 %0, %1, %2, %3;"
            : "=r"(result) : "r"(a), "r"(b), "r"(c))
INSTRUCTION(unsigned short, bf16_of_float, (float value), "cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value))
INSTRUCTION(unsigned short, f16_of_float, (float value), "cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value))
INSTRUCTION(float, float_of_bf16, (unsigned short value), "mov.b32 %0, %1;" : "=f"(result) : "r"((Word)value << 16))
INSTRUCTION(float, float_of_f16, (unsigned short value), "cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value))

#define MMA(name, type)                                                                            \
  __device__ inline void name(float (&sum)[4], const Word (&a)[4], const Word (&b)[2]) {           \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                            \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                      \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));              \
  }
MMA(mma_bf16, "bf16")
MMA(mma_f16, "f16")
#endif

constexpr Word both = 0x00010001, minus_zero = 0x8000 * both;

struct BFloat16 {
  static constexpr int mantissa = 7;
  static __device__ Word moved(Word exponent, Word offset) { return exponent | offset; }  // an offset beyond its bits
  static __device__ Word scaled(Word pair, Word scale) { return fma_bf16x2(pair, scale, minus_zero); }
  static __device__ unsigned short rounded(float value) { return bf16_of_float(value); }
  static __device__ void multiply(float (&sum)[4], const Word (&a)[4], const Word (&b)[2]) { mma_bf16(sum, a, b); }
  static __device__ float widened(unsigned short value) { return float_of_bf16(value); }
};

struct Float16 {
  static constexpr int mantissa = 10;
  static __device__ Word moved(Word exponent, Word offset) { return exponent + offset; }  // no room for that here
  static __device__ Word scaled(Word pair, Word scale) { return fma_f16x2(pair, scale, minus_zero); }
  static __device__ unsigned short rounded(float value) { return f16_of_float(value); }
  static __device__ void multiply(float (&sum)[4], const Word (&a)[4], const Word (&b)[2]) { mma_f16(sum, a, b); }
  static __device__ float widened(unsigned short value) { return float_of_f16(value); }
};

// Read and written in one access of 4 * count bytes.
template <int count>
struct alignas(4 * count) Words {
  Word at[count];
};

template <int count>
__device__ inline Words<count> read(const Word* words) { return *reinterpret_cast<const Words<count>*>(words); }

__device__ inline int row_of_byte(int byte) { return byte / 8 % 2 * 16 + byte % 2 * 8 + byte / 16 * 4 + byte % 8 / 2; }

// Words `first` and following of one block, for the inputs 2 * pair and 2 * pair + 1: as stored, then aligned: of every
// byte, low bits of the first input at bit 0, of the other at bit `width`; sign and fifth bit, where they have planes of
// their own, at bits 7 - `width` and 7.
template <int bits, int words>
struct Codes {
  static constexpr int width = bits >= 4 ? 4 : 2, pairs = 4 / width;  // in a byte
  Words<words> low = {}, sign = {}, high = {};

  __device__ void load(const Word* block, int first, int pair) {
    low = read<words>(block + pair * width / 4 * 8 + first);
    if (bits != width) sign = read<words>(block + width * 8 + first);
    if (bits == 6) high = read<words>(block + width * 8 + 8 + first);
  }

  __device__ Codes aligned(int pair) const {
    const int bit = pair % pairs * 2 * width + pair / pairs;  // of the first input, in planes of one bit
    Codes result = *this;
    for (int i = 0; i < words; ++i) {
      if (width == 2) result.low.at[i] >>= pair % 2 * 4;
      if (bits != width) result.sign.at[i] <<= 7 - width - bit;
      if (bits == 6) result.high.at[i] <<= 7 - width - bit;
    }
    return result;
  }
};

// Two weights per register: the one that byte `select & 15` of words i of a and b chooses in the low half, byte
// `select >> 12` in the high half (0 to 3: a, 4 to 7: b); even: input 2 * pair, odd: the next.
template <class Format, int bits, int words>
__device__ inline void decode(const Codes<bits, words>& a, const Codes<bits, words>& b, int i, Word select, Word offset,
                              Word scale, Word& even, Word& odd) {
  constexpr int width = Codes<bits, words>::width, shift = Format::mantissa;
  constexpr Word mask = ((1u << (bits == width ? width - 1 : width)) - 1) << shift;
  const Word low = __byte_perm(a.low.at[i], b.low.at[i], select);
  Word even_exponent = low << shift & mask * both, odd_exponent = low << (shift - width) & mask * both;
  if (bits == 6) {
    const Word high = __byte_perm(a.high.at[i], b.high.at[i], select);
    even_exponent |= high << (shift - 7) & (16u << shift) * both;
    odd_exponent |= high >> (11 - shift) & (16u << shift) * both;
  }
  const Word sign = bits == width ? low : __byte_perm(a.sign.at[i], b.sign.at[i], select);
  const Word even_sign = sign << (bits == width ? 8 - width : width), odd_sign = sign << (bits == width ? 8 - 2 * width : 0);
  even = Format::scaled(Format::moved(even_exponent, offset) | (even_sign & minus_zero), scale);
  odd = Format::scaled(Format::moved(odd_exponent, offset) | (odd_sign & minus_zero), scale);
}

// What one thread needs of two neighbouring blocks of codes, 16 inputs, and of x: 8 * tiles rows of it.
template <class Format, int bits, int words, int tiles>
struct Step {
  Codes<bits, words> codes[2];
  Word x[tiles][2];

  // weights, inputs: of the thread's first block of this step, inputs in the first of its rows, which are `tile_words`
  // apart. left, rows: how many blocks and rows there are from here on; beyond, x is 0, and any codes do.
  __device__ void load(const Word* weights, const Word* inputs, long long tile_words, int left, int first, int pair,
                       int rows) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half < left) codes[half].load(weights + half * (8 * bits), first, pair);
#pragma unroll
      for (int tile = 0; tile < tiles; ++tile) {
        x[tile][half] = half < left && 8 * tile < rows ? inputs[tile * tile_words + half * 4] : 0;
      }
    }
  }

  __device__ void multiply(float (&sums)[tiles * 2 * words][4], int pair, int live, Word offset, Word scale) const {
    const Codes<bits, words> a = codes[0].aligned(pair), b = codes[1].aligned(pair);
    Word inputs[tiles][2];
    for (int tile = 0; tile < tiles; ++tile) {
      inputs[tile][0] = __byte_perm(x[tile][0], x[tile][1], 0x5410);  // the first inputs of both blocks
      inputs[tile][1] = __byte_perm(x[tile][0], x[tile][1], 0x7632);
    }
#pragma unroll
    for (int part = 0; part < 2 * words; ++part) {
      const Word select = 0x4400 + part % 2 * 0x2222;
      Word weights[4];
      decode<Format>(a, b, part / 2, select, offset, scale, weights[0], weights[2]);
      decode<Format>(a, b, part / 2, select + 0x1111, offset, scale, weights[1], weights[3]);
#pragma unroll
      for (int tile = 0; tile < tiles; ++tile) {
        if (tile == 0 || 8 * tile < live) Format::multiply(sums[tile * 2 * words + part], weights, inputs[tile]);
      }
    }
  }
};

// Adds the sums of all warps, in an order that depends on nothing but their number, a power of two; warp 0 has the result.
template <int count>
__device__ inline void add_warps(float (&sums)[count][4], float* shared) {
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    float* slot = shared + (int)threadIdx.y % half * count * 128 + threadIdx.x;
    if (half <= (int)threadIdx.y && (int)threadIdx.y < 2 * half) {
      for (int i = 0; i < 4 * count; ++i) slot[i * 32] = sums[i / 4][i % 4];
    }
    __syncthreads();
    if ((int)threadIdx.y < half) {
      for (int i = 0; i < 4 * count; ++i) sums[i / 4][i % 4] += slot[i * 32];
    }
    __syncthreads();
  }
}

// Of the gridDim.z thread blocks with the same outputs the last to arrive adds all totals, in order, and returns true. Its
// counter is 0 again. partial has `room` floats per thread block, of which `count` are used.
__device__ inline bool add_blocks(float* total, int count, int room, float* partial, Word* arrived) {
  __shared__ bool is_last;
  const int thread = threadIdx.y * 32 + threadIdx.x, threads = blockDim.y * 32;
  const int group = blockIdx.y * gridDim.x + blockIdx.x;
  float* mine = partial + ((long long)group * gridDim.z + blockIdx.z) * room;
  for (int i = thread; i < count; i += threads) mine[i] = total[i];
  __threadfence();
  __syncthreads();
  if (thread == 0) is_last = atomicInc(arrived + group, gridDim.z - 1) == gridDim.z - 1;
  __syncthreads();
  if (!is_last) return false;
  __threadfence();
  const float* first = partial + (long long)group * gridDim.z * room;
  for (int i = thread; i < count; i += threads) {
    float sum = 0.0f;
    for (int part = 0; part < (int)gridDim.z; ++part) sum += __ldcg(first + (long long)part * room + i);
    total[i] = sum;  // read by the same thread only
  }
  return true;
}

// The products of one warp: 32 * words outputs, 8 * tiles rows of x, and of inputs, two blocks of codes at a time, every
// (gridDim.z * blockDim.y)-th two. Thread 4 * g + t has outputs of words g * words and following, counted through `words`
// panels, as the operand a of mma, and the inputs 2t and 2t + 1 of a block; x is the operand b. Beyond `outputs`, the last
// panel is read again. The codes of the next `depth` steps are on their way while one is multiplied.
template <class Format, int bits, int words, int tiles>
__device__ inline void accumulate(const Word* __restrict__ codes, const Word* __restrict__ x, int rows, int blocks,
                                  int outputs, Word offset, Word scale, float (&sums)[tiles * 2 * words][4]) {
  constexpr int depth = tiles == 1 && bits < 6 ? 2 : 1;
  const int g = threadIdx.x / 4, pair = threadIdx.x % 4, word = g * words;
  const int panels = (outputs + 31) / 32, panel = blockIdx.x * words + word / 8;
  const int row = blockIdx.y * 8 * tiles, live = rows - row;
  const Word* weights = codes + (long long)(panel < panels ? panel : panels - 1) * blocks * (8 * bits);
  const Word* inputs = x + (long long)(row + (g < live ? g : 0)) * blocks * 4 + pair;
  const int steps = (blocks + 1) / 2, stride = gridDim.z * blockDim.y, begin = blockIdx.z * blockDim.y + threadIdx.y;

  Step<Format, bits, words, tiles> next[depth];
  const auto load = [&](int step, Step<Format, bits, words, tiles>& target) {
    target.load(weights + (long long)step * (16 * bits), inputs + step * 8LL, 32LL * blocks, blocks - 2 * step, word % 8,
                pair, live - g);
  };
#pragma unroll
  for (int ahead = 0; ahead < depth; ++ahead) load(begin + ahead * stride, next[ahead]);
  for (int step = begin; step < steps; step += depth * stride) {  // the same for all threads of a warp
#pragma unroll
    for (int ahead = 0; ahead < depth; ++ahead) {
      const Step<Format, bits, words, tiles> current = next[ahead];
      load(step + (depth + ahead) * stride, next[ahead]);
      __syncwarp();  // the loads depend on the lane, the products need all of them
      current.multiply(sums, pair, live, offset, scale);
    }
  }
}

// y = x W^T + bias. x (rows, 8 * blocks), y (rows, outputs), bias (outputs) or unused: 16-bit floats. Block (32, warps),
// warps a power of two up to 8; grid (panels / words rounded up, rows / (8 * tiles) rounded up, parts of the inputs).
// partial: 32 * words * 8 * tiles floats per thread block, arrived: a zero per (x, y) of the grid; for several parts.
template <class Format, int bits, int words, int tiles>
__device__ inline void linear(const Word* __restrict__ codes, const Word* __restrict__ x,
                              const unsigned short* __restrict__ bias, unsigned short* __restrict__ y, float* partial,
                              Word* arrived, int rows, int blocks, int outputs, int has_bias, Word offset, Word scale,
                              float* shared) {
  constexpr int span = 32 * words, count = tiles * 2 * words;
  float sums[count][4] = {};
  accumulate<Format, bits, words, tiles>(codes, x, rows, blocks, outputs, offset, scale, sums);
  add_warps(sums, shared);
  if (threadIdx.y == 0) {
    const int word = threadIdx.x / 4 * words, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4 * count; ++i) {
      const int part = i / 4 % (2 * words), at = word + part / 2, n = i / (8 * words) * 8 + column + i % 2;
      shared[n * span + at / 8 * 32 + row_of_byte(at % 8 * 4 + part % 2 * 2) + i / 2 % 2 * 8] = sums[i / 4][i % 4];
    }
  }
  __syncthreads();
  const int row = blockIdx.y * 8 * tiles, live = rows - row, used = (live < 8 * tiles ? live : 8 * tiles) * span;
  if (gridDim.z > 1 && !add_blocks(shared, used, 8 * tiles * span, partial, arrived)) return;  // all threads alike
  for (int i = threadIdx.y * 32 + threadIdx.x; i < used; i += blockDim.y * 32) {
    const int n = i / span, output = blockIdx.x * span + i % span;
    if (output >= outputs) continue;
    const float sum = shared[i] + (has_bias ? Format::widened(bias[output]) : 0.0f);
    y[(long long)(row + n) * outputs + output] = Format::rounded(sum);
  }
}

// All weights of a linear layer as 16-bit floats: y (32 * panels, 8 * blocks). A thread does 8 inputs of 4 rows.
template <class Format, int bits>
__device__ inline void rows(const Word* __restrict__ codes, Words<4>* __restrict__ y, int panels, int blocks, Word offset,
                            Word scale) {
  const long long count = (long long)panels * blocks * 8, stride = (long long)gridDim.x * blockDim.x;
  for (long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x; at < count; at += stride) {
    const int word = (int)(at % 8);
    const long long panel = at / 8 / blocks, block = at / 8 % blocks;
    Codes<bits, 1> part[4];
    for (int pair = 0; pair < 4; ++pair) {
      part[pair].load(codes + at / 8 * (8 * bits), word, pair);
      part[pair] = part[pair].aligned(pair);
    }
    for (int byte = 0; byte < 4; ++byte) {
      Words<4> weights;
      for (int half = 0; half < 2; ++half) {
        Word even, odd;
        decode<Format>(part[2 * half], part[2 * half + 1], 0, 0x4400 + byte * 0x1111, offset, scale, even, odd);
        weights.at[2 * half] = __byte_perm(even, odd, 0x5410);
        weights.at[2 * half + 1] = __byte_perm(even, odd, 0x7632);
      }
      y[(panel * 32 + row_of_byte(4 * word + byte)) * blocks + block] = weights;
    }
  }
}

// All weights of a convolution as 16-bit floats, in the order of storage: y (count, 8, 32), count blocks. A thread does 16
// weights of two groups: those in words 2h, 2h + 1, 2h + 4 and 2h + 5 of the block.
template <class Format, int bits>
__device__ inline void flat(const Word* __restrict__ codes, Words<4>* __restrict__ y, long long count, Word offset,
                            Word scale) {
  const long long stride = (long long)gridDim.x * blockDim.x;
  for (long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x; at < count * 8; at += stride) {
    const int half = (int)(at % 2), pair = (int)(at / 2 % 4);
    Codes<bits, 2> part[2];
    for (int i = 0; i < 2; ++i) {
      part[i].load(codes + at / 8 * (8 * bits), 2 * half + 4 * i, pair);
      part[i] = part[i].aligned(pair);
    }
    for (int byte = 0; byte < 2; ++byte) {
      Words<4> even, odd;
      for (int i = 0; i < 4; ++i) {
        const Codes<bits, 2>& four = part[i / 2];
        decode<Format>(four, four, i % 2, 0x2200 + byte * 0x1111, offset, scale, even.at[i], odd.at[i]);
      }
      Words<4>* target = y + at / 8 * 32 + pair * 8 + half * 2 + byte;  // in eights of weights: a group has four
      target[0] = even;
      target[4] = odd;
    }
  }
}

#define BITSHIFT_HALF_LINEAR(name, Format, bits, words, tiles)                                                             \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                                     \
      bitshift_linear_##name##_##bits##_##tiles(const Word* __restrict__ codes, const Word* __restrict__ x,                \
                                                const unsigned short* __restrict__ bias, unsigned short* __restrict__ y,   \
                                                float* partial, Word* arrived, int rows, int blocks, int outputs,          \
                                                int has_bias, Word offset, Word scale) {                                   \
    __shared__ float shared[4 * 32 * (tiles * 2 * words * 4)];                                                             \
    linear<Format, bits, words, tiles>(codes, x, bias, y, partial, arrived, rows, blocks, outputs, has_bias, offset,       \
                                       scale, shared);                                                                     \
  }
#define BITSHIFT_HALF(name, Format, bits)                                                                                  \
  BITSHIFT_HALF_LINEAR(name, Format, bits, 4, 1)                                                                           \
  BITSHIFT_HALF_LINEAR(name, Format, bits, 2, 4)                                                                           \
  extern "C" __global__ void bitshift_rows_##name##_##bits(const Word* __restrict__ codes, Words<4>* __restrict__ y,       \
                                                           int panels, int blocks, Word offset, Word scale) {              \
    rows<Format, bits>(codes, y, panels, blocks, offset, scale);                                                           \
  }                                                                                                                        \
  extern "C" __global__ void bitshift_flat_##name##_##bits(const Word* __restrict__ codes, Words<4>* __restrict__ y,       \
                                                           long long count, Word offset, Word scale) {                     \
    flat<Format, bits>(codes, y, count, offset, scale);                                                                    \
  }

BITSHIFT_HALF(bf16, BFloat16, 2)
BITSHIFT_HALF(bf16, BFloat16, 3)
BITSHIFT_HALF(bf16, BFloat16, 4)
BITSHIFT_HALF(bf16, BFloat16, 5)
BITSHIFT_HALF(bf16, BFloat16, 6)
BITSHIFT_HALF(f16, Float16, 2)
BITSHIFT_HALF(f16, Float16, 3)
BITSHIFT_HALF(f16, Float16, 4)
BITSHIFT_HALF(f16, Float16, 5)

#endif
