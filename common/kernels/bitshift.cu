// Linear layers and convolutions with packed power-of-two weights (DeepShift, S3). The packed form is that of
// bitshift_pack.py: blocks of 256 codes, eight groups of 32, each code a sign bit and a magnitude m, value +-2^(base + m),
// or 0 for m = 0 where `zero` is set. A block is 32 * bits bytes: a plane with the low 2 or 4 bits of every code, then
// planes of one bit. Linear layers: a group is 32 outputs of one input, a block 8 inputs, a panel all inputs of 32 outputs.
//
// Sums of the float kernels are float32, those of the fixed kernels 64-bit integers, exact; terms are rounded down each,
// by an arithmetic shift (DeepShift's integer kernels).

typedef unsigned int Word;

__device__ inline float float_of_bits(Word bits) {
  union {
    Word bits;
    float value;
  } both = {bits};
  return both.value;
}

// Row (0 to 31) of the weight that byte `byte` of a group's 32 holds.
__device__ inline int row_of_byte(int byte) {
  return byte / 8 % 2 * 16 + byte % 2 * 8 + byte / 16 * 4 + byte % 8 / 2;
}

__device__ inline int byte_of_row(int row) {
  return row % 8 / 4 * 16 + row / 16 * 8 + row % 4 * 2 + row / 8 % 2;
}

struct Code {
  int magnitude;
  bool negative;
};

// The four codes of one group that word `word` (0 to 7) of the group's 32 bytes holds, as bytes of three words: low bits,
// sign in bit 7, fifth bit of the magnitude in bit 7. Neighbouring words are read by neighbouring threads.
template <int bits>
struct Quad {
  static constexpr int width = bits >= 4 ? 4 : 2, per_byte = 8 / width;
  Word low, sign, high;

  __device__ Quad(const Word* block, int group, int word)
      : low(block[group / per_byte * 8 + word] >> group % per_byte * width),
        sign(bits > width ? block[width * 8 + word] << to_top(group) : 0),
        high(bits > 5 ? block[width * 8 + 8 + word] << to_top(group) : 0) {}

  // From the group's bit in a byte of a one-bit plane to bit 7.
  static __device__ int to_top(int group) { return 7 - (group % per_byte * width + group / per_byte); }

  __device__ Code code(int byte) const {
    const int bit = 8 * byte, value = low >> bit & ((1 << width) - 1);
    if (bits == width) return {value & ((1 << (width - 1)) - 1), (value >> (width - 1)) != 0};
    return {value | (int)(high >> (bit + 3) & 16), (sign >> (bit + 7) & 1) != 0};
  }
};

__device__ inline float value_of(Code code, int base, int zero) {
  if (zero && code.magnitude == 0) return 0.0f;
  return float_of_bits((Word)(code.magnitude + base + 127) << 23 | (Word)code.negative << 31);
}

// x * 2^(base + m), rounded down, with the code's sign.
__device__ inline long long shifted(int x, Code code, int base, int zero) {
  if (zero && code.magnitude == 0) return 0;
  const int exponent = code.magnitude + base;
  const long long term = exponent >= 0 ? (long long)x * (1LL << exponent) : x >> (exponent < -31 ? 31 : -exponent);
  return code.negative ? -term : term;
}

__device__ inline float term(float x, Code code, int base, int zero) { return x * value_of(code, base, zero); }
__device__ inline long long term(int x, Code code, int base, int zero) { return shifted(x, code, base, zero); }

// x (rows, 8 * blocks), y (rows, outputs). A thread block does one panel for `tile` rows of x: block (32, warps). A warp
// reads whole code blocks; thread t of it has 4 outputs and the inputs 2 * (t / 8) and the one after. Then the sums of the
// 4 * warps threads with the same outputs are added in a fixed order. Grid (panels, row tiles), any size.
template <int bits, int tile, class Input, class Sum>
__device__ inline void linear(const Word* __restrict__ codes, const Input* __restrict__ x, Sum* __restrict__ y, int rows,
                              int blocks, int outputs, int base, int zero, Sum* partial) {
  const int word = threadIdx.x % 8, pair = threadIdx.x / 8, parts = blockDim.y * 4;
  for (int panel = blockIdx.x; panel * 32 < outputs; panel += gridDim.x) {
    const Word* weights = codes + (long long)panel * blocks * (8 * bits);
    for (int first = blockIdx.y * tile; first < rows; first += gridDim.y * tile) {
      Sum sums[tile][4] = {};
      for (int block = threadIdx.y; block < blocks; block += blockDim.y) {
        for (int i = 0; i < 2; ++i) {
          const int group = 2 * pair + i;
          const Quad<bits> quad(weights + (long long)block * (8 * bits), group, word);
          const Input* inputs = x + (long long)first * blocks * 8 + block * 8 + group;
          for (int row = 0; row < tile; ++row) {
            const Input input = first + row < rows ? inputs[(long long)row * blocks * 8] : Input{};
            for (int byte = 0; byte < 4; ++byte) sums[row][byte] += term(input, quad.code(byte), base, zero);
          }
        }
      }
      for (int row = 0; row < tile; ++row) {
        for (int byte = 0; byte < 4; ++byte) {
          partial[(threadIdx.y * 4 + pair) * 32 + row_of_byte(4 * word + byte)] = sums[row][byte];
        }
        __syncthreads();
        const int output = panel * 32 + threadIdx.x;
        if (threadIdx.y == 0 && output < outputs && first + row < rows) {
          Sum total{};
          for (int part = 0; part < parts; ++part) total += partial[part * 32 + threadIdx.x];
          y[(long long)(first + row) * outputs + output] = total;
        }
        __syncthreads();
      }
    }
  }
}

// All codes as floats: group g of block b goes to y[b / blocks * step + (b % blocks * 8 + g) * stride], 32 values.
// One thread does four values of two groups, 32 threads a block of codes.
template <int bits>
__device__ inline void unpack(const Word* __restrict__ codes, float* __restrict__ y, long long count, int blocks,
                              long long step, long long stride, int base, int zero) {
  const int word = threadIdx.x % 8, pair = threadIdx.x / 8;
  for (long long block = (long long)blockIdx.x * blockDim.y + threadIdx.y; block < count;
       block += (long long)gridDim.x * blockDim.y) {
    for (int i = 0; i < 2; ++i) {
      const int group = 2 * pair + i;
      const Quad<bits> quad(codes + block * (8 * bits), group, word);
      float* target = y + block / blocks * step + (block % blocks * 8 + group) * stride;
      for (int byte = 0; byte < 4; ++byte) {
        target[row_of_byte(4 * word + byte)] = value_of(quad.code(byte), base, zero);
      }
    }
  }
}

struct alignas(16) Bytes16 {
  Word at[4];
};

// All weights of a linear layer as int8, in units of the smallest magnitude (1, 2, 4 ..., at most 64: 4 bits with a zero):
// y (32 * panels, 16 * pairs), pairs of blocks, 0 where the last has no second. A thread does 16 inputs of 4 rows.
template <int bits>
__device__ inline void int8(const Word* __restrict__ codes, Bytes16* __restrict__ y, int panels, int blocks, int zero) {
  const int pairs = (blocks + 1) / 2;
  const long long count = (long long)panels * pairs * 8, step = (long long)gridDim.x * blockDim.x;
  for (long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x; at < count; at += step) {
    const int word = (int)(at % 8), pair = (int)(at / 8 % pairs);
    const long long panel = at / 8 / pairs;
    Bytes16 rows[4] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (2 * pair + i / 8 >= blocks) continue;
      const Quad<bits> quad(codes + (panel * blocks + 2 * pair + i / 8) * (8 * bits), i % 8, word);
#pragma unroll
      for (int byte = 0; byte < 4; ++byte) {
        const Code code = quad.code(byte);
        const int size = (1 << code.magnitude) >> zero;
        rows[byte].at[i / 4] |= (Word)((code.negative ? -size : size) & 255) << i % 4 * 8;
      }
    }
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) y[(panel * 32 + row_of_byte(4 * word + byte)) * pairs + pair] = rows[byte];
  }
}

template <int bits>
__device__ inline Code code_at(const Word* codes, long long index) {
  const int byte = byte_of_row((int)(index % 32));
  return Quad<bits>(codes + index / 256 * (8 * bits), (int)(index / 32 % 8), byte / 4).code(byte % 4);
}

// The integer convolution, one output per thread and step, one shift per term: the form of DeepShift's own kernels.
// x (batch, groups * inputs, height, width) int32, y (batch, outputs, y_height, y_width) int64.
template <int bits>
__device__ inline void conv2d_fixed(const Word* __restrict__ codes, const int* __restrict__ x, long long* __restrict__ y,
                                    int batch, int inputs, int height, int width, int outputs, int y_height, int y_width,
                                    int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w,
                                    int dilation_h, int dilation_w, int groups, int base, int zero) {
  const long long count = (long long)batch * outputs * y_height * y_width, step = (long long)gridDim.x * blockDim.x;
  for (long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x; at < count; at += step) {
    const int column = (int)(at % y_width), row = (int)(at / y_width % y_height);
    const int output = (int)(at / ((long long)y_width * y_height) % outputs);
    const long long image = at / ((long long)y_width * y_height * outputs);
    const long long first = (image * groups + output / (outputs / groups)) * inputs;
    long long index = (long long)output * inputs * kernel_h * kernel_w, total = 0;
    for (int i = 0; i < kernel_h; ++i) {
      for (int j = 0; j < kernel_w; ++j) {
        const int h = row * stride_h - padding_h + i * dilation_h, w = column * stride_w - padding_w + j * dilation_w;
        if (h < 0 || h >= height || w < 0 || w >= width) {
          index += inputs;
          continue;
        }
        for (int c = 0; c < inputs; ++c, ++index) {
          total += shifted(x[((first + c) * height + h) * width + w], code_at<bits>(codes, index), base, zero);
        }
      }
    }
    y[at] = total;
  }
}

#define BITSHIFT_LINEAR(bits, tile)                                                                                        \
  extern "C" __global__ void bitshift_linear_##bits##_##tile(const Word* __restrict__ codes, const float* __restrict__ x,  \
                                                             float* __restrict__ y, int rows, int blocks, int outputs,     \
                                                             int base, int zero) {                                         \
    __shared__ float partial[32 * 4 * 16];                                                                                 \
    linear<bits, tile>(codes, x, y, rows, blocks, outputs, base, zero, partial);                                           \
  }
#define BITSHIFT_LINEAR_FIXED(bits)                                                                                        \
  extern "C" __global__ void bitshift_linear_fixed_##bits(const Word* __restrict__ codes, const int* __restrict__ x,       \
                                                          long long* __restrict__ y, int rows, int blocks, int outputs,    \
                                                          int base, int zero) {                                            \
    __shared__ long long partial[32 * 4 * 16];                                                                             \
    linear<bits, 4>(codes, x, y, rows, blocks, outputs, base, zero, partial);                                              \
  }
#define BITSHIFT_UNPACK(bits)                                                                                              \
  extern "C" __global__ void bitshift_unpack_##bits(const Word* __restrict__ codes, float* __restrict__ y,                 \
                                                    long long count, int blocks, long long step, long long stride,         \
                                                    int base, int zero) {                                                  \
    unpack<bits>(codes, y, count, blocks, step, stride, base, zero);                                                       \
  }
#define BITSHIFT_CONV2D_FIXED(bits)                                                                                        \
  extern "C" __global__ void bitshift_conv2d_fixed_##bits(                                                                 \
      const Word* __restrict__ codes, const int* __restrict__ x, long long* __restrict__ y, int batch, int inputs,         \
      int height, int width, int outputs, int y_height, int y_width, int kernel_h, int kernel_w, int stride_h,             \
      int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w, int groups, int base, int zero) {        \
    conv2d_fixed<bits>(codes, x, y, batch, inputs, height, width, outputs, y_height, y_width, kernel_h, kernel_w,          \
                       stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups, base, zero);              \
  }
#define BITSHIFT_INT8(bits)                                                                                                \
  extern "C" __global__ void bitshift_int8_##bits(const Word* __restrict__ codes, Bytes16* __restrict__ y, int panels,     \
                                                  int blocks, int zero) {                                                  \
    int8<bits>(codes, y, panels, blocks, zero);                                                                            \
  }
#define BITSHIFT(bits)        \
  BITSHIFT_LINEAR(bits, 1)    \
  BITSHIFT_LINEAR(bits, 4)    \
  BITSHIFT_LINEAR_FIXED(bits) \
  BITSHIFT_UNPACK(bits)       \
  BITSHIFT_CONV2D_FIXED(bits)

BITSHIFT(2)
BITSHIFT(3)
BITSHIFT(4)
BITSHIFT(5)
BITSHIFT(6)

BITSHIFT_INT8(2)
BITSHIFT_INT8(3)
BITSHIFT_INT8(4)
