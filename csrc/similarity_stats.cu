// Row and column sums: both operands of a tile copied for every tile, for rows of any length. See stats_sm90.cuh.
#include "stats_sm90.cuh"
#include "streamed_sm90.cuh"

namespace gapkernels {

const char* similarity_stats(const StatsArguments& arguments, void* stream) {
  switch (arguments.variant) {
    case Variant::kResident: return similarity_stats_resident(arguments, stream);
    case Variant::kWide: return similarity_stats_wide(arguments, stream);
    default: return run<Streamed, kTile>(arguments, stream);
  }
}

}  // namespace gapkernels
