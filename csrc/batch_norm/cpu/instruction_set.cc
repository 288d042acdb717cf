#include "csrc/batch_norm/cpu/instruction_set.h"

#include <cstdlib>
#include <string>
#include <vector>

#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace tfops::cpu {
namespace {

struct Level {
  InstructionSetChoice choice;
  bool supported;
};

#ifdef __x86_64__
// Not every compiler's __builtin_cpu_supports knows this one.
bool SupportsF16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

// Those that this build has, the best first. The portable build's last one runs wherever this library loads.
std::vector<Level> Levels() {
#define TFOPS_LEVEL(name, level, supported)                                          \
  {{{},                                                                              \
    name,                                                                            \
    {&level::KernelsOf<DataType::kFloat16>, &level::KernelsOf<DataType::kBFloat16>,  \
     &level::KernelsOf<DataType::kFloat32>, &level::KernelsOf<DataType::kFloat64>}}, \
   supported}
#ifdef __x86_64__
  __builtin_cpu_init();
  [[maybe_unused]] const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                   __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && SupportsF16c();
  [[maybe_unused]] const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                                   __builtin_cpu_supports("avx512vl");
#endif
  return {
#ifdef TFOPS_HAS_x86_64_v4
      TFOPS_LEVEL("x86-64-v4", x86_64_v4, v4),
#endif
#ifdef TFOPS_HAS_x86_64_v3
      TFOPS_LEVEL("x86-64-v3", x86_64_v3, v3),
#endif
#ifdef TFOPS_HAS_x86_64_v2
      TFOPS_LEVEL("x86-64-v2", x86_64_v2, true),
#endif
#ifdef TFOPS_HAS_neon
      TFOPS_LEVEL("neon", neon, true),
#endif
#ifdef TFOPS_HAS_generic
      TFOPS_LEVEL("generic", generic, true),
#endif
  };
#undef TFOPS_LEVEL
}

bool FollowsManyStreams() {
#ifdef __x86_64__
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

Status NotAChoice(const char* variable, const std::string& value, const std::string& choices) {
  return {StatusCode::kInvalidArgument, std::string("the environment variable ") + variable + " is '" + value +
                                            "', but this machine and build have: " + choices};
}

// The value of an environment variable, or "" without one.
std::string Forced(const char* variable) {
  const char* value = std::getenv(variable);
  return value ? value : "";
}

void Append(const char* name, std::string* names) { *names += (names->empty() ? "" : ", ") + std::string(name); }

InstructionSetChoice Choose() {
  const std::string forced = Forced("TFOPS_CPU"), streams = Forced("TFOPS_CPU_STREAMS");
  std::string built, supported;
  for (Level& level : Levels()) {
    Append(level.choice.name, &built);
    if (!level.supported) continue;
    if (forced.empty() || forced == level.choice.name) {
      level.choice.many_streams = streams.empty() ? FollowsManyStreams() : streams == "many";
      if (!streams.empty() && streams != "few" && streams != "many") {
        level.choice.status = NotAChoice("TFOPS_CPU_STREAMS", streams, "few, many");
      }
      return level.choice;
    }
    Append(level.choice.name, &supported);
  }
  if (!supported.empty()) return {NotAChoice("TFOPS_CPU", forced, supported)};
  return {{StatusCode::kUnavailable, "this build of tfops has CPU kernels for " + built +
                                         " alone (it was built with TFOPS_NATIVE=ON), which this processor does not "
                                         "have; build it again here, or with TFOPS_NATIVE=OFF"}};
}

}  // namespace

const InstructionSetChoice& ChosenInstructionSet() {
  static const InstructionSetChoice choice = Choose();
  return choice;
}

const char* InstructionSet() { return ChosenInstructionSet().name; }

}  // namespace tfops::cpu
