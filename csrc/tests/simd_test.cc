// Vectors of the instruction set that this is compiled for, against the same lane by lane in plain C++.

#include "csrc/batch_norm/cpu/simd.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "csrc/batch_norm/cpu/stored.h"
#include "csrc/batch_norm/cpu/vector_activation.h"
#include "csrc/tests/testing.h"

namespace tfops::cpu::TFOPS_CPU_LEVEL {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

uint32_t BitsOf(float f) { return BitCast<uint32_t>(f); }

// The value of 16 bits, by the definition of the types: a sign, exponent bits, and the rest a fraction.
float ValueOf(uint16_t bits, int exponent_bits) {
  const int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 2 * bias + 1) return fraction ? kNaN : sign * kInfinity;
  const int whole = exponent ? fraction + (1 << fraction_bits) : fraction;
  return sign * std::ldexp(static_cast<float>(whole), std::max(exponent, 1) - bias - fraction_bits);
}

// Calls expect(input, output) for each element that a function of vectors makes of another.
template <typename Out, typename In, typename VectorOut, typename VectorIn, typename Expect>
void ExpectOfEach(const std::vector<In>& inputs, VectorOut (*function)(VectorIn), Expect expect) {
  constexpr size_t kCount = kLanes<float>;
  for (size_t i = 0; i < inputs.size(); i += kCount) {
    In in[kCount] = {};
    std::copy_n(inputs.begin() + i, std::min(kCount, inputs.size() - i), in);
    Out out[kCount];
    const VectorOut results = function(LoadBits<VectorIn>(in));
    std::memcpy(out, &results, sizeof(out));
    for (size_t k = 0; k < std::min(kCount, inputs.size() - i); ++k) expect(in[k], out[k]);
  }
}

std::vector<uint16_t> AllBits() {
  std::vector<uint16_t> bits;
  for (int i = 0; i < 1 << 16; ++i) bits.push_back(static_cast<uint16_t>(i));
  return bits;
}

void ExpectWidened(int exponent_bits, FloatVec (*widen)(HalfwordVec)) {
  ExpectOfEach<float>(AllBits(), widen, [&](uint16_t bits, float got) {
    const float want = ValueOf(bits, exponent_bits);
    testing::about = std::to_string(bits);
    EXPECT_EQ(std::isnan(got), std::isnan(want));
    if (!std::isnan(want)) EXPECT_EQ(BitsOf(got), BitsOf(want));
  });
}

// Floats that one of the 16-bit numbers is exactly, halfway to the next, and next to these.
std::vector<float> FloatsNear(int exponent_bits) {
  std::vector<float> floats;
  const auto infinite = static_cast<uint16_t>(((1 << exponent_bits) - 1) << (15 - exponent_bits));
  for (uint16_t bits = 0; bits < infinite; ++bits) {
    const float low = ValueOf(bits, exponent_bits);
    // What would follow the largest number rounds to infinity.
    const double step = bits + 1 < infinite ? double{ValueOf(bits + 1, exponent_bits)} - low
                                            : double{low} - ValueOf(bits - 1, exponent_bits);
    const auto middle = static_cast<float>(low + step / 2);
    for (const float f : {low, middle, std::nextafter(middle, 0.0f), std::nextafter(middle, kInfinity)}) {
      floats.insert(floats.end(), {f, -f});
    }
  }
  floats.insert(floats.end(), {kInfinity, -kInfinity, kNaN, -kNaN, BitCast<float>(uint32_t{0x7FFFFFFF}),
                               std::numeric_limits<float>::max(), std::numeric_limits<float>::denorm_min()});
  return floats;
}

// Rounding is to the nearer of the two numbers about it, and between two that are as near to the even one.
void ExpectRounded(int exponent_bits, HalfwordVec (*narrow)(FloatVec)) {
  ExpectOfEach<uint16_t>(FloatsNear(exponent_bits), narrow, [&](float f, uint16_t got) {
    testing::about = std::to_string(BitsOf(f));
    const float value = ValueOf(got, exponent_bits);
    EXPECT_EQ(std::isnan(value), std::isnan(f));
    if (std::isnan(f)) return;
    EXPECT_EQ(got >> 15, static_cast<int>(BitsOf(f) >> 31));
    const auto infinite = static_cast<uint16_t>(((1 << exponent_bits) - 1) << (15 - exponent_bits));
    const uint16_t magnitude = got & 0x7FFF;
    // The value, and those next to it; past the largest is what would be next, were there no infinity.
    const auto number = [&](int bits) {
      if (bits < infinite) return double{ValueOf(static_cast<uint16_t>(bits), exponent_bits)};
      const double largest = ValueOf(infinite - 1, exponent_bits);
      return 2 * largest - ValueOf(infinite - 2, exponent_bits);
    };
    if (std::isinf(f)) return EXPECT_EQ(magnitude, infinite);
    const double wanted = std::fabs(double{f}), distance = std::fabs(number(magnitude) - wanted);
    if (magnitude == infinite) {
      EXPECT_LE((number(infinite - 1) + number(infinite)) / 2, wanted);
      return;
    }
    for (const int next : {magnitude - 1, magnitude + 1}) {
      if (next < 0) continue;
      const double other = std::fabs(number(next) - wanted);
      EXPECT_LE(distance, other);
      if (distance == other) EXPECT_EQ(magnitude % 2, 0);
    }
  });
}

TEST(HalvesBecomeTheFloatsThatTheyAre) { ExpectWidened(5, &HalfToFloat); }
TEST(BFloat16sBecomeTheFloatsThatTheyAre) { ExpectWidened(8, &BFloat16ToFloat); }
TEST(FloatsRoundToTheNearestHalf) { ExpectRounded(5, &FloatToHalf); }
TEST(FloatsRoundToTheNearestBFloat16) { ExpectRounded(8, &FloatToBFloat16); }

template <typename P>
void ExpectMasks() {
  constexpr int kL = kLanes<P>;
  for (uint32_t bits = 0; bits < 1u << kL; ++bits) {
    const IntVec<P> mask = MaskFromBits<P>(bits | 5u << kL);  // what follows a vector's bits does not matter
    for (int i = 0; i < kL; ++i) EXPECT_EQ(mask[i], bits >> i & 1 ? -1 : 0);
    EXPECT_EQ(BitsFromMask<P>(mask), bits);
  }
}

TEST(MasksAreBits) {
  ExpectMasks<float>();
  ExpectMasks<double>();
}

// Bounds give bit for bit what a comparison and a choice give, zeros and NaN included. `Above` is of no bound that is
// zero.
template <typename P>
void ExpectBounds() {
  const P infinity = std::numeric_limits<P>::infinity();
  for (const P z : {P(0), P(-0.0), P(1), P(-1), P(6), P(7), P(-88), P(-89), infinity, -infinity,
                    std::numeric_limits<P>::quiet_NaN(), std::numeric_limits<P>::denorm_min()}) {
    testing::about = std::to_string(z);
    const auto expect = [&](Vec<P> got, P want) {
      for (int i = 0; i < kLanes<P>; ++i) EXPECT_TRUE(std::memcmp(&got[i], &want, sizeof(P)) == 0);
    };
    Vec<P> lanes;
    for (int i = 0; i < kLanes<P>; ++i) lanes[i] = z;  // Splat makes a positive zero of a negative one
    for (const P low : {P(0), P(-88)}) expect(Bound<Vec<P>>::Below(lanes, Splat(low)), z < low ? low : z);
    for (const P high : {P(6), P(89)}) expect(Bound<Vec<P>>::Above(lanes, Splat(high)), z > high ? high : z);
  }
}

TEST(BoundsKeepNaNAndTheSignOfZero) {
  ExpectBounds<float>();
  ExpectBounds<double>();
}

// Parts of vectors neither read nor write what lies past them.
template <typename T, typename Bits>
void ExpectFirst() {
  constexpr int kL = kLanes<Param<T>>;
  for (int n = 1; n <= kL; ++n) {
    testing::about = std::to_string(n);
    std::vector<T> given(n), written(kL + 1);
    for (int i = 0; i < n; ++i) {
      const auto bits = static_cast<Bits>(Bits{0x3C01} + i);
      std::memcpy(&given[i], &bits, sizeof(T));
    }
    const auto guard = static_cast<Bits>(0x55);
    for (T& element : written) std::memcpy(&element, &guard, sizeof(T));
    const Vec<Param<T>> loaded = LoadFirst(given.data(), n);
    for (int i = n; i < kL; ++i) EXPECT_TRUE(loaded[i] == 0);
    StoreFirst(written.data(), Encode<T>(loaded), n);
    for (int i = 0; i <= kL; ++i) {
      const Bits want = i < n ? static_cast<Bits>(Bits{0x3C01} + i) : guard;
      EXPECT_TRUE(std::memcmp(&written[i], &want, sizeof(T)) == 0);
    }
  }
}

TEST(PartsOfVectorsEndWhereTheyShould) {
  ExpectFirst<Half, uint16_t>();
  ExpectFirst<BFloat16, uint16_t>();
  ExpectFirst<float, uint32_t>();
  ExpectFirst<double, uint64_t>();
}

TEST(LanesAddUpInDouble) {
  Vec<float> v;
  double sum = 0;
  for (int i = 0; i < kLanes<float>; ++i) sum += v[i] = 1.0f / static_cast<float>(i + 3);
  EXPECT_LE(std::fabs(SumOfLanes<float>(v) - sum), 1e-15);
  EXPECT_LE(std::fabs(SumOfLanes<double>(Vec<double>{} + 0.125) - 0.125 * kLanes<double>), 0.0);
}

TEST(HalvesOfALineJoinInOrder) {
  uint16_t halfwords[2 * kLanes<float>], joined[2 * kLanes<float>];
  for (int i = 0; i < 2 * kLanes<float>; ++i) halfwords[i] = static_cast<uint16_t>(1000 + i);
  const FloatVec both = Join(LoadBits<HalfwordVec>(halfwords), LoadBits<HalfwordVec>(halfwords + kLanes<float>));
  std::memcpy(joined, &both, sizeof(joined));
  EXPECT_TRUE(std::memcmp(joined, halfwords, sizeof(joined)) == 0);
}

}  // namespace
}  // namespace tfops::cpu::TFOPS_CPU_LEVEL
