// What the files of the CUDA glue share.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "checks.h"

namespace levelset::glue {

using torch::stable::accelerator::DeviceGuard;

// The stream that torch uses on the device of `t`.
cudaStream_t current_stream(const Tensor& t);

// Throws, naming the op, unless a launch went well.
void check_launch(cudaError_t error, const char* op);

}  // namespace levelset::glue
