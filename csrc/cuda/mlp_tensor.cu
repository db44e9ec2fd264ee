// The fused kernel on tensor cores, in a file of its own so that the two compile side by side.
#include "mlp_tiles.cuh"

namespace levelset::cuda {

MlpKernel mlp_tensor_kernel(int width) { return kernel_of<MlpProduct::kTensor>(width); }

MlpKernel mlp_coarse_kernel(int width) { return kernel_of<MlpProduct::kCoarse>(width); }

}  // namespace levelset::cuda
