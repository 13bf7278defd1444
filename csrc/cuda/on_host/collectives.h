// What the last lane to arrive at a warp collective computes for all 32: shuffles, ldmatrix and mma.
#pragma once

#include "cuda_on_host.h"

namespace vicinal::on_host {

const char* name_of(Op op);
void shuffle_lanes(unsigned lanes, void* const* args);
int distribute_matrices(void* const* args);  // returns the shared-memory bank conflicts of the row addresses
void multiply_tiles(Op op, void* const* args);

}  // namespace vicinal::on_host
