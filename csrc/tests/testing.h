// A small test harness: TEST(Name) { ... } registers a test; the EXPECT macros print what does not hold, and go on.

#ifndef TFOPS_TESTS_TESTING_H_
#define TFOPS_TESTS_TESTING_H_

#include <cstdio>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace testing {

inline std::vector<std::pair<std::string, void (*)()>> tests;
inline std::string about;  // the case at hand, which is printed with what does not hold of it
inline int failures = 0;

template <typename T>
std::string Shown(const T& value) {
  if constexpr (std::is_enum_v<T>) {
    return std::to_string(static_cast<int>(value));
  } else if constexpr (std::is_arithmetic_v<T>) {
    return std::to_string(value);
  } else {
    return value;
  }
}

template <typename Relation, typename A, typename B>
void Expect(Relation holds, const A& a, const B& b, const char* text, const char* file, int line) {
  constexpr int kMostShown = 20;
  if (holds(a, b) || ++failures > kMostShown) return;
  std::printf("%s:%d: %s, but they are %s and %s  [%s]\n", file, line, text, Shown(a).c_str(), Shown(b).c_str(),
              about.c_str());
}

struct Registration {
  Registration(const char* name, void (*body)()) { tests.emplace_back(name, body); }
};

}  // namespace testing

#define TEST(name)                                         \
  static void name();                                      \
  static const testing::Registration name##_(#name, name); \
  static void name()

#define EXPECT_(relation, sign, a, b) \
  testing::Expect(std::relation<>(), (a), (b), #a " " sign " " #b, __FILE__, __LINE__)
#define EXPECT_EQ(a, b) EXPECT_(equal_to, "==", a, b)
#define EXPECT_LE(a, b) EXPECT_(less_equal, "<=", a, b)
#define EXPECT_LT(a, b) EXPECT_(less, "<", a, b)
#define EXPECT_TRUE(condition) EXPECT_(equal_to, "==", condition, true)

#endif  // TFOPS_TESTS_TESTING_H_
