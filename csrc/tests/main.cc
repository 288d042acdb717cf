// Runs the test that the argument names, or all of them. --list prints their names.

#include "csrc/tests/testing.h"

int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "";
  int run = 0;
  for (const auto& [name, body] : testing::tests) {
    if (wanted == "--list") std::printf("%s\n", name.c_str());
    if (!wanted.empty() && wanted != name) continue;
    testing::about.clear();
    body();
    ++run;
  }
  if (wanted == "--list") return 0;
  std::printf("%d tests, %d failures\n", run, testing::failures);
  return run > 0 && testing::failures == 0 ? 0 : 1;
}
