// Row and column sums: rows of up to 512 numbers that stay in shared memory. See stats_sm90.cuh.
#include "stats_sm90.cuh"
#include "resident_sm90.cuh"

namespace gapkernels {

const char* similarity_stats_resident(const StatsArguments& arguments, void* stream) {
  return run<Resident, kTile>(arguments, stream);
}

}  // namespace gapkernels
