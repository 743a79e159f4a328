// Runs an AOTInductor package that calls ops of sparseattn, in a process without Python.
//
//   ./build.sh TORCH_DIR runner          TORCH_DIR holds include/ and lib/: libtorch, or the wheel's torch/
//   ./runner libsparseattn_ops.so model.pt2 inputs.pt outputs.pt [REPEATS]
//
// libsparseattn_ops.so comes from sparseattn.export.build_library, model.pt2 from sparseattn.export.aoti. inputs.pt is a
// tuple of tensors written by torch.save; outputs.pt is one for torch.load. run.py in this folder makes all of them, runs
// this program and compares its output with Python's.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>

namespace {

std::vector<at::Tensor> read_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const c10::IValue values = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& value : values.toTupleRef().elements()) tensors.push_back(value.toTensor());
  return tensors;
}

void write_tensors(const std::string& path, const std::vector<at::Tensor>& tensors) {
  const std::vector<c10::IValue> values(tensors.begin(), tensors.end());
  const std::vector<char> bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(values));
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), (std::streamsize)bytes.size());
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

// Loading the library registers its ops, so it comes before the package, which looks them up.
void load_ops(const char* path) {
  if (!dlopen(path, RTLD_NOW)) throw std::runtime_error(dlerror());
}

void print(const std::vector<at::Tensor>& outputs) {
  for (const at::Tensor& output : outputs) {
    const at::Tensor flat = output.to(at::kDouble).flatten();
    std::cout << "output " << output.sizes() << " sum " << flat.sum().item<double>() << " first";
    for (int64_t i = 0; i < std::min<int64_t>(4, flat.numel()); ++i) std::cout << ' ' << flat[i].item<double>();
    std::cout << '\n';
  }
}

void run(char** arguments, int repeats) {
  load_ops(arguments[1]);
  torch::inductor::AOTIModelPackageLoader model(arguments[2]);
  const std::vector<at::Tensor> inputs = read_tensors(arguments[3]);
  const std::vector<at::Tensor> outputs = model.run(inputs);
  print(outputs);
  write_tensors(arguments[4], outputs);
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    model.run(inputs);
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  if (repeats) std::cout << "median of " << repeats << " runs: " << times[times.size() / 2] << " ms\n";
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 5) {
    std::cerr << "usage: " << arguments[0] << " LIBRARY PACKAGE INPUTS OUTPUTS [REPEATS]\n";
    return 2;
  }
  try {
    run(arguments, count > 5 ? std::atoi(arguments[5]) : 0);
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
