// What the .cu files use of a GPU beyond threads and barriers: 16-bit floats, byte permutation, an atomic counter, and the
// product of small matrices by a warp (PTX ISA, mma.m16n8k16: which thread holds which element).
#pragma once
#include <pthread.h>

#include <atomic>
#include <bit>
#include <cstdint>

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned select) {
  const std::uint64_t both = (std::uint64_t)b << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= (unsigned)(both >> (select >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}

template <class Value>
Value __ldcg(const Value* at) {
  return *at;
}

inline void __threadfence() { std::atomic_signal_fence(std::memory_order_seq_cst); }  // one block at a time

inline unsigned atomicInc(unsigned* at, unsigned last) {
  std::atomic_ref<unsigned> counter(*at);
  unsigned old = counter.load();
  while (!counter.compare_exchange_weak(old, old >= last ? 0 : old + 1)) {}
  return old;
}

inline float float_of_bf16(unsigned short value) { return std::bit_cast<float>((unsigned)value << 16); }
inline float float_of_f16(unsigned short value) { return (float)std::bit_cast<_Float16>(value); }
inline unsigned short f16_of_float(float value) { return std::bit_cast<unsigned short>((_Float16)value); }

inline unsigned short bf16_of_float(float value) {  // to nearest, ties to even
  const unsigned bits = std::bit_cast<unsigned>(value);
  return (unsigned short)(value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class Widen, class Round>
unsigned host_fma_pair(unsigned a, unsigned b, unsigned c, Widen widen, Round round) {
  unsigned result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto part = [&](unsigned pair) { return widen((unsigned short)(pair >> shift)); };
    result |= (unsigned)round(part(a) * part(b) + part(c)) << shift;  // exact for a power of two b
  }
  return result;
}

inline unsigned fma_bf16x2(unsigned a, unsigned b, unsigned c) {
  return host_fma_pair(a, b, c, float_of_bf16, bf16_of_float);
}
inline unsigned fma_f16x2(unsigned a, unsigned b, unsigned c) {
  return host_fma_pair(a, b, c, float_of_f16, f16_of_float);
}

struct HostWarp {
  pthread_barrier_t barrier;
  unsigned a[32][4], b[32][2];
};
inline thread_local HostWarp* host_warp;  // of this thread; the threads of a warp run at the same time
inline thread_local int host_lane;

inline void __syncwarp() { pthread_barrier_wait(&host_warp->barrier); }

template <class Widen>
void host_mma(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], Widen widen) {
  for (int i = 0; i < 4; ++i) host_warp->a[host_lane][i] = a[i];
  for (int i = 0; i < 2; ++i) host_warp->b[host_lane][i] = b[i];
  pthread_barrier_wait(&host_warp->barrier);
  const auto half = [&](unsigned pair, int k) { return widen((unsigned short)(pair >> k % 2 * 16)); };
  for (int i = 0; i < 4; ++i) {
    const int row = host_lane / 4 + i / 2 * 8, column = host_lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const unsigned from_a = host_warp->a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const unsigned from_b = host_warp->b[column * 4 + k % 8 / 2][k / 8];
      sum[i] += half(from_a, k) * half(from_b, k);
    }
  }
  pthread_barrier_wait(&host_warp->barrier);
}

inline void mma_bf16(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { host_mma(sum, a, b, float_of_bf16); }
inline void mma_f16(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { host_mma(sum, a, b, float_of_f16); }

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }

// mma.m16n8k8 of TF32: a word is one number, of which the hardware ignores the low 13 bits.
inline void mma_tf32(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  for (int i = 0; i < 4; ++i) host_warp->a[host_lane][i] = a[i] & ~0x1fffu;
  for (int i = 0; i < 2; ++i) host_warp->b[host_lane][i] = b[i] & ~0x1fffu;
  pthread_barrier_wait(&host_warp->barrier);
  for (int i = 0; i < 4; ++i) {
    const int row = host_lane / 4 + i / 2 * 8, column = host_lane % 4 * 2 + i % 2;
    for (int k = 0; k < 8; ++k) {
      const unsigned from_a = host_warp->a[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2];
      sum[i] += __uint_as_float(from_a) * __uint_as_float(host_warp->b[column * 4 + k % 4][k / 4]);
    }
  }
  pthread_barrier_wait(&host_warp->barrier);
}
