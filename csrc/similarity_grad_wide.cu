// A block of the gradient: tiles twice as wide, for rows of any length, meant for those that are too long to stay. See
// grad_sm90.cuh.
#include "grad_sm90.cuh"
#include "streamed_sm90.cuh"

namespace gapkernels {

const char* similarity_grad_wide(const GradArguments& arguments, void* stream) {
  return run<Streamed, kWideTile>(arguments, stream);
}

}  // namespace gapkernels
