// The same layers with ordinary float32 weights and one multiplication per term, without any library: what DeepShift's
// shift kernels are compared with. One output per thread and step.

extern "C" __global__ void multiply_linear(const float* __restrict__ weight, const float* __restrict__ x,
                                           float* __restrict__ y, int rows, int inputs, int outputs) {
  const long long count = (long long)rows * outputs, step = (long long)gridDim.x * blockDim.x;
  for (long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x; at < count; at += step) {
    const float *w = weight + at % outputs * inputs, *v = x + at / outputs * inputs;
    float total = 0.0f;
    for (int i = 0; i < inputs; ++i) total += w[i] * v[i];
    y[at] = total;
  }
}

// x (batch, groups * inputs, height, width), y (batch, outputs, y_height, y_width), weight (outputs, inputs, kh, kw).
extern "C" __global__ void multiply_conv2d(const float* __restrict__ weight, const float* __restrict__ x,
                                           float* __restrict__ y, int batch, int inputs, int height, int width, int outputs,
                                           int y_height, int y_width, int kernel_h, int kernel_w, int stride_h,
                                           int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w,
                                           int groups) {
  const long long count = (long long)batch * outputs * y_height * y_width, step = (long long)gridDim.x * blockDim.x;
  for (long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x; at < count; at += step) {
    const int column = (int)(at % y_width), row = (int)(at / y_width % y_height);
    const int output = (int)(at / ((long long)y_width * y_height) % outputs);
    const long long image = at / ((long long)y_width * y_height * outputs);
    const long long first = (image * groups + output / (outputs / groups)) * inputs;
    long long index = (long long)output * inputs * kernel_h * kernel_w;
    float total = 0.0f;
    for (int c = 0; c < inputs; ++c) {
      for (int i = 0; i < kernel_h; ++i) {
        for (int j = 0; j < kernel_w; ++j, ++index) {
          const int h = row * stride_h - padding_h + i * dilation_h, w = column * stride_w - padding_w + j * dilation_w;
          if (h < 0 || h >= height || w < 0 || w >= width) continue;
          total += weight[index] * x[((first + c) * height + h) * width + w];
        }
      }
    }
    y[at] = total;
  }
}
