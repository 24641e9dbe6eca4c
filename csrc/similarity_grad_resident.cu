// A block of the gradient: rows of up to 512 numbers that stay in shared memory. See grad_sm90.cuh.
#include "grad_sm90.cuh"
#include "resident_sm90.cuh"

namespace gapkernels {

const char* similarity_grad_resident(const GradArguments& arguments, void* stream) {
  return run<Resident, kTile>(arguments, stream);
}

}  // namespace gapkernels
