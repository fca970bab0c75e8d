// W'[n, k] = bf16(W[n, k] + scale * sum_r B[r, n] A[k, r]) for up to 64 matrices of any shapes, one launch.
//
// Layouts: W and W' are flat pieces [start, end) of row-major [d_out, d_in] matrices (a whole matrix, or a ZeRO-3
// partition with cuts inside rows); A is [d_in, r], B is passed transposed as [d_out, r]: r is contiguous in both, which
// is what mma.m16n8k16 (row, col) reads, so fragments load from global memory without staging.
//
// A warp owns 16 rows by 32 columns. The columns of its four n8 products are permuted so that each thread ends up with
// 8 neighbouring k: W moves 16 bytes at a time. Where a piece is cut or unaligned the thread falls back to elements.
//
// No torch header: the C ABI below loads under any build of torch. The same source compiles with g++ against
// cuda_on_cpu.h, which runs the blocks on CPU threads for the sanitizers.

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_runtime.h>

// D = A B + D, fragments as in the PTX ISA, "Matrix Fragments for mma.m16n8k16".
__device__ __forceinline__ void mma_m16n8k16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ uint16_t to_bf16(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
__device__ __forceinline__ float to_float(uint16_t bits) { return __uint_as_float((uint32_t)bits << 16); }
#else
#include "cuda_on_cpu.h"
#endif

namespace {

constexpr int kMaxMatrices = 64;
constexpr int kWarps = 4;
constexpr int kRows = 16;    // of one warp's tile
constexpr int kColumns = 32; // of one warp's tile
constexpr int kSteps = 4;    // row tiles that reuse one set of A fragments

struct Matrix {
  const uint16_t* source;
  uint16_t* target;
  const uint16_t* a;
  const uint16_t* b;
  int64_t start, end;  // flat range that source and target hold
  int d_in;
};

struct Matrices {  // 3.5 KB, passed by value: no device table, no copy
  Matrix of[kMaxMatrices];
};

// Two neighbouring bf16 of row `row`, columns r and r + 1; zero outside the matrix.
__device__ __forceinline__ uint32_t pair(const uint16_t* m, int64_t row, int64_t rows, int column, int columns) {
  if (row >= rows) return 0;
  const uint16_t* p = m + row * columns;
  if (column + 1 < columns && columns % 2 == 0) return *reinterpret_cast<const uint32_t*>(p + column);
  const uint32_t low = column < columns ? p[column] : 0, high = column + 1 < columns ? p[column + 1] : 0;
  return low | high << 16;
}

// Adds scale * d to the 8 columns from k of row n, as far as they lie in the piece.
__device__ __forceinline__ void add_to_row(const Matrix& m, int64_t n, int k, const float update[8], float scale) {
  const int64_t flat = n * m.d_in + k;
  const uint16_t* source = m.source + (flat - m.start);
  uint16_t* target = m.target + (flat - m.start);
  const bool whole = flat >= m.start && flat + 8 <= m.end && k + 8 <= m.d_in;
  if (whole && reinterpret_cast<uintptr_t>(source) % 16 == 0 && reinterpret_cast<uintptr_t>(target) % 16 == 0) {
    uint4 packed = *reinterpret_cast<const uint4*>(source);
    uint32_t* words = reinterpret_cast<uint32_t*>(&packed);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = to_bf16(to_float(words[i] & 0xffff) + scale * update[2 * i]);
      const uint32_t high = to_bf16(to_float(words[i] >> 16) + scale * update[2 * i + 1]);
      words[i] = low | high << 16;
    }
    *reinterpret_cast<uint4*>(target) = packed;
    return;
  }
  for (int i = 0; i < 8; ++i)
    if (k + i < m.d_in && flat + i >= m.start && flat + i < m.end)
      target[i] = to_bf16(to_float(source[i]) + scale * update[i]);
}

__global__ void __launch_bounds__(kWarps * 32) merge_kernel(const Matrices matrices, int r, float scale) {
  const Matrix& m = matrices.of[blockIdx.y];
  const int lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
  const int across = (m.d_in + kWarps * kColumns - 1) / (kWarps * kColumns);
  const int k0 = (blockIdx.x % across * kWarps + threadIdx.x / 32) * kColumns;
  const int64_t first = m.start / m.d_in + (int64_t)(blockIdx.x / across) * kRows * kSteps;
  const int64_t d_out = (m.end + m.d_in - 1) / m.d_in;  // rows of B that this piece may read
  if (k0 >= m.d_in) return;                              // the whole warp

  for (int step = 0; step < kSteps; ++step) {
    const int64_t n0 = first + step * kRows, n = n0 + group;
    if (n0 * m.d_in >= m.end) break;
    float sum[4][4] = {};
    for (int r0 = 0; r0 < r; r0 += 16) {
      const int c = r0 + 2 * member;
      const uint32_t rows[4] = {pair(m.b, n, d_out, c, r), pair(m.b, n + 8, d_out, c, r),
                                pair(m.b, n, d_out, c + 8, r), pair(m.b, n + 8, d_out, c + 8, r)};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // Column `group` of product j stands for this k, so that a thread's 2 columns of 4 products are 8 neighbours.
        const int64_t k = k0 + group / 2 * 8 + j * 2 + group % 2;
        const uint32_t columns[2] = {pair(m.a, k, m.d_in, c, r), pair(m.a, k, m.d_in, c + 8, r)};
        mma_m16n8k16(sum[j], rows, columns);
      }
    }
    float upper[8], lower[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      upper[2 * j] = sum[j][0];
      upper[2 * j + 1] = sum[j][1];
      lower[2 * j] = sum[j][2];
      lower[2 * j + 1] = sum[j][3];
    }
    add_to_row(m, n, k0 + member * 8, upper, scale);
    add_to_row(m, n + 8, k0 + member * 8, lower, scale);
  }
}

}  // namespace

// Returns 0, a cudaError_t, or -1 for more than 64 matrices. `stream` is a cudaStream_t of GPU `device`. Pointer arrays
// are host memory.
extern "C" int vlora_merge_bf16(const uint16_t* const* source, uint16_t* const* target, const uint16_t* const* a,
                                const uint16_t* const* b, const int64_t* start, const int64_t* end, const int* d_in,
                                int count, int r, float scale, int device, void* stream) {
  if (count < 0 || count > kMaxMatrices) return -1;
  Matrices matrices = {};
  unsigned blocks = 0;
  for (int i = 0; i < count; ++i) {
    matrices.of[i] = {source[i], target[i], a[i], b[i], start[i], end[i], d_in[i]};
    if (start[i] >= end[i]) continue;
    const int64_t rows = (end[i] + d_in[i] - 1) / d_in[i] - start[i] / d_in[i];
    const int64_t across = (d_in[i] + kWarps * kColumns - 1) / (kWarps * kColumns);
    const unsigned needed = (unsigned)((rows + kRows * kSteps - 1) / (kRows * kSteps) * across);
    blocks = needed > blocks ? needed : blocks;
  }
  if (blocks == 0) return 0;
#ifdef __CUDACC__
  if (const cudaError_t error = cudaSetDevice(device)) return static_cast<int>(error);
  merge_kernel<<<dim3(blocks, count), kWarps * 32, 0, static_cast<cudaStream_t>(stream)>>>(matrices, r, scale);
  return static_cast<int>(cudaGetLastError());
#else
  (void)device, (void)stream;
  cuda_on_cpu::launch(blocks, count, kWarps * 32, [&] { merge_kernel(matrices, r, scale); });
  return 0;
#endif
}
