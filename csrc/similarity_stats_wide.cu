// Row and column sums: tiles twice as wide, for rows of any length, meant for those that are too long to stay. See
// stats_sm90.cuh.
#include "stats_sm90.cuh"
#include "streamed_sm90.cuh"

namespace gapkernels {

const char* similarity_stats_wide(const StatsArguments& arguments, void* stream) {
  return run<Streamed, kWideTile>(arguments, stream);
}

}  // namespace gapkernels
