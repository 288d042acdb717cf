// From shapes to problems.

#include <cmath>
#include <vector>

#include "csrc/batch_norm/batch_norm.h"
#include "csrc/batch_norm/in_place.h"
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

TEST(ProblemsInPlaceAreOfTrainingWithAnInverse) {
  for (const Activation activation : kActivations) {
    const bool is_invertible =
        activation == Activation::kNone || activation == Activation::kLeakyRelu || activation == Activation::kElu;
    EXPECT_EQ(IsInvertible(activation), is_invertible);
    for (const bool training : {false, true}) {
      for (const bool has_residual : {false, true}) {
        Problem problem;
        problem.activation = activation;
        problem.training = training;
        problem.has_residual = has_residual;
        testing::about = Shown(problem);
        EXPECT_TRUE(Validate(problem).ok());
        problem.in_place = true;
        EXPECT_EQ(Validate(problem).ok(), training && !has_residual && is_invertible);
      }
    }
  }
}

// Inverses of what the activations make of numbers, and slopes at those, by the results.
TEST(InversesAreThoseOfTheActivations) {
  for (const char* text : {"", "leaky_relu", "leaky_relu(negative_slope=0.01)", "elu", "elu(alpha=0.3)"}) {
    Problem problem;
    EXPECT_TRUE(ParseActivation(text, &problem).ok());
    const ActivationIn<double> activation(problem);
    const double least = LeastInvertible<double>(RoundingOf(DataType::kFloat64));
    for (double z = -30; z < 30; z += 0.37) {
      testing::about = std::string(text) + " of " + std::to_string(z);
      if (activation.kind == Activation::kNone) {
        EXPECT_EQ(activations::None::InverseOf(z, activation, least), z);
      } else if (activation.kind == Activation::kLeakyRelu) {
        const double y = activations::LeakyRelu::Of(z, activation);
        EXPECT_LE(std::abs(activations::LeakyRelu::InverseOf(y, activation, least) - z), 1e-15 * std::abs(z));
      } else if (z > -20) {  // below, exp(z) is no part of y
        const double y = activations::Elu::Of(z, activation);
        const double inverse = activations::Elu::InverseOf(y, activation, least);
        EXPECT_LE(std::abs(inverse - z), 1e-15 * (std::abs(z) + std::exp(-z)));
        const double slope = activations::Elu::SlopeOf(z, activation);
        EXPECT_LE(std::abs(activations::Elu::SlopeFromResult(y, activation) - slope), 1e-15);
      }
    }
  }
}

TEST(ScalesAreRefusedAtTheBound) {
  for (const DataType dtype : {DataType::kFloat16, DataType::kBFloat16, DataType::kFloat32, DataType::kFloat64}) {
    const Rounding rounding = RoundingOf(dtype);
    for (const double offset : {0.0, 0.25, -3.0, 1e4}) {
      const double bound = 4 * rounding.unit * (std::abs(offset) + rounding.least_normal);
      testing::about = testing::Shown(dtype) + ", offset " + std::to_string(offset);
      for (const double sign : {-1.0, 1.0}) {
        EXPECT_TRUE(IsScaleTooSmall<double>(rounding, sign * bound, offset));
        EXPECT_TRUE(
            !IsScaleTooSmall<double>(rounding, sign * bound * 1.01 + (bound < 1e-300 ? sign * 1e-300 : 0), offset));
      }
      EXPECT_TRUE(IsScaleTooSmall<double>(rounding, 0, offset) && IsScaleTooSmall<float>(rounding, 0, 0));
      EXPECT_TRUE(std::isnan(InverseSlope<double>(rounding, 1, 0, offset)));
      EXPECT_EQ(InverseSlope<double>(rounding, 4, 1e5, offset), 0.25);
    }
    EXPECT_TRUE(!IsScaleTooSmall<float>(rounding, NAN, 1) && !IsScaleTooSmall<float>(rounding, 1, NAN));
  }
}

}  // namespace
}  // namespace tfops
