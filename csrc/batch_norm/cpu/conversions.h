// Float vectors from data as they lie in memory, and back, rounding to nearest even.

#ifndef TFOPS_BATCH_NORM_CPU_CONVERSIONS_H_
#define TFOPS_BATCH_NORM_CPU_CONVERSIONS_H_

#include <type_traits>

#include "csrc/batch_norm/cpu/simd.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

using FloatVec = Vec<float>;
using WordVec = typename VectorOf<uint32_t, kLanes<float>>::Type;
using HalfwordVec = typename VectorOf<uint16_t, kLanes<float>>::Type;

// What a vector of T is in memory.
template <typename T>
using Stored = std::conditional_t<sizeof(T) == 2, HalfwordVec, Vec<Param<T>>>;

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

#elif defined(__aarch64__)

// Part of ARMv8 from the first, unlike arithmetic with halves. FPCR.FZ16 does not concern it.
TFOPS_INLINE FloatVec HalfToFloat(HalfwordVec half) {
  return (FloatVec)vcvt_f32_f16(vreinterpret_f16_u16((uint16x4_t)half));
}
TFOPS_INLINE HalfwordVec FloatToHalf(FloatVec v) {
  return (HalfwordVec)vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v));
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

TFOPS_INLINE HalfwordVec UpperHalfwords(WordVec words) {
  // Places 1, 3, 5, ... 31, two to a word.
  const __m512i places = (__m512i)(WordVec{0, 1, 2, 3, 4, 5, 6, 7} * 0x40004 + 0x30001);
  return (HalfwordVec)_mm512_castsi512_si256(_mm512_permutexvar_epi16(places, (__m512i)words));
}

TFOPS_INLINE HalfwordVec FloatToBFloat16(FloatVec v) {
  const __m512i word = (__m512i)v;
  const __mmask16 is_odd = _mm512_test_epi32_mask(word, _mm512_set1_epi32(0x10000));
  const __m512i bias = _mm512_mask_blend_epi32(is_odd, _mm512_set1_epi32(0x7FFF), _mm512_set1_epi32(0x8000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_or_epi32(_mm512_add_epi32(word, bias), is_nan, word, _mm512_set1_epi32(0x400000));
  return UpperHalfwords((WordVec)rounded);
}

#else

#ifdef __aarch64__  // one instruction each, where GCC takes two

TFOPS_INLINE FloatVec BFloat16ToFloat(HalfwordVec bits) { return (FloatVec)vshll_n_u16((uint16x4_t)bits, 16); }
TFOPS_INLINE HalfwordVec UpperHalfwordsOfSum(WordVec a, WordVec b) {
  return (HalfwordVec)vaddhn_u32((uint32x4_t)a, (uint32x4_t)b);
}

#else

TFOPS_INLINE FloatVec BFloat16ToFloat(HalfwordVec bits) { return BitCast<FloatVec>(WordsOf(bits) << 16); }
TFOPS_INLINE HalfwordVec UpperHalfwordsOfSum(WordVec a, WordVec b) { return HalfwordsOf((a + b) >> 16); }

#endif

TFOPS_INLINE HalfwordVec UpperHalfwords(WordVec words) { return HalfwordsOf(words >> 16); }

// NaNs are not rounded. What they lose does not make numbers of them: they come from arithmetic, whose NaNs are quiet,
// or were of this type before.
TFOPS_INLINE HalfwordVec FloatToBFloat16(FloatVec v) {
  const WordVec word = BitCast<WordVec>(v);
  const auto is_odd = BitCast<IntVec<float>>(word << 15) < 0;  // the last bit that stays
  const WordVec bias = is_odd ? WordVec{} + 0x8000 : WordVec{} + 0x7FFF;
  return UpperHalfwordsOfSum(word, bias & BitCast<WordVec>(v == v));
}

#endif

// Two halves of a line as they lie in memory one after the other.
TFOPS_INLINE FloatVec Join(HalfwordVec first, HalfwordVec second) {
#if TFOPS_VECTOR_BYTES == 32
  return (FloatVec)_mm256_inserti128_si256(_mm256_castsi128_si256((__m128i)first), (__m128i)second, 1);
#elif TFOPS_VECTOR_BYTES == 16 && defined(__x86_64__)
  return (FloatVec)_mm_set_epi64x(BitCast<int64_t>(second), BitCast<int64_t>(first));
#elif defined(__aarch64__)
  return (FloatVec)vcombine_u16((uint16x4_t)first, (uint16x4_t)second);
#else
  const HalfwordVec both[] = {first, second};
  return BitCast<FloatVec>(both);
#endif
}

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

// Encodes numbers that T has, which are not rounded.
template <typename T>
TFOPS_INLINE Stored<T> EncodeExact(Vec<Param<T>> v) {
  if constexpr (std::is_same_v<T, BFloat16>) return UpperHalfwords(BitCast<WordVec>(v));
  return Encode<T>(v);
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_CONVERSIONS_H_
