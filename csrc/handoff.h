// How consumers learn which tile is next and what its entries need besides products: a warp of the producer's group
// walks for them and leaves it in one of two places, up to two tiles ahead. Plain C++ with the operations left to the
// caller, as residency.h: barriers and device memory on a device, and on the CPU a test that runs everyone in random
// order.
//
//     warp        … ready[0] ─► ready[1] ─► wait free[0] ─► ready[0] …
//     consumers       wait ready[0] ─► free[0] ─► wait ready[1] ─► free[1] …
//
// A team is one consumer, or two that share a tile: then a place is free when both have said so. Neither gets further
// ahead of the other than the places go round, so no phase of a barrier passes the other by.
#pragma once

#include "tiles.h"

namespace gapkernels {

constexpr int kPlaces = 2;  // of what is prepared for a team
constexpr int kStepsBehind = 2;

// Of the second of two that share a tile: the step of the tile whose operands it waits for before the first. See
// streamed_sm90.cuh.
GAPKERNELS_HOST_DEVICE int step_to_wait_for(int steps) { return steps > kStepsBehind ? kStepsBehind : steps - 1; }

// A place in a ring, and how often it went round, modulo two.
struct Place {
  int index = 0;
  uint32_t phase = 0;

  GAPKERNELS_HOST_DEVICE void advance(int by, int length) {
    index += by;
    while (index >= length) {
      index -= length;
      phase ^= 1;
    }
  }
};

// Prepares every tile of one of `teams`.
template <class Walk, class Operations>
GAPKERNELS_HOST_DEVICE void prepare_tiles(Walk& walk, int team, int teams, Operations& operations) {
  Place place;
#pragma unroll 1
  for (int i = 0; i < team && walk.valid(); ++i) walk.advance();
#pragma unroll 1
  while (walk.valid()) {
    const Item tile = operations.own(walk.item());
    const auto fetched = operations.fetch(tile);
    operations.wait_free(place.index, place.phase ^ 1);
    operations.prepare(place.index, tile, fetched);
    operations.ready(place.index);
    place.advance(1, kPlaces);
#pragma unroll 1
    for (int i = 0; i < teams && walk.valid(); ++i) walk.advance();
  }
  operations.wait_free(place.index, place.phase ^ 1);
  operations.prepare_end(place.index);
  operations.ready(place.index);
}

// Takes every tile that is prepared. `compute` gives the place back, and returns false at the end.
template <class Operations>
GAPKERNELS_HOST_DEVICE void take_tiles(Operations& operations) {
#pragma unroll 1
  for (Place place;; place.advance(1, kPlaces)) {
    operations.wait_ready(place.index, place.phase);
    if (!operations.compute(place.index)) return;
  }
}

}  // namespace gapkernels
