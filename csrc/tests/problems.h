// Problems for properties to hold of: small ones, whose elements can be gone through one by one, and huge ones, of more
// elements than 32 bits can count. They are drawn at random, always the same ones.

#ifndef TFOPS_TESTS_PROBLEMS_H_
#define TFOPS_TESTS_PROBLEMS_H_

#include <cstdint>
#include <string>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/tests/testing.h"

namespace tfops {

// A number that looks random, another one for each x (SplitMix64).
inline uint64_t Hash(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

class Random {
 public:
  explicit Random(uint64_t seed) : next_(seed << 32) {}

  int64_t Below(int64_t n) { return static_cast<int64_t>(Hash(next_++) % static_cast<uint64_t>(n)); }
  bool Flag() { return Below(2) == 1; }
  template <typename T, size_t kCount>
  T Of(const T (&list)[kCount]) {
    return list[Below(kCount)];
  }

 private:
  uint64_t next_;
};

// Whether ranges, in whatever order they come, cover [0, n) without a gap or an overlap. Seen as edges from begin to
// end, they then are a path from 0 to n; and they are one if every place but these two begins as many ranges as it
// ends, for ranges that are not empty form no circles.
class Cover {
 public:
  void Add(int64_t begin, int64_t length) {
    if (length <= 0) any_empty_ = true;
    sum_ += Hash(begin + length) - Hash(begin);
  }
  bool Is(int64_t n) const { return !any_empty_ && sum_ == Hash(n) - Hash(0); }

 private:
  bool any_empty_ = false;
  uint64_t sum_ = 0;
};

inline std::string Shown(const Problem& problem) {
  const auto text = [](int64_t n) { return std::to_string(n); };
  return text(problem.outer) + " x " + text(problem.channels) + " x " + text(problem.inner) + ", dtype " +
         testing::Shown(problem.dtype) + ", activation " + testing::Shown(problem.activation) +
         (problem.has_residual ? ", residual" : "") + (problem.training ? ", training" : ", inference");
}

// A problem of at most so many elements, with sizes that are mostly next to what vectors, segments and blocks are sized
// by.
inline Problem SmallProblem(Random* random, int64_t most_elements) {
  constexpr int64_t kSizes[] = {1,    1,    2,    3,    4,    5,    7,     8,     9,     15,    16,
                                17,   24,   31,   33,   49,   63,   64,    65,    100,   127,   128,
                                129,  131,  255,  256,  257,  511,  512,   1000,  1024,  1031,  2047,
                                2048, 2049, 4095, 4096, 4097, 8191, 16384, 16385, 32768, 40001, 65537};
  Problem problem;
  do {
    problem.outer = random->Of(kSizes);
    problem.channels = random->Of(kSizes);
    problem.inner = random->Flag() ? 1 : random->Of(kSizes);
  } while (problem.Elements() > most_elements);
  return problem;
}

// A problem of more elements than 31 bits can count, and at most 2^36, which are as many as a GPU's memory has room
// for.
inline Problem HugeProblem(Random* random) {
  const auto size = [random](int64_t bits) {
    const int64_t power = int64_t{1} << random->Below(bits);
    return power + random->Below(power);
  };
  const auto is_huge = [](const Problem& problem) {
    const double elements = 1.0 * problem.outer * problem.channels * problem.inner;
    return elements > 0x1p31 && elements <= 0x1p36;
  };
  Problem problem;
  do {
    problem.outer = size(36);
    problem.channels = size(28);
    problem.inner = random->Flag() ? 1 : size(36);
  } while (!is_huge(problem));
  return problem;
}

inline void DrawSettings(Random* random, Problem* problem) {
  constexpr DataType kTypes[] = {DataType::kFloat16, DataType::kBFloat16, DataType::kFloat32, DataType::kFloat64};
  problem->dtype = random->Of(kTypes);
  problem->activation = random->Of(kActivations);
  problem->has_residual = random->Flag();
  problem->training = random->Below(4) > 0;
}

// Calls body(problem, random) for `count` problems, and says of which, should something not hold.
template <typename Body>
void ForSmallProblems(int count, int64_t most_elements, Body body) {
  Random random(1);
  for (int i = 0; i < count; ++i) {
    Problem problem = SmallProblem(&random, most_elements);
    DrawSettings(&random, &problem);
    testing::about = Shown(problem);
    body(problem, &random);
  }
}

template <typename Body>
void ForHugeProblems(int count, Body body) {
  Random random(2);
  for (int i = 0; i < count; ++i) {
    Problem problem = HugeProblem(&random);
    DrawSettings(&random, &problem);
    testing::about = Shown(problem);
    body(problem, &random);
  }
}

}  // namespace tfops

#endif  // TFOPS_TESTS_PROBLEMS_H_
