// What Inductor writes for the products of a graph, see products.py: it stands before each of them.
#ifndef PYRO_VAE_PRODUCT
#define PYRO_VAE_PRODUCT

#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <omp.h>

#include <algorithm>
#include <memory>
#include <utility>

namespace pyro_vae {

using Vec = at::vec::Vectorized<float>;

inline Vec none(const Vec& x) { return x; }
inline Vec relu(const Vec& x) { return at::vec::clamp_min(x, Vec(0.0f)); }
inline Vec sigmoid(const Vec& x) { return Vec(1.0f) / (Vec(1.0f) + x.neg().exp()); }

// x·P(x²)/Q(x²), the quotient of least relative error (7e-9, rounding apart) up to where tanh rounds to 1.
inline Vec tanh(const Vec& x) {
  const Vec bounded = at::vec::clamp(x, Vec(-9.02f), Vec(9.02f)), y = bounded * bounded;
  Vec p(-8.43600702e-14f), q(2.54474988e-4f);
  for (float c : {5.25776228e-11f, -2.01839292e-8f, 1.11442459e-5f, 3.10300034e-3f, 1.30831555e-1f, 1.0f})
    p = at::vec::fmadd(p, y, Vec(c));
  for (float c : {2.44913772e-2f, 4.64164823e-1f, 1.0f}) q = at::vec::fmadd(q, y, Vec(c));
  return at::vec::clamp(bounded * p / q, Vec(-1.0f), Vec(1.0f));
}

// C = activation(A·B + bias) for contiguous matrices A (m, k), B (k, n) or, transposed, (n, k), C (m, n); bias (n), or null.
// Threads share out the longer side of C, or its rows where it outweighs A and B, so that each writes to a memory of its own.
// What few rows send back through a weight B they share out by its rows, and add up: a thread only ever touches its own part of
// the weight, which forward and in the optimizer is the same. Each goes over its part by tiles, whose products are oneDNN's.
template <bool transposed, Vec (*activation)(const Vec&)>
void product(const float* A, const float* B, const float* bias, float* C, int64_t m, int64_t n, int64_t k) {
  constexpr int64_t side = 64, depth = 512;  // a tile of B stays in the second cache, one of C in the first
  constexpr int64_t lanes = Vec::size();
  float one;  // where torch was built without these kernels this raises an error; raised by a thread it would end the process
  at::native::cpublas::brgemm(1, 1, 1, 1, 1, 1, false, A, B, &one);
  const bool by_rows = m >= n || k <= m;
  const int64_t most = omp_get_max_threads();
  const bool by_depth = !by_rows && !transposed && !bias && activation == none && most * std::max(m, lanes) <= k;
  const std::unique_ptr<float[]> memory(by_depth ? new float[(most - 1) * m * n] : nullptr);
  float* const sums = memory.get();  // of all threads but the first, whose is C
#pragma omp parallel
  {
    alignas(64) float turned[transposed ? depth * side : 1];
    const int64_t shared = by_rows ? m : by_depth ? k : n, parts = (shared + lanes - 1) / lanes;
    const int64_t workers = omp_get_num_threads(), worker = omp_get_thread_num();
    const int64_t begin = parts * worker / workers * lanes, end = std::min(shared, parts * (worker + 1) / workers * lanes);
    const auto [top, bottom] = by_rows ? std::pair(begin, end) : std::pair(int64_t(0), m);
    const auto [left, right] = by_rows || by_depth ? std::pair(int64_t(0), n) : std::pair(begin, end);
    const auto [first, last] = by_depth ? std::pair(begin, end) : std::pair(int64_t(0), k);
    float* own = by_depth && worker ? sums + (worker - 1) * m * n : C;
    for (int64_t j = left; j < right; j += side) {
      const int64_t columns = std::min(side, right - j);
      for (int64_t l = first; l < last; l += depth) {
        const int64_t inner = std::min(depth, last - l);
        if (transposed) at::vec::transpose_mxn<float>(B + j * k + l, k, turned, side, columns, inner);
        for (int64_t i = top; i < bottom; i += side) {
          const int64_t rows = std::min(side, bottom - i);
          float* tile = own + i * n + j;
          const float* other = transposed ? turned : B + l * n + j;
          at::native::cpublas::brgemm(
              rows, columns, inner, k, transposed ? side : n, n, l > first, A + i * k + l, other, tile);
          if (l + depth < last || (!bias && activation == none)) continue;
          for (int64_t row = 0; row < rows; ++row) {
            for (int64_t column = 0; column < columns; column += lanes) {
              const int64_t count = std::min(lanes, columns - column);
              float* place = tile + row * n + column;
              const Vec shift = bias ? Vec::loadu(bias + j + column, count) : Vec(0.0f);
              activation(Vec::loadu(place, count) + shift).store(place, count);
            }
          }
        }
      }
    }
    at::native::cpublas::brgemm_release(false);
    if (by_depth) {
#pragma omp barrier
#pragma omp for
      for (int64_t row = 0; row < m; ++row) {
        for (int64_t part = row; part < (workers - 1) * m; part += m) {
          for (int64_t column = 0; column < n; ++column) C[row * n + column] += sums[part * n + column];
        }
      }
    }
  }
}

}  // namespace pyro_vae

#endif
