// Vectors of the instruction set at hand, in GCC's vector extension: plain operators on any machine.
//
// A file that includes this is compiled once for each instruction set, with TFOPS_CPU_LEVEL naming the copy. All of it
// has internal linkage or is always inlined, so that no copy's code can be called from another.

#ifndef TFOPS_BATCH_NORM_CPU_SIMD_H_
#define TFOPS_BATCH_NORM_CPU_SIMD_H_

#include <cstring>
#include <tuple>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "csrc/batch_norm/cpu/partition.h"

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

template <DataType kType>
using ElementOf = std::tuple_element_t<static_cast<size_t>(kType), std::tuple<Half, BFloat16, float, double>>;

template <typename T>
inline constexpr DataType kDataTypeOf = std::is_same_v<T, Half>       ? DataType::kFloat16
                                        : std::is_same_v<T, BFloat16> ? DataType::kBFloat16
                                        : std::is_same_v<T, float>    ? DataType::kFloat32
                                                                      : DataType::kFloat64;

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

// a * b + c with one rounding, if the machine can. V: of floats, or of doubles.
template <typename V>
TFOPS_INLINE V MultiplyAdd(V a, V b, V c) {
#if defined(__aarch64__)
  if constexpr (sizeof(a[0]) == 4) return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  if constexpr (sizeof(a[0]) == 8) return (V)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#elif defined(__FMA__)
  if constexpr (sizeof(a[0]) == 4) return (V)TFOPS_X86_VECTOR(fmadd, ps)(a, b, c);
  if constexpr (sizeof(a[0]) == 8) return (V)TFOPS_X86_VECTOR(fmadd, pd)(a, b, c);
#else
  return a * b + c;
#endif
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
// Sums in double.

// The two halves of a vector of floats as doubles, added to one another.
TFOPS_INLINE Vec<double> SumOfHalves(Vec<double> v) { return v; }
TFOPS_INLINE Vec<double> SumOfHalves(Vec<float> v) {
#ifdef __aarch64__  // GCC converts lane by lane
  const float32x4_t lanes = (float32x4_t)v;
  return (Vec<double>)vcvt_f64_f32(vget_low_f32(lanes)) + (Vec<double>)vcvt_high_f64_f32(lanes);
#else
  typedef float Half __attribute__((vector_size(TFOPS_VECTOR_BYTES / 2)));
  Half halves[2];
  std::memcpy(halves, &v, sizeof(v));
  return __builtin_convertvector(halves[0], Vec<double>) + __builtin_convertvector(halves[1], Vec<double>);
#endif
}

template <typename P>
TFOPS_INLINE double SumOfLanes(Vec<P> v) {
  const Vec<double> sum = SumOfHalves(v);
  double total = 0;
  for (int lane = 0; lane < kLanes<double>; ++lane) total += sum[lane];
  return total;
}

// ---------------------------------------------------------------------------------------------------------------------
// Comparisons, whose results are vectors of integers that are all ones or zero, as bits.

// 1 << lane.
template <typename P>
TFOPS_INLINE IntVec<P> LaneBits() {
  IntVec<P> bits;
  for (int i = 0; i < kLanes<P>; ++i) bits[i] = static_cast<typename IntOf<P>::Type>(uint64_t{1} << i);
  return bits;
}

// All ones in lanes whose bit is set, the first lane's being the lowest.
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
  if constexpr (sizeof(P) == 4) return static_cast<uint32_t>(TFOPS_X86_VECTOR(movemask, ps)((Vec<float>)mask));
  if constexpr (sizeof(P) == 8) return static_cast<uint32_t>(TFOPS_X86_VECTOR(movemask, pd)((Vec<double>)mask));
#elif defined(__aarch64__)
  const IntVec<P> selected = mask & LaneBits<P>();
  if constexpr (sizeof(P) == 4) return vaddvq_u32((uint32x4_t)selected);
  if constexpr (sizeof(P) == 8) return static_cast<uint32_t>(vaddvq_u64((uint64x2_t)selected));
#else
  const IntVec<P> selected = mask & LaneBits<P>();
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<P>; ++i) bits |= static_cast<uint32_t>(selected[i]);
  return bits;
#endif
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL

#endif  // TFOPS_BATCH_NORM_CPU_SIMD_H_
