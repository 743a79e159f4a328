#!/bin/sh
# Build the runner with g++, or what CXX names, and nothing else: no network, no Python, no CMake.
# build.sh TORCH_DIR OUTPUT, where TORCH_DIR holds include/ and lib/.
set -eu
torch=$1 output=$2
here=$(dirname "$0")
${CXX:-g++} -std=c++20 "$here/main.cpp" -o "$output" \
  -I"$torch/include" -L"$torch/lib" -Wl,-rpath,"$torch/lib" -ltorch_cpu -lc10 -ldl
