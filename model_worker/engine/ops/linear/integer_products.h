// Quantized rows times a panel of quantized weights, where the machine multiplies bytes.
#pragma once

#include "panel_products.h"

#if defined(__AVX512VNNI__)
#define ROOTGRAFT_VNNI 1

namespace rootgraft {
namespace {  // known to this file alone, so that the compiler makes a version of each for its arguments

// Quantized weights and activations: products of four bytes are summed in integers, exactly, group by group:
//     sum over k of (s q) (t x)            = s t * (dot(q + 128, x) - 128 sum(x))        int8
//     sum over k of (s q + m) (t x)        = s t * dot(q, x) + m t sum(x)                int4
constexpr int kMaxIntegerRows = 5;

template <typename Group, int R, typename Fetch>
inline void multiply_integers(const Group* groups, int64_t num_groups, const int8_t* x, const float* scales,
                              const int32_t* x_sums, Sums* sums, Fetch fetch) {
  constexpr bool kIsInt8 = sizeof(Group) == sizeof(Int8Group);
  const int64_t x_stride = num_groups * kGroup;
  Floats local[R][kVectors] = {};
  for (int64_t g = 0; g < num_groups; ++g) {
    __m512i dots[R][kVectors];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kVectors; ++v)
        dots[r][v] = kIsInt8 ? _mm512_set1_epi32(-128 * x_sums[r * num_groups + g]) : _mm512_setzero_si512();
    const auto add = [&](int quad, const __m512i (&w)[kVectors]) {
      for (int r = 0; r < R; ++r) {
        const __m512i value = _mm512_set1_epi32(bits_of<int32_t>(x + r * x_stride + g * kGroup + quad * 4));
        for (int v = 0; v < kVectors; ++v) dots[r][v] = _mm512_dpbusd_epi32(dots[r][v], w[v], value);
      }
    };
    if constexpr (kIsInt8) {
      for (int quad = 0; quad < 8; ++quad) {
        __m512i w[kVectors];
        fetch(groups[g].values[quad], sizeof(groups[g].values[quad]));
        for (int v = 0; v < kVectors; ++v) w[v] = bits_of<__m512i>(groups[g].values[quad][v * kLanes]);
        add(quad, w);
      }
    } else {
      const __m512i low = _mm512_set1_epi8(0x0f);
      for (int quad = 0; quad < 4; ++quad) {
        __m512i w[kVectors], high[kVectors];
        fetch(groups[g].values[quad], sizeof(groups[g].values[quad]));
        for (int v = 0; v < kVectors; ++v) {
          const __m512i both = bits_of<__m512i>(groups[g].values[quad][v * kLanes]);
          w[v] = _mm512_and_si512(both, low);
          high[v] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        }
        add(quad, w);
        add(quad + 4, high);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const Floats scale = load(groups[g].scale + v * kLanes);
      for (int r = 0; r < R; ++r) {
        const float t = scales[r * num_groups + g];
        local[r][v] += scale * (reinterpret_cast<Floats>(_mm512_cvtepi32_ps(dots[r][v])) * t);
        if constexpr (!kIsInt8) {
          local[r][v] += load(groups[g].minimum + v * kLanes) * (t * static_cast<float>(x_sums[r * num_groups + g]));
        }
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r][v] = local[r][v];
}

template <typename Group, typename Fetch, int R = kMaxIntegerRows>
void multiply_integer_rows(int rows, const Group* groups, int64_t num_groups, const int8_t* x, const float* scales,
                           const int32_t* x_sums, Sums* sums, Fetch fetch) {
  if constexpr (R > 1) {
    if (rows < R) {
      return multiply_integer_rows<Group, Fetch, R - 1>(rows, groups, num_groups, x, scales, x_sums, sums, fetch);
    }
  }
  multiply_integers<Group, R>(groups, num_groups, x, scales, x_sums, sums, fetch);
}

}  // namespace
}  // namespace rootgraft
#endif
