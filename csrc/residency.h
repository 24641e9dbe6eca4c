// Who waits for whom where rows stay in shared memory (resident_sm90.cuh): the order of copies, products and arrivals at
// barriers. Plain C++ with the operations left to the caller: copies and tensor cores on a device, and on the CPU a test
// that runs blocks and consumers in every order it can think of.
//
//     panel    ⌈D/64⌉ blocks of 128 rows and 64 columns of an operand, copied once for all tiles of these rows
//     ring     column tiles, 64 deep at a time, in as many places as the panel leaves room for
//
//     kColFull[r]    own copies announced, and all bytes of every block's part arrived          → products
//     kColEmpty[r]   the four warps of the consumer that read it, in every block of the cluster → the next copy
//     kRowFull[k]    the block's bytes arrived                                                  → products
//     kRowEmpty[k]   eight arrivals: four warps each in the last two tiles of the panel, which the two consumers
//                    multiply; the last tile arrives twice where it is the only one             → the next panel's block
//
// The last tile alone may not free a block: when its products of a block are complete, those of the tile before it, by
// the other consumer, may have a step left. A consumer that has no tile of a panel never waits for it and never frees it;
// the other consumer, whose turn comes before its own, has seen that panel arrive.
#pragma once

#include "handoff.h"

namespace gapkernels {

enum class Barrier { kRowFull, kRowEmpty, kColFull, kColEmpty };

// How often each warp of a consumer arrives at a block's kRowEmpty with this tile.
GAPKERNELS_HOST_DEVICE int row_arrivals(const Item& tile) {
  if (tile.left == 1) return tile.first ? kConsumers : 1;
  return tile.left == kConsumers ? 1 : 0;
}

// Copies of one tile: its panel, if it is the first of it, and its columns.
template <class Operations>
GAPKERNELS_HOST_DEVICE void load_tile(const Item& tile, int steps, int places, Place& place, Operations& operations) {
#pragma unroll 1
  for (int k = 0; k < steps; ++k) {
    if (tile.first) {
      operations.wait(Barrier::kRowEmpty, k, (tile.panel & 1) ^ 1);
      operations.copy_rows(k);
    }
    operations.wait(Barrier::kColEmpty, place.index, place.phase ^ 1);
    operations.copy_cols(k, place.index);
    place.advance(1, places);
  }
}

// After the last tile: no block leaves while another of its cluster may still arrive at its barriers.
template <class Operations>
GAPKERNELS_HOST_DEVICE void drain(int places, Place place, Operations& operations) {
#pragma unroll 1
  for (int r = 0; r < places; ++r) {
    operations.wait(Barrier::kColEmpty, place.index, place.phase ^ 1);
    place.advance(1, places);
  }
}

// Products of one tile, one step behind of which the last complete one is given back.
template <class Operations>
GAPKERNELS_HOST_DEVICE void multiply_tile(const Item& tile, int steps, int places, Place& place,
                                          Operations& operations) {
  const uint32_t panel_phase = tile.panel & 1;
  const int arrivals = row_arrivals(tile);
  operations.wait(Barrier::kRowFull, 0, panel_phase);
  operations.wait(Barrier::kColFull, place.index, place.phase);
  operations.first_step(place.index);
  int before = place.index;
#pragma unroll 1
  for (int k = 1; k < steps; ++k) {
    place.advance(1, places);
    operations.wait(Barrier::kRowFull, k, panel_phase);
    operations.wait(Barrier::kColFull, place.index, place.phase);
    operations.step(k, place.index);  // returns when the step before is complete
    operations.release(k - 1, before, arrivals);
    before = place.index;
  }
  place.advance(1, places);
  operations.hand_over();  // the other consumer may multiply
  operations.complete();
  operations.release(steps - 1, before, arrivals);
}

}  // namespace gapkernels
