/* Runs a library that model_tune.py wrote, on pictures from a .npy file, and prints the best five classes of each.

   P=$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
   g++ -O2 -std=c++17 main.cc -o classify -I$P/tvm_ffi/include -L$P/tvm_ffi/lib -ltvm_ffi -L$P/tvm/lib \
     -Wl,--no-as-needed -ltvm_runtime -Wl,-rpath,$P/tvm_ffi/lib:$P/tvm/lib
   ./classify job/deploy job/inputs.npy

   It needs the two libraries of the packages apache-tvm-ffi and apache-tvm, and nothing of Python. */

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

constexpr DLDevice kCpu{kDLCPU, 0};
constexpr int kPooledAllocator = 2;
constexpr int64_t kFormatVersion = 3, kAlignment = 64, kMostThreads = 4096;

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + " cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

void Require(bool right, const std::string& problem) {
  if (!right) throw std::runtime_error(problem);
}

// A file in memory: a page is read when it is used, and processes share it.
char* Map(const std::string& path, int64_t size) {
  int file = open(path.c_str(), O_RDONLY);
  struct stat status;
  if (file < 0 || fstat(file, &status) < 0) throw std::runtime_error(path + " cannot be read");
  Require(status.st_size == size, path + " is damaged: it has another size than deploy.json says");
  void* data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  if (data == MAP_FAILED) throw std::runtime_error(path + " cannot be mapped");
  return static_cast<char*>(data);
}

// lib.so or weights.bin of a build: while a library is being replaced, the new files lie under other names.
std::string Locate(const std::string& folder, const std::string& build, const std::string& name) {
  const std::string pending = folder + "." + build + "." + name;
  return access(pending.c_str(), R_OK) == 0 ? pending : folder + name;
}

// A tensor over memory that somebody else keeps.
struct Borrowed {
  void* data;
  void AllocData(DLTensor* tensor) { tensor->data = data; }
  void FreeData(DLTensor*) {}
};

ffi::Tensor View(void* data, ffi::Shape shape, DLDataType type) {
  return ffi::Tensor::FromNDAlloc(Borrowed{data}, shape, type, kCpu);
}

ffi::Function Get(const ffi::Module& module, const char* name) { return module->GetFunction(name, true).value(); }

int main(int argc, char** argv) try {
  if (argc != 3) throw std::runtime_error("usage: classify FOLDER PICTURES.npy");
  const std::string folder = std::string(argv[1]) + "/";
  auto info = ffi::json::Parse(ReadFile(folder + "deploy.json")).cast<ffi::json::Object>();
  auto shape_of = [&](const char* tensor) {
    std::vector<int64_t> shape;
    auto sizes = info[ffi::String(tensor)].cast<ffi::json::Object>()[ffi::String("shape")].cast<ffi::json::Array>();
    for (const ffi::Any& size : sizes) shape.push_back(size.cast<int64_t>());
    return shape;
  };
  auto field = [&](const char* name) { return info[ffi::String(name)]; };
  Require(field("format_version").cast<int64_t>() == kFormatVersion, "deploy.json has another format version");
  const std::string build = field("build_id").cast<ffi::String>();
  Require(build.size() == 32, "deploy.json has no build id");
  auto bytes_of = [&](const char* name) {
    auto files = field("files").cast<ffi::json::Object>()[ffi::String(name)].cast<ffi::json::Object>();
    return files[ffi::String("bytes")].cast<int64_t>();
  };
  const int64_t threads = field("threads").cast<int64_t>();
  Require(threads >= 1 && threads <= kMostThreads, "deploy.json asks for an impossible number of threads");
  setenv("TVM_NUM_THREADS", std::to_string(threads).c_str(), 1);
  setenv("TVM_BIND_THREADS", "0", 0);  // TVM would move this thread to other processors, even to forbidden ones

  const std::string code = Locate(folder, build, "lib.so");
  Require(static_cast<int64_t>(ReadFile(code).size()) == bytes_of("lib.so"), code + " is damaged: another size");
  const int64_t size = bytes_of("weights.bin");
  char* data = Map(Locate(folder, build, "weights.bin"), size);
  Require(size >= kAlignment && std::string(data + 32, 32) == build, "weights.bin is of another build");
  std::vector<ffi::Any> words{ffi::String("main"), ffi::String("network"), true};
  int64_t last = kAlignment;
  for (const ffi::Any& row : field("weights").cast<ffi::json::Array>()) {
    auto place = row.cast<ffi::json::Array>();
    Require(place.size() == 3, "deploy.json: a row of weights is not (type, start, end)");
    const DLDataType type = ffi::StringToDLDataType(place[0].cast<ffi::String>());
    const int64_t start = place[1].cast<int64_t>(), end = place[2].cast<int64_t>();
    Require(last <= start && start <= end && end <= size && start % kAlignment == 0 && type.bits >= 8 &&
                (end - start) % (type.bits / 8) == 0,
            "deploy.json: weights lie outside of weights.bin, or in each other");
    words.push_back(View(data + start, {(end - start) * 8 / type.bits}, type));
    last = end;
  }

  ffi::Module machine = Get(ffi::Module::LoadFromFile(code), "vm_load_executable")().cast<ffi::Module>();
  Get(machine, "vm_initialization")(static_cast<int>(kDLCPU), 0, kPooledAllocator);

  // main(images, weights...) becomes network(images).
  std::vector<ffi::AnyView> arguments(words.begin(), words.end());
  ffi::Any nothing;
  Get(machine, "save_function").CallPacked(arguments.data(), arguments.size(), &nothing);
  ffi::Function network = Get(machine, "network");

  const std::vector<int64_t> shape = shape_of("input");
  Require(!shape.empty() && *std::min_element(shape.begin(), shape.end()) > 0, "deploy.json: sizes must be positive");
  const size_t floats = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  const std::string file = ReadFile(argv[2]);
  if (file.compare(0, 8, std::string("\x93NUMPY\1\0", 8))) throw std::runtime_error("the pictures are no .npy file");
  const size_t header = 10 + static_cast<uint8_t>(file[8]) + 256 * static_cast<uint8_t>(file[9]);
  if (file.find("'<f4'") > header) throw std::runtime_error("the pictures are no float32");
  if ((file.size() - header) / 4 < floats) throw std::runtime_error("the file holds less than one batch");

  for (size_t at = header; at + 4 * floats <= file.size(); at += 4 * floats) {
    void* images = std::aligned_alloc(64, (4 * floats + 63) / 64 * 64);
    std::copy_n(file.data() + at, 4 * floats, static_cast<char*>(images));
    ffi::Any made = network(View(images, ffi::Shape(shape), DLDataType{kDLFloat, 32, 1}));
    auto alone = made.as<ffi::Tensor>();  // several outputs come as an array, of which the first one counts here
    ffi::Tensor logits = alone ? *alone : made.cast<ffi::Array<ffi::Tensor>>()[0];
    std::free(images);
    const int64_t classes = logits.numel() / shape[0];
    for (int64_t picture = 0; picture < shape[0]; ++picture) {
      const float* row = static_cast<const float*>(logits.data_ptr()) + picture * classes;
      std::vector<int64_t> order(classes);
      std::iota(order.begin(), order.end(), 0);
      const auto best = order.begin() + std::min<int64_t>(5, classes);
      std::partial_sort(order.begin(), best, order.end(), [&](int64_t a, int64_t b) { return row[a] > row[b]; });
      for (auto i = order.begin(); i < best; ++i) std::cout << *i << " " << row[*i] << (i + 1 < best ? "  " : "\n");
    }
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << "classify: " << error.what() << "\n";
  return 1;
}
