// Vectors of the instruction set at hand, in GCC's vector extension: plain operators on any machine.
//
// A file that includes this is compiled once for each instruction set, with TFOPS_CPU_LEVEL naming the copy. All of it
// has internal linkage or is always inlined, so that no copy's code can be called from another.

#ifndef TFOPS_BATCH_NORM_CPU_SIMD_H_
#define TFOPS_BATCH_NORM_CPU_SIMD_H_

#include <cstring>
#include <type_traits>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "csrc/batch_norm/cpu/plan.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define TFOPS_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define TFOPS_VECTOR_BYTES 32
#else
#define TFOPS_VECTOR_BYTES 16
#endif

// Intel's name for an operation on whole vectors.
#if TFOPS_VECTOR_BYTES == 64
#define TFOPS_X86_VECTOR(what, type) _mm512_##what##_##type
#elif TFOPS_VECTOR_BYTES == 32
#define TFOPS_X86_VECTOR(what, type) _mm256_##what##_##type
#else
#define TFOPS_X86_VECTOR(what, type) _mm_##what##_##type
#endif

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type that data of type T are computed in, and that their parameters have.
template <typename T>
struct ParamOf {
  using Type = float;
};
template <>
struct ParamOf<double> {
  using Type = double;
};
template <typename T>
using Param = typename ParamOf<T>::Type;

template <typename T, int kCount>
struct VectorOf {
  typedef T Type __attribute__((vector_size(sizeof(T) * kCount)));
};
template <typename P>
struct IntOf;
template <>
struct IntOf<float> {
  using Type = int32_t;
};
template <>
struct IntOf<double> {
  using Type = int64_t;
};

template <typename P>
inline constexpr int kLanes = TFOPS_VECTOR_BYTES / sizeof(P);
template <typename P>
using Vec = typename VectorOf<P, kLanes<P>>::Type;
template <typename P>
using IntVec = typename VectorOf<typename IntOf<P>::Type, kLanes<P>>::Type;

template <typename To, typename From>
TFOPS_INLINE To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename V>
TFOPS_INLINE V LoadBits(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <typename P>
TFOPS_INLINE Vec<P> Splat(P value) {
  return Vec<P>{} + value;
}

// The first n lanes, as a comparison has them.
template <typename P>
TFOPS_INLINE IntVec<P> FirstLanes(int64_t n) {
  IntVec<P> lane;
  for (int i = 0; i < kLanes<P>; ++i) lane[i] = i;
  return lane < static_cast<typename IntOf<P>::Type>(n);
}

// Zeros in lanes from n on.
template <typename P>
TFOPS_INLINE Vec<P> KeepFirst(Vec<P> v, int64_t n) {
  return FirstLanes<P>(n) ? v : Vec<P>{};
}

// ---------------------------------------------------------------------------------------------------------------------
// Float vectors from data in memory, and back, rounding to nearest even.

using FloatVec = Vec<float>;
using WordVec = typename VectorOf<uint32_t, kLanes<float>>::Type;
using HalfwordVec = typename VectorOf<uint16_t, kLanes<float>>::Type;

// What a vector of T is in memory.
template <typename T>
struct StoredOf {
  using Type = HalfwordVec;
};
template <>
struct StoredOf<float> {
  using Type = FloatVec;
};
template <>
struct StoredOf<double> {
  using Type = Vec<double>;
};
template <typename T>
using Stored = typename StoredOf<T>::Type;

// Words below 2^16 from halfwords, and back. By itself GCC widens halves of a vector and joins them, and clears upper
// halfwords that are zero.
#if TFOPS_VECTOR_BYTES == 32

TFOPS_INLINE WordVec WordsOf(HalfwordVec halfwords) { return (WordVec)_mm256_cvtepu16_epi32((__m128i)halfwords); }
TFOPS_INLINE HalfwordVec HalfwordsOf(WordVec words) {
  const __m256i both = (__m256i)words;
  return (HalfwordVec)_mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
}

#elif TFOPS_VECTOR_BYTES == 16 && defined(__SSE4_1__)

TFOPS_INLINE WordVec WordsOf(HalfwordVec halfwords) {
  return (WordVec)_mm_cvtepu16_epi32(_mm_cvtsi64_si128(BitCast<int64_t>(halfwords)));
}
TFOPS_INLINE HalfwordVec HalfwordsOf(WordVec words) {
  return BitCast<HalfwordVec>(_mm_cvtsi128_si64(_mm_packus_epi32((__m128i)words, (__m128i)words)));
}

#else

TFOPS_INLINE WordVec WordsOf(HalfwordVec halfwords) { return __builtin_convertvector(halfwords, WordVec); }
TFOPS_INLINE HalfwordVec HalfwordsOf(WordVec words) { return __builtin_convertvector(words, HalfwordVec); }

#endif

#if TFOPS_VECTOR_BYTES == 64 || (TFOPS_VECTOR_BYTES == 32 && defined(__F16C__))

TFOPS_INLINE FloatVec HalfToFloat(HalfwordVec half) {
#if TFOPS_VECTOR_BYTES == 64
  return (FloatVec)_mm512_cvtph_ps((__m256i)half);
#else
  return (FloatVec)_mm256_cvtph_ps((__m128i)half);
#endif
}

TFOPS_INLINE HalfwordVec FloatToHalf(FloatVec v) {
#if TFOPS_VECTOR_BYTES == 64
  auto half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  auto half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
  asm("" : "+v"(half));  // in a register: AMD's cores take longer to convert into memory than to store as well
  return (HalfwordVec)half;
}

#else

// Without instructions for it. Subnormal halves go through integers: TensorFlow's threads treat subnormal floats as 0.
TFOPS_INLINE FloatVec HalfToFloat(HalfwordVec bits) {
  const WordVec half = WordsOf(bits);
  const WordVec magnitude = half & 0x7FFF;
  const WordVec normal = (magnitude << 13) + ((127 - 15) << 23);
  const WordVec special = (magnitude << 13) | 0x7F800000;
  typename VectorOf<int32_t, kLanes<float>>::Type integer = BitCast<decltype(integer)>(magnitude);
  const WordVec subnormal = BitCast<WordVec>(__builtin_convertvector(integer, FloatVec) * 0x1p-24f);
  const WordVec finite = magnitude < 0x0400 ? subnormal : normal;
  return BitCast<FloatVec>((magnitude < 0x7C00 ? finite : special) | ((half & 0x8000) << 16));
}

TFOPS_INLINE HalfwordVec FloatToHalf(FloatVec v) {
  const WordVec word = BitCast<WordVec>(v);
  const WordVec magnitude = word & 0x7FFFFFFF;
  const WordVec normal = (magnitude + (0xFFF + ((magnitude >> 13) & 1)) - ((127 - 15) << 23)) >> 13;
  // Adding 0.5 leaves a multiple of 2^-24, the subnormals' step, in the low bits.
  const WordVec subnormal = BitCast<WordVec>(BitCast<FloatVec>(magnitude) + 0.5f) - BitCast<uint32_t>(0.5f);
  const WordVec finite = magnitude < 0x38800000 ? subnormal : normal;
  const WordVec infinite = WordVec{} + 0x7C00;
  const WordVec nan = ((word >> 13) & 0x3FF) | 0x7E00;
  const WordVec half = magnitude < 0x477FF000 ? finite : (magnitude > 0x7F800000 ? nan : infinite);
  return HalfwordsOf(half | ((word >> 16) & 0x8000));
}

#endif

#if TFOPS_VECTOR_BYTES == 64

// The upper halves of words come and go by one permutation: shifts, and conversions of width, are what these kernels
// have most of, and fewest units for.
TFOPS_INLINE FloatVec BFloat16ToFloat(HalfwordVec bits) {
  const __m512i places = (__m512i)(WordVec{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} << 16);
  return (FloatVec)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, places, _mm512_castsi256_si512((__m256i)bits));
}

TFOPS_INLINE HalfwordVec FloatToBFloat16(FloatVec v) {
  const __m512i word = (__m512i)v;
  const __mmask16 is_odd = _mm512_test_epi32_mask(word, _mm512_set1_epi32(0x10000));
  const __m512i bias = _mm512_mask_blend_epi32(is_odd, _mm512_set1_epi32(0x7FFF), _mm512_set1_epi32(0x8000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_or_epi32(_mm512_add_epi32(word, bias), is_nan, word, _mm512_set1_epi32(0x400000));
  // Places 1, 3, 5, ... 31, two to a word.
  const __m512i places = (__m512i)(WordVec{0, 1, 2, 3, 4, 5, 6, 7} * 0x40004 + 0x30001);
  return (HalfwordVec)_mm512_castsi512_si256(_mm512_permutexvar_epi16(places, rounded));
}

#else

TFOPS_INLINE FloatVec BFloat16ToFloat(HalfwordVec bits) { return BitCast<FloatVec>(WordsOf(bits) << 16); }

// NaNs are not rounded. What they lose does not make numbers of them: they come from arithmetic, whose NaNs are quiet,
// or were of this type before.
TFOPS_INLINE HalfwordVec FloatToBFloat16(FloatVec v) {
  const WordVec word = BitCast<WordVec>(v);
  const auto is_odd = BitCast<IntVec<float>>(word << 15) < 0;  // the last bit that stays
  const WordVec bias = is_odd ? WordVec{} + 0x8000 : WordVec{} + 0x7FFF;
  return HalfwordsOf((word + (bias & BitCast<WordVec>(v == v))) >> 16);
}

#endif

template <typename T>
TFOPS_INLINE Vec<Param<T>> Decode(Stored<T> stored) {
  if constexpr (std::is_same_v<T, Half>) return HalfToFloat(stored);
  if constexpr (std::is_same_v<T, BFloat16>) return BFloat16ToFloat(stored);
  if constexpr (std::is_same_v<T, Param<T>>) return stored;
}

template <typename T>
TFOPS_INLINE Stored<T> Encode(Vec<Param<T>> v) {
  if constexpr (std::is_same_v<T, Half>) return FloatToHalf(v);
  if constexpr (std::is_same_v<T, BFloat16>) return FloatToBFloat16(v);
  if constexpr (std::is_same_v<T, Param<T>>) return v;
}

template <typename T>
TFOPS_INLINE Vec<Param<T>> Load(const T* p) {
  return Decode<T>(LoadBits<Stored<T>>(p));
}

template <typename T>
TFOPS_INLINE void Store(T* p, Vec<Param<T>> v) {
  const Stored<T> stored = Encode<T>(v);
  std::memcpy(p, &stored, sizeof(stored));
}

// Past the cache, and so without reading the line that is written to: p is aligned to as much. Other threads see it
// after StreamFence.
template <typename T>
TFOPS_INLINE void Stream(T* p, Vec<Param<T>> v) {
  const Stored<T> stored = Encode<T>(v);
#ifdef __x86_64__
#if TFOPS_VECTOR_BYTES == 64
  if constexpr (sizeof(stored) == 64)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), BitCast<__m512i>(stored));
#endif
#if TFOPS_VECTOR_BYTES >= 32
  if constexpr (sizeof(stored) == 32)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), BitCast<__m256i>(stored));
#endif
  if constexpr (sizeof(stored) == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), BitCast<__m128i>(stored));
  if constexpr (sizeof(stored) == 8)
    return _mm_stream_si64(reinterpret_cast<long long*>(p), BitCast<long long>(stored));
#else
  std::memcpy(p, &stored, sizeof(stored));
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
TFOPS_INLINE void StoreFirst(T* p, Vec<Param<T>> v, int64_t n) {
#if TFOPS_VECTOR_BYTES == 64
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), BitCast<__m256i>(Encode<T>(v)));
  }
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), (__m512)v);
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), (__m512d)v);
#else
  T buffer[kLanes<Param<T>>];
  Store(buffer, v);
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
TFOPS_INLINE void StoreLanes(T* p, Vec<Param<T>> v, int64_t n, bool stream) {
  if constexpr (kPartial) {
    StoreFirst(p, v, n);
  } else if (stream) {
    Stream(p, v);
  } else {
    Store(p, v);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Vectors of doubles, as many as there are lanes of P.

template <typename P>
struct Wide {
  static constexpr int kParts = static_cast<int>(sizeof(double) / sizeof(P));
  Vec<double> part[kParts];
};

TFOPS_INLINE Wide<double> Widen(Vec<double> v) { return {{v}}; }
TFOPS_INLINE Wide<float> Widen(Vec<float> v) {
  typedef float Part __attribute__((vector_size(TFOPS_VECTOR_BYTES / 2)));
  Part parts[2];
  std::memcpy(parts, &v, sizeof(v));
  return {{__builtin_convertvector(parts[0], Vec<double>), __builtin_convertvector(parts[1], Vec<double>)}};
}

TFOPS_INLINE Vec<double> Narrow(const Wide<double>& w) { return w.part[0]; }
TFOPS_INLINE Vec<float> Narrow(const Wide<float>& w) {
  typedef float Part __attribute__((vector_size(TFOPS_VECTOR_BYTES / 2)));
  const Part parts[2] = {__builtin_convertvector(w.part[0], Part), __builtin_convertvector(w.part[1], Part)};
  return BitCast<Vec<float>>(parts);
}

template <typename P>
TFOPS_INLINE Wide<P> LoadWide(const double* p) {
  return LoadBits<Wide<P>>(p);
}

template <typename P>
TFOPS_INLINE void StoreWide(double* p, const Wide<P>& w) {
  std::memcpy(p, &w, sizeof(w));
}

template <typename P>
TFOPS_INLINE double SumOfLanes(Vec<P> v) {
  const Wide<P> wide = Widen(v);
  Vec<double> sum = wide.part[0];
  for (int k = 1; k < Wide<P>::kParts; ++k) sum += wide.part[k];
  double total = 0;
  for (int lane = 0; lane < kLanes<double>; ++lane) total += sum[lane];
  return total;
}

// ---------------------------------------------------------------------------------------------------------------------
// Masks: a comparison's result, as bits.

// 1 << lane.
template <typename P>
TFOPS_INLINE IntVec<P> LaneBits() {
  IntVec<P> bits;
  for (int i = 0; i < kLanes<P>; ++i) bits[i] = typename IntOf<P>::Type{1} << i;
  return bits;
}

template <typename P>
TFOPS_INLINE IntVec<P> MaskFromBits(uint32_t bits) {
  return (LaneBits<P>() & static_cast<typename IntOf<P>::Type>(bits)) != 0;
}

template <typename P>
TFOPS_INLINE uint32_t BitsFromMask(IntVec<P> mask) {
#if TFOPS_VECTOR_BYTES == 64
  if constexpr (sizeof(P) == 4) return _mm512_movepi32_mask((__m512i)mask);
  if constexpr (sizeof(P) == 8) return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__x86_64__)
  if constexpr (sizeof(P) == 4) return static_cast<uint32_t>(TFOPS_X86_VECTOR(movemask, ps)((FloatVec)mask));
  if constexpr (sizeof(P) == 8) return static_cast<uint32_t>(TFOPS_X86_VECTOR(movemask, pd)((Vec<double>)mask));
#else
  const IntVec<P> selected = mask & LaneBits<P>();
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<P>; ++i) bits |= static_cast<uint32_t>(selected[i]);
  return bits;
#endif
}

// Bits i to i + n - 1 of a row of bits, n <= lanes. What follows them is undefined. kInPlace: n is all lanes, and i a
// multiple of that or of 8.
template <typename P, bool kInPlace>
TFOPS_INLINE uint32_t LoadMaskBits(const uint8_t* row, int64_t i, int64_t n) {
  if constexpr (kInPlace) return kLanes<P> > 8 ? LoadBits<uint16_t>(row + i / 8) : uint32_t{row[i / 8]} >> (i % 8);
  const int64_t first = i / 8, last = (i + n - 1) / 8;
  uint32_t bits = row[first];
  if (first < last) bits |= static_cast<uint32_t>(row[first + 1]) << 8;
  if (kLanes<P> > 8 && i % 8 != 0 && first + 1 < last) bits |= static_cast<uint32_t>(row[last]) << 16;
  return bits >> (i % 8);
}

// Bits i to i + kCount - 1, kCount being 8, 16 or 32.
template <int64_t kCount>
TFOPS_INLINE uint32_t LoadMaskBits(const uint8_t* row, int64_t i) {
  using Bits = std::conditional_t<kCount == 8, uint8_t, std::conditional_t<kCount == 16, uint16_t, uint32_t>>;
  uint64_t bits = LoadBits<Bits>(row + i / 8);
  if (i % 8 != 0) bits |= static_cast<uint64_t>(row[(i + kCount) / 8]) << kCount;
  return static_cast<uint32_t>(bits >> i % 8);
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_SIMD_H_
