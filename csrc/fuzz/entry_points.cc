// Drives the CPU entry points with random problems and random bytes for data. For sanitizers: it looks for what they
// report, and for memory that is read before it is written.
//
// An input is a string of bytes, from which a case is drawn: sizes, types, attributes (bad ones too), which optional
// arrays there are, threads, and how each array lies in memory. Every array is of exact size, so that the sanitizer
// sees any access past it, and begins at any address that its type allows. Each case runs twice, with outputs and
// workspace full of other garbage: results must be the same, bit for bit.
//
// With clang, -DTFOPS_LIBFUZZER and -fsanitize=fuzzer libFuzzer searches for inputs; else main() draws them from a
// seed.
//
//   fuzz_kernels [seconds] [seed]

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/batch_norm/batch_norm.h"

namespace tfops {
namespace {

[[noreturn]] void Fail(const std::string& message) {
  std::fprintf(stderr, "fuzz_kernels: %s\n", message.c_str());
  std::abort();
}

// ---------------------------------------------------------------------------------------------------------------------
// A case from bytes

// Bytes to draw from; zeros when they are used up.
class Source {
 public:
  Source(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  uint8_t Byte() { return next_ < size_ ? data_[next_++] : 0; }
  bool Flag() { return Byte() & 1; }
  bool OneIn(int n) { return Byte() % n == n - 1; }
  uint32_t Word() {
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) word = word << 8 | Byte();
    return word;
  }
  template <typename T, size_t N>
  T Choose(const std::array<T, N>& values) {
    return values[Byte() % N];
  }

 private:
  const uint8_t* data_;
  size_t size_;
  size_t next_ = 0;
};

int64_t DrawSize(Source* source) {
  // A size around the widths of vectors, or 0.
  constexpr std::array<int64_t, 20> kSizes = {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 63, 65, 129, 200};
  return source->Choose(kSizes);
}

double DrawAttribute(Source* source, double good) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  constexpr std::array<double, 8> kBad = {0, -0.0, -8, -1e-30, 2, kNaN, kInfinity, -kInfinity};
  return source->OneIn(16) ? source->Choose(kBad) : good;
}

// Memory of exact size, of garbage that the caller chooses.
class Array {
 public:
  // `misalignment`: bytes past an aligned address.
  Array(int64_t bytes, int misalignment, uint8_t garbage) : bytes_(static_cast<size_t>(bytes)) {
    memory_.reset(new (std::align_val_t{64}) uint8_t[bytes_ + static_cast<size_t>(misalignment)]);
    data_ = memory_.get() + misalignment;
    std::memset(data_, garbage, bytes_);
  }

  void Fill(uint32_t seed, int kind, DataType type);

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  struct Delete {
    void operator()(uint8_t* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
  };
  std::unique_ptr<uint8_t[], Delete> memory_;
  uint8_t* data_;
  size_t bytes_;
};

// kind 0: any bits, so NaN of every payload, Inf, denormals; 1: numbers of ordinary size; 2: zeros of either sign;
// 3: denormals.
void Array::Fill(uint32_t seed, int kind, DataType type) {
  // Repeated after a prime number of elements: a sanitizer makes every step here slow.
  constexpr size_t kPeriod = 4099;
  const auto width = static_cast<size_t>(ElementBytes(type));
  uint64_t state = seed;
  for (size_t i = 0; i + width <= bytes_; i += width) {
    if (i >= kPeriod * width) {
      std::memcpy(data_ + i, data_ + i - kPeriod * width, std::min(kPeriod * width, bytes_ - i));
      i += (kPeriod - 1) * width;
      continue;
    }
    state = state * 6364136223846793005 + 1442695040888963407;
    uint64_t bits = state ^ state >> 31;
    const uint64_t sign = bits & 1;
    if (kind == 1 && type == DataType::kFloat32) {
      const float value = static_cast<float>(static_cast<int64_t>(bits % 2001) - 1000) / 256;
      std::memcpy(&bits, &value, sizeof(value));
    } else if (kind == 1 && type == DataType::kFloat64) {
      const double value = static_cast<double>(static_cast<int64_t>(bits % 2001) - 1000) / 256;
      std::memcpy(&bits, &value, sizeof(value));
    } else if (kind == 1) {  // exponents around that of 1
      bits = (bits & 0x80ff) | (type == DataType::kFloat16 ? 0x3c00 : 0x3f80);
    } else if (kind == 2) {
      bits = sign << (8 * width - 1);
    } else if (kind == 3) {
      bits = (bits >> 8 & 0x7f) | sign << (8 * width - 1);
    }
    std::memcpy(data_ + i, &bits, width);
  }
}

enum class Entry { kForward, kBackward, kMoments, kGradientMoments, kGradientNormalize };

struct Case {
  Entry entry;
  Problem problem;
  Mask mask;  // length; flags are made with the arrays
  bool has_mask = false;
  bool has_running = false;
  bool in_place = false;
  int threads = 1;
  uint32_t seed = 0;
  uint8_t misalignment = 0;
};

bool IsPhase(Entry entry) {
  return entry == Entry::kMoments || entry == Entry::kGradientMoments || entry == Entry::kGradientNormalize;
}

constexpr std::array<Activation, 3> kInvertible = {Activation::kNone, Activation::kLeakyRelu, Activation::kElu};

// Draws a case. False if the sizes were refused, as they should be, or are too large for a test.
bool DrawCase(Source* source, Case* drawn) {
  constexpr std::array<Entry, 5> kEntries = {Entry::kForward, Entry::kBackward, Entry::kMoments,
                                             Entry::kGradientMoments, Entry::kGradientNormalize};
  constexpr std::array<DataType, 4> kTypes = {DataType::kFloat16, DataType::kBFloat16, DataType::kFloat32,
                                              DataType::kFloat64};
  drawn->entry = source->Choose(kEntries);
  Problem& problem = drawn->problem;
  problem.dtype = source->Choose(kTypes);
  problem.activation = kActivations[source->Byte() % std::size(kActivations)];
  problem.negative_slope = DrawAttribute(source, 0.2);
  problem.threshold = DrawAttribute(source, source->Flag() ? 0 : 0.25);
  problem.max_value = DrawAttribute(source, source->Flag() ? std::numeric_limits<double>::infinity() : 1.5);
  problem.alpha = DrawAttribute(source, 1);
  problem.has_residual = source->Flag();
  problem.training = !IsPhase(drawn->entry) && source->Flag();
  problem.unbiased = source->Flag();
  problem.epsilon = DrawAttribute(source, 1e-3);
  problem.exponential_avg_factor = DrawAttribute(source, source->Flag() ? 1 : 0.25);
  drawn->has_running = source->Flag() || problem.exponential_avg_factor != 1;
  drawn->in_place = source->Flag();
  drawn->threads = 1 + source->Byte() % 4;
  drawn->misalignment = source->Byte();
  drawn->seed = source->Word();

  std::array<int64_t, 8> dims;
  const int rank = source->OneIn(16) ? source->Byte() % 9 : 2 + source->Byte() % 4;
  for (int i = 0; i < rank; ++i) dims[static_cast<size_t>(i)] = DrawSize(source);
  if (rank > 0 && source->OneIn(8)) {  // so large that threads share it
    int64_t others = 1;
    for (int i = 1; i < rank; ++i) others *= std::max<int64_t>(dims[static_cast<size_t>(i)], 1);
    dims[0] = 1 + (70000 + source->Byte() * int64_t{500}) / others;
  }
  if (rank > 0 && source->OneIn(32)) dims[static_cast<size_t>(rank - 1)] = int64_t{1} << (source->Byte() % 63);
  if (rank > 0 && source->OneIn(32)) dims[0] = -1;
  const int64_t axis =
      source->OneIn(32) ? static_cast<int8_t>(source->Byte()) : -1 - source->Byte() % std::max(rank, 1);
  const Status status = Fold(dims.data(), rank, axis, &problem);
  if (status.ok() != (status.code == StatusCode::kOk)) Fail("a status contradicts itself");
  if (!status.ok()) {
    if (status.message.empty()) Fail("an error says nothing");
    return false;
  }
  if (rank < 2 || axis < -rank || axis >= rank) Fail("Fold accepted a rank or an axis that it should not have");
  constexpr int64_t kMost = 400000;
  if (problem.Elements() > kMost || problem.channels > kMost || problem.Count() > kMost) return false;
  const int64_t size = source->Flag() && problem.training ? 1 + source->Byte() % 4 : 0;
  const bool divides = size == 0 || ((axis + rank) % rank != 0 && dims[0] % size == 0);
  if (SetVirtualBatches(dims.data(), rank, axis, size, &problem).ok() != divides) Fail("SetVirtualBatches errs");
  if (!divides) return false;
  drawn->has_mask = source->Flag();
  drawn->mask.length = problem.inner == 1 ? problem.channels : dims[static_cast<size_t>(rank - 1)];
  problem.in_place = source->OneIn(problem.training && !problem.has_residual ? 2 : 16);
  if (problem.in_place && source->Flag()) problem.activation = source->Choose(kInvertible);
  return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// Running it

class Run {
 public:
  Run(const Case& drawn, uint8_t garbage)
      : case_(drawn), problem_(drawn.problem), garbage_(garbage), seed_(drawn.seed), status_(Call()) {}

  const Status& status() const { return status_; }

  // The bytes of all outputs.
  std::string Results() const {
    std::string results;
    for (const Array* output : outputs_) {
      results.append(reinterpret_cast<const char*>(output->data()), output->bytes());
    }
    return results;
  }

 private:
  DataType ParamType() const { return problem_.dtype == DataType::kFloat64 ? problem_.dtype : DataType::kFloat32; }
  int64_t DataBytes() const { return problem_.Elements() * ElementBytes(problem_.dtype); }
  int64_t VectorBytes() const { return problem_.channels * ElementBytes(ParamType()); }
  int64_t StatisticsBytes() const { return problem_.virtual_batches * VectorBytes(); }

  Array* New(int64_t bytes, DataType type) {
    const int64_t elements = case_.misalignment >> (arrays_.size() % 8) & 3;
    arrays_.push_back(std::make_unique<Array>(bytes, static_cast<int>(elements * ElementBytes(type)), garbage_));
    return arrays_.back().get();
  }
  Array* Input(int64_t bytes, DataType type) {
    Array* array = New(bytes, type);
    const uint32_t kind = seed_ >> 5 & 7;
    array->Fill(seed_ = seed_ * 1664525 + 1013904223, kind > 3 ? 1 : static_cast<int>(kind), type);
    return array;
  }
  uint8_t* Data() { return Input(DataBytes(), problem_.dtype)->data(); }
  uint8_t* Vector() { return Input(VectorBytes(), ParamType())->data(); }
  uint8_t* Output(Array* array) {
    outputs_.push_back(array);
    return array->data();
  }
  uint8_t* DataOutput() { return Output(New(DataBytes(), problem_.dtype)); }
  uint8_t* VectorOutput() { return Output(New(VectorBytes(), ParamType())); }
  // An output of x's shape, in the place of one that was made for an input, if the case says so.
  uint8_t* DataOutput(const void* input) {
    if (!case_.in_place) return DataOutput();
    for (const auto& array : arrays_) {
      if (array->data() == input) return Output(array.get());
    }
    Fail("no such input");
  }

  // `type`: of a workspace, what it is aligned for anyway.
  void* Workspace(size_t bytes) {
    workspace_ = std::make_unique<Array>(static_cast<int64_t>(bytes), 0, garbage_);
    return workspace_->data();
  }

  // The threads that the call asks for, joined at the end.
  class Helpers {
   public:
    ~Helpers() {
      for (std::thread& thread : threads_) thread.join();
    }
    cpu::Threads Get(int threads) {
      return {threads - 1, [this](std::function<void()> task) { threads_.emplace_back(std::move(task)); }};
    }

   private:
    std::vector<std::thread> threads_;
  };

  void SetMask(Mask* mask) {
    mask->length = case_.mask.length;
    if (!case_.has_mask || mask->length == 0) return;
    Array* flags = New(problem_.Elements() / mask->length, DataType::kFloat16);
    std::minstd_rand random(seed_ + 1);
    for (size_t i = 0; i < flags->bytes(); ++i)
      flags->data()[i] = static_cast<uint8_t>(random() >> 9 & random() >> 17 & 1);
    mask->flags = flags->data();
  }

  Status CallForward(const cpu::Threads& threads) {
    ForwardArrays arrays;
    arrays.x = Data();
    arrays.scale = Vector();
    arrays.offset = Vector();
    if (problem_.has_residual) arrays.residual = Data();
    if (!problem_.training || case_.has_running) {
      arrays.mean = Vector();
      arrays.variance = Vector();
    }
    arrays.y = DataOutput(problem_.has_residual ? arrays.residual : arrays.x);
    if (problem_.training) {
      for (void** vector : {&arrays.mean_out, &arrays.variance_out}) *vector = VectorOutput();
      for (void** saved : {&arrays.saved_mean, &arrays.saved_inv_std}) {
        *saved = Output(New(StatisticsBytes(), ParamType()));
      }
    }
    if (NeedsActivationBits(problem_)) {
      arrays.activation_bits = Output(New(LayoutOfActivationBits(problem_).Bytes(), DataType::kFloat16));
    }
    return cpu::Forward(problem_, arrays, Workspace(cpu::ForwardWorkspaceBytes(problem_)), threads);
  }

  BackwardArrays GradientArrays() {
    BackwardArrays arrays;
    arrays.dy = Data();
    arrays.x = Data();
    for (const void** vector : {&arrays.scale, &arrays.offset}) *vector = Vector();
    for (const void** saved : {&arrays.mean, problem_.training ? &arrays.inv_std : &arrays.variance}) {
      *saved = Input(StatisticsBytes(), ParamType())->data();
    }
    if (problem_.training && case_.has_running) {
      arrays.dmean = Vector();
      arrays.dvariance = Vector();
    }
    if (NeedsResidual(problem_)) arrays.residual = Data();
    if (NeedsActivationBits(problem_)) {
      Array* bits = New(LayoutOfActivationBits(problem_).Bytes(), DataType::kFloat16);
      bits->Fill(seed_, /*kind=*/0, DataType::kFloat16);
      if (bits->bytes() % 2) bits->data()[bits->bytes() - 1] = 0x5a;
      arrays.activation_bits = bits->data();
    }
    return arrays;
  }
  void AddDataGradients(BackwardArrays* arrays) {
    arrays->dx = DataOutput(arrays->dy);
    if (problem_.has_residual && problem_.activation != Activation::kNone) arrays->dresidual = DataOutput();
  }
  void AddVectorGradients(BackwardArrays* arrays) {
    arrays->dscale = VectorOutput();
    arrays->doffset = VectorOutput();
    if (problem_.training) return;
    arrays->dmean_in = VectorOutput();
    arrays->dvariance_in = VectorOutput();
  }

  Status Call() {
    Helpers helpers;
    const cpu::Threads threads = helpers.Get(case_.threads);
    if (case_.entry == Entry::kForward) return CallForward(threads);
    if (case_.entry == Entry::kMoments) {
      MomentsArrays arrays;
      arrays.x = Data();
      SetMask(&arrays.mask);
      for (void** vector : {&arrays.count, &arrays.mean, &arrays.variance}) *vector = VectorOutput();
      return cpu::BatchMoments(problem_, arrays, Workspace(cpu::MomentsWorkspaceBytes(problem_)), threads);
    }
    BackwardArrays arrays = GradientArrays();
    void* workspace = Workspace(cpu::BackwardWorkspaceBytes(problem_));
    if (case_.entry == Entry::kGradientMoments) {
      AddVectorGradients(&arrays);
      return cpu::GradientMoments(problem_, arrays, workspace, threads);
    }
    AddDataGradients(&arrays);
    if (case_.entry == Entry::kGradientNormalize) {
      StatisticsGradient statistics;
      statistics.tilt = Vector();
      statistics.shift = Vector();
      SetMask(&statistics.mask);
      return cpu::GradientNormalize(problem_, arrays, statistics, workspace, threads);
    }
    AddVectorGradients(&arrays);
    return cpu::Backward(problem_, arrays, workspace, threads);
  }

  const Case& case_;
  const Problem problem_;
  const uint8_t garbage_;
  uint32_t seed_;
  std::vector<std::unique_ptr<Array>> arrays_;
  std::vector<Array*> outputs_;
  std::unique_ptr<Array> workspace_;
  const Status status_;
};

// Whether the parameters that the activation has are what batch_norm.h asks of them.
bool AreParametersValid(const Problem& problem) {
  const auto is_finite = [](double value) { return std::abs(value) <= std::numeric_limits<double>::max(); };
  switch (problem.activation) {
    case Activation::kLeakyRelu:
      return is_finite(problem.negative_slope);
    case Activation::kElu:
      return is_finite(problem.alpha);
    case Activation::kRelu:
      return is_finite(problem.negative_slope) && is_finite(problem.threshold);
    case Activation::kBoundedRelu:
      return is_finite(problem.negative_slope) && is_finite(problem.threshold) && problem.threshold >= 0 &&
             problem.max_value > problem.threshold;
    default:
      return true;
  }
}

bool MayBeInPlace(const Problem& problem) {
  const bool is_invertible = std::find(kInvertible.begin(), kInvertible.end(), problem.activation) != kInvertible.end();
  const double parameter = problem.activation == Activation::kLeakyRelu ? problem.negative_slope
                           : problem.activation == Activation::kElu     ? problem.alpha
                                                                        : 1;
  return problem.training && !problem.has_residual && problem.virtual_batches <= 1 && is_invertible && parameter > 0;
}

// Whether the case ran to its end.
bool Try(const uint8_t* data, size_t size) {
  Source source(data, size);
  Case drawn;
  if (!DrawCase(&source, &drawn)) return false;
  const Problem& problem = drawn.problem;
  const bool valid = problem.epsilon >= 0 && problem.epsilon <= std::numeric_limits<double>::max() &&
                     problem.exponential_avg_factor >= 0 && problem.exponential_avg_factor <= 1 &&
                     AreParametersValid(problem) && (!problem.in_place || MayBeInPlace(problem));
  if (Validate(problem).ok() != valid) Fail("Validate errs");
  const Run run(drawn, 0xff);
  const bool is_refused = problem.in_place && run.status().message.rfind("scale is too near 0", 0) == 0;
  if (run.status().ok() != (valid && !is_refused)) Fail("an entry point accepts what Validate refuses, or the reverse");
  if (!run.status().ok()) return false;
  const Run again(drawn, 0x3f);
  if (run.Results() != again.Results()) Fail("a result depends on what was in memory that is not an input");
  return true;
}

}  // namespace
}  // namespace tfops

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  tfops::Try(data, size);
  return 0;
}

#ifndef TFOPS_LIBFUZZER
int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
  std::mt19937 random(argc > 2 ? static_cast<uint32_t>(std::atoi(argv[2])) : 1);
  const auto start = std::chrono::steady_clock::now();
  int64_t cases = 0, ran = 0;
  std::vector<uint8_t> bytes(64);
  while (std::chrono::steady_clock::now() - start < std::chrono::duration<double>(seconds)) {
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    ran += tfops::Try(bytes.data(), bytes.size());
    ++cases;
  }
  std::printf("%lld cases, of which %lld ran and the others were refused\n", static_cast<long long>(cases),
              static_cast<long long>(ran));
  return 0;
}
#endif
