// A block of the gradient: both operands of a tile copied for every tile, for rows of any length. See grad_sm90.cuh.
#include "grad_sm90.cuh"
#include "streamed_sm90.cuh"

namespace gapkernels {

const char* similarity_grad(const GradArguments& arguments, void* stream) {
  return arguments.resident ? similarity_grad_resident(arguments, stream) : run<Streamed>(arguments, stream);
}

}  // namespace gapkernels
