// The part of CUDA that merge.cu uses, on CPU threads: one thread per CUDA thread of a block, blocks one after another.
//
// For tests under AddressSanitizer and ThreadSanitizer. It checks indices, bounds and arithmetic; it is no model of a
// GPU's memory, its timing, or the lock step of a warp, and the fragment layout of the tensor-core instruction is our
// reading of the PTX ISA on both sides.
#pragma once

#include <barrier>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y;
};

namespace cuda_on_cpu {

// What the lanes of a warp exchange for one tensor-core instruction.
struct Warp {
  std::barrier<> meet{32};
  uint32_t a[32][4], b[32][2];
};

inline thread_local dim3 thread_index, block_index;
inline thread_local Warp* warp;

// Calls `kernel` in every thread of every block of a grid [columns, rows].
template <class Kernel>
void launch(unsigned columns, unsigned rows, unsigned threads, Kernel kernel) {
  std::vector<std::unique_ptr<Warp>> warps;
  for (unsigned i = 0; i < threads / 32; ++i) warps.push_back(std::make_unique<Warp>());
  std::vector<std::thread> running;
  for (unsigned t = 0; t < threads; ++t)
    running.emplace_back([&, t] {
      thread_index = {t, 0};
      warp = warps[t / 32].get();
      for (unsigned y = 0; y < rows; ++y)
        for (unsigned x = 0; x < columns; ++x) {
          block_index = {x, y};
          kernel();
        }
    });
  for (std::thread& t : running) t.join();
}

inline float to_float(uint32_t bf16) {
  const uint32_t bits = bf16 << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace cuda_on_cpu

#define threadIdx cuda_on_cpu::thread_index
#define blockIdx cuda_on_cpu::block_index

inline float to_float(uint16_t bits) { return cuda_on_cpu::to_float(bits); }

// To nearest even, as the hardware converts.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// D = A B + D on the fragments of a whole warp (PTX ISA, "Matrix Fragments for mma.m16n8k16", bf16).
inline void mma_m16n8k16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
  cuda_on_cpu::Warp& warp = *cuda_on_cpu::warp;
  const unsigned lane = threadIdx.x % 32;
  std::memcpy(warp.a[lane], a, sizeof warp.a[lane]);
  std::memcpy(warp.b[lane], b, sizeof warp.b[lane]);
  warp.meet.arrive_and_wait();
  const auto half = [](uint32_t word, unsigned high) { return cuda_on_cpu::to_float(high ? word >> 16 : word & 0xffff); };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const uint32_t left = warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
      const uint32_t right = warp.b[column * 4 + k % 8 / 2][k / 8];
      d[i] += half(left, k % 2) * half(right, k % 2);
    }
  }
  warp.meet.arrive_and_wait();
}
