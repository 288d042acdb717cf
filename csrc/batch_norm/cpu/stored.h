// Loads and stores: of whole vectors, of parts of them, and past the cache.

#ifndef TFOPS_BATCH_NORM_CPU_STORED_H_
#define TFOPS_BATCH_NORM_CPU_STORED_H_

#include <cstring>
#include <type_traits>

#include "csrc/batch_norm/cpu/conversions.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

template <typename T>
TFOPS_INLINE Vec<Param<T>> Load(const T* p) {
  return Decode<T>(LoadBits<Stored<T>>(p));
}

template <typename T>
TFOPS_INLINE void Store(T* p, Stored<T> stored) {
  std::memcpy(p, &stored, sizeof(stored));
}

// Past the cache, and so without reading the line that is written to: p is aligned to as much. Other threads see it
// after StreamFence.
template <typename Bits>
TFOPS_INLINE void StreamBits(void* p, Bits bits) {
#ifdef __x86_64__
#if TFOPS_VECTOR_BYTES == 64
  if constexpr (sizeof(bits) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), BitCast<__m512i>(bits));
#endif
#if TFOPS_VECTOR_BYTES >= 32
  if constexpr (sizeof(bits) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), BitCast<__m256i>(bits));
#endif
  if constexpr (sizeof(bits) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), BitCast<__m128i>(bits));
  if constexpr (sizeof(bits) == 8) return _mm_stream_si64(static_cast<long long*>(p), BitCast<long long>(bits));
#else
  std::memcpy(p, &bits, sizeof(bits));
#endif
}

// Brings nearer what lies so many elements on, unless `ahead` is 0.
template <typename T>
TFOPS_INLINE void FetchAhead(const T* p, int64_t ahead) {
  if (ahead != 0) __builtin_prefetch(p + ahead);
}

TFOPS_INLINE void StreamFence() {
#ifdef __x86_64__
  _mm_sfence();
#endif
}

// The first n <= 4 halfwords, and zeros.
TFOPS_INLINE uint64_t LoadHalfwords(const void* p, int64_t n) {
  if (n == 4) return LoadBits<uint64_t>(p);
  const int64_t pair = n & 2;
  uint64_t bits = pair ? LoadBits<uint32_t>(p) : 0;
  if (n & 1) bits |= uint64_t{LoadBits<uint16_t>(static_cast<const uint16_t*>(p) + pair)} << 16 * pair;
  return bits;
}

// The first n <= lanes elements, and zeros. Not by way of a buffer where that can be: a vector read from what has just
// been written in parts waits for it.
template <typename T>
TFOPS_INLINE Vec<Param<T>> LoadFirst(const T* p, int64_t n) {
#if TFOPS_VECTOR_BYTES == 64
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 2) {
    return Decode<T>(BitCast<Stored<T>>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p)));
  }
  if constexpr (sizeof(T) == 4) return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  if constexpr (sizeof(T) == 8) return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
#elif TFOPS_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 2) {
    const uint64_t low = LoadHalfwords(p, n < 4 ? n : 4);
    const uint64_t high = n > 4 ? LoadHalfwords(p + 4, n - 4) : 0;
    return Decode<T>(BitCast<Stored<T>>(_mm_set_epi64x(static_cast<int64_t>(high), static_cast<int64_t>(low))));
  }
  if constexpr (sizeof(T) == 4) return (Vec<float>)_mm256_maskload_ps(p, (__m256i)FirstLanes<float>(n));
  if constexpr (sizeof(T) == 8) return (Vec<double>)_mm256_maskload_pd(p, (__m256i)FirstLanes<double>(n));
#elif defined(__aarch64__)
  if constexpr (sizeof(T) == 2) return Decode<T>(BitCast<Stored<T>>(LoadHalfwords(p, n)));
  if constexpr (sizeof(T) > 2) {
    Stored<T> stored{};
    for (int i = 0; i < kLanes<Param<T>>; ++i) {
      if (i < n) stored[i] = p[i];
    }
    return stored;
  }
#else
#ifdef __x86_64__
  if constexpr (sizeof(T) == 2) return Decode<T>(BitCast<Stored<T>>(LoadHalfwords(p, n)));
#endif
  T buffer[kLanes<Param<T>>] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return Load(buffer);
#endif
}

template <typename T>
TFOPS_INLINE void StoreFirst(T* p, Stored<T> stored, int64_t n) {
#if TFOPS_VECTOR_BYTES == 64
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), BitCast<__m256i>(stored));
  }
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), BitCast<__m512>(stored));
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), BitCast<__m512d>(stored));
#elif defined(__aarch64__)
  for (int i = 0; i < kLanes<Param<T>>; ++i) {
    const auto lane = stored[i];
    if (i < n) std::memcpy(p + i, &lane, sizeof(lane));
  }
#else
  T buffer[kLanes<Param<T>>];
  Store(buffer, stored);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
#endif
}

// All lanes; or, at the ragged end of a run, the first n.
template <bool kPartial, typename T>
TFOPS_INLINE Vec<Param<T>> LoadLanes(const T* p, int64_t n) {
  if constexpr (kPartial) {
    return LoadFirst(p, n);
  } else {
    return Load(p);
  }
}

template <bool kPartial, typename T>
TFOPS_INLINE void StoreLanes(T* p, Stored<T> stored, int64_t n) {
  if constexpr (kPartial) {
    StoreFirst(p, stored, n);
  } else {
    Store(p, stored);
  }
}

// Vectors that follow one another. Past the cache halves go in pairs: the fewer stores a line takes, the less likely it
// is to leave for memory between two of them. p is then aligned to kBlock elements, which is not enough for pairs of 64
// bytes.
template <int kVectors, typename T>
TFOPS_INLINE void StoreVectors(T* p, const Stored<T> (&stored)[kVectors], bool stream) {
  constexpr int kL = kLanes<Param<T>>;
  constexpr bool kInPairs = sizeof(T) == 2 && sizeof(FloatVec) <= kBlock * sizeof(T) && kVectors % 2 == 0;
  if (!stream) {
    for (int v = 0; v < kVectors; ++v) Store(p + v * kL, stored[v]);
  } else if constexpr (kInPairs) {
    for (int v = 0; v < kVectors; v += 2) StreamBits(p + v * kL, Join(stored[v], stored[v + 1]));
  } else {
    for (int v = 0; v < kVectors; ++v) StreamBits(p + v * kL, stored[v]);
  }
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_STORED_H_
