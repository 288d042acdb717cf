// From shapes to problems.

#include <vector>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/tests/problems.h"
#include "csrc/tests/testing.h"

namespace tfops {
namespace {

std::string Joined(const std::vector<int64_t>& dims) {
  std::string text;
  for (const int64_t dim : dims) text += std::to_string(dim) + " ";
  return text;
}

TEST(ShapesFoldAboutTheAxis) {
  Random random(3);
  for (int i = 0; i < 2000; ++i) {
    std::vector<int64_t> dims(2 + random.Below(5));
    for (int64_t& dim : dims) dim = random.Below(200);
    testing::about = Joined(dims);
    const int rank = static_cast<int>(dims.size());
    for (int axis = 0; axis < rank; ++axis) {
      Problem problem, same;
      EXPECT_TRUE(Fold(dims.data(), rank, axis, &problem).ok());
      EXPECT_TRUE(Fold(dims.data(), rank, axis - rank, &same).ok());
      int64_t outer = 1, inner = 1;
      for (int d = 0; d < rank; ++d) (d < axis ? outer : inner) *= d == axis ? 1 : dims[d];
      EXPECT_EQ(problem.outer, outer);
      EXPECT_EQ(problem.channels, dims[axis]);
      EXPECT_EQ(problem.inner, inner);
      EXPECT_TRUE(same.outer == outer && same.channels == dims[axis] && same.inner == inner);
    }
  }
}

// 2^62 elements are the most; dimensions of zero do not excuse the others, nor does their order.
TEST(ShapesHaveTheirLimits) {
  Random random(4);
  for (int i = 0; i < 2000; ++i) {
    std::vector<int64_t> dims(2 + random.Below(5));
    int bits = 0;
    for (int64_t& dim : dims) {
      const int own = static_cast<int>(random.Below(40));
      bits += own;
      dim = int64_t{1} << own;
    }
    const int rank = static_cast<int>(dims.size());
    const int64_t axis = random.Below(rank);
    testing::about = Joined(dims);
    Problem problem;
    EXPECT_EQ(Fold(dims.data(), rank, axis, &problem).ok(), bits <= 62);
    int64_t& one = dims[random.Below(rank)];
    if (one == 1) {
      one = 0;
      EXPECT_EQ(Fold(dims.data(), rank, axis, &problem).ok(), bits <= 62);
    }
    one = -1;
    EXPECT_TRUE(Fold(dims.data(), rank, axis, &problem).code == StatusCode::kInvalidArgument);
  }
  const int64_t dims[] = {2, 3};
  Problem problem;
  for (const int64_t axis : {-3, 2}) EXPECT_TRUE(!Fold(dims, 2, axis, &problem).ok());
  EXPECT_TRUE(!Fold(dims, 1, 0, &problem).ok());
}

}  // namespace
}  // namespace tfops
