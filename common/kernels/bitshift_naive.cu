// The convolution of DeepShift's CUDA kernels, and the same one with multiplications, whose latencies its paper compares
// (abstract; the form is that of its unoptimized kernels): a thread block does a tile of 16 pixels by 16 outputs, a thread
// one output of one pixel, 16 terms at a time from shared memory. No groups, no dilation, no bias; inputs are gathered
// where the original writes them out first. Baselines: nothing else here is computed with them.

constexpr int side = 16;

// x * 2^-shift, rounded down, with a sign. A code: shift in bits 0 to 4, bit 5: negative, bit 6: nothing at all.
__device__ inline unsigned term(int x, int code) {
  const unsigned shifted = code & 64 ? 0 : (unsigned)(x >> (code & 31));
  return code & 32 ? 0 - shifted : shifted;
}

__device__ inline float term(float x, float weight) { return x * weight; }

// x (batch, inputs, height, width), y (batch, outputs, y_height, y_width), weight (outputs, inputs, kernel_h, kernel_w).
// Block (16, 16), grid (tiles of pixels, tiles of outputs), any size. Integer sums wrap, as in the original.
template <class Value, class Sum>
__device__ inline void conv2d(const Value* __restrict__ weight, const Value* __restrict__ x, Sum* __restrict__ y, int batch,
                              int inputs, int height, int width, int outputs, int y_height, int y_width, int kernel_h,
                              int kernel_w, int stride, int padding, Value (*tile_x)[side + 1], Value (*tile_w)[side + 1]) {
  const int area = y_height * y_width, kernel = kernel_h * kernel_w, terms = inputs * kernel;
  const int i = threadIdx.y, j = threadIdx.x;
  const long long pixels = (long long)batch * area;
  for (long long first = (long long)blockIdx.x * side; first < pixels; first += (long long)gridDim.x * side) {
    const long long pixel = first + i, image = pixel / area;
    const int row = (int)(pixel % area) / y_width * stride - padding;
    const int column = (int)(pixel % area) % y_width * stride - padding;
    for (int out = blockIdx.y * side; out < outputs; out += gridDim.y * side) {
      Sum sum = 0;
      for (int start = 0; start < terms; start += side) {
        const int at = start + j, c = at / kernel, h = row + at % kernel / kernel_w, w = column + at % kernel_w;
        const bool inside = pixel < pixels && at < terms && h >= 0 && h < height && w >= 0 && w < width;
        tile_x[i][j] = inside ? x[((image * inputs + c) * height + h) * width + w] : Value(0);
        tile_w[i][j] = at < terms && out + i < outputs ? weight[(long long)(out + i) * terms + at] : Value(0);
        __syncthreads();
        for (int k = 0; k < side; ++k) sum += term(tile_x[i][k], tile_w[j][k]);
        __syncthreads();
      }
      if (pixel < pixels && out + j < outputs) y[(image * outputs + out + j) * area + pixel % area] = sum;
    }
  }
}

#define BITSHIFT_NAIVE(name, Value, Sum)                                                                                   \
  extern "C" __global__ void bitshift_naive_##name(const Value* __restrict__ weight, const Value* __restrict__ x,          \
                                                   Sum* __restrict__ y, int batch, int inputs, int height, int width,      \
                                                   int outputs, int y_height, int y_width, int kernel_h, int kernel_w,     \
                                                   int stride, int padding) {                                              \
    __shared__ Value tile_x[side][side + 1], tile_w[side][side + 1];                                                       \
    conv2d(weight, x, y, batch, inputs, height, width, outputs, y_height, y_width, kernel_h, kernel_w, stride, padding,    \
           tile_x, tile_w);                                                                                                \
  }

BITSHIFT_NAIVE(shift, int, unsigned)
BITSHIFT_NAIVE(multiply, float, float)
