// A block of the gradient: both operands of a tile copied for every tile, for rows of any length. See grad_sm90.cuh.
#include "grad_sm90.cuh"
#include "streamed_sm90.cuh"

namespace gapkernels {

const char* similarity_grad(const GradArguments& arguments, void* stream) {
  switch (arguments.variant) {
    case Variant::kResident: return similarity_grad_resident(arguments, stream);
    case Variant::kWide: return similarity_grad_wide(arguments, stream);
    default: return run<Streamed, kTile>(arguments, stream);
  }
}

}  // namespace gapkernels
