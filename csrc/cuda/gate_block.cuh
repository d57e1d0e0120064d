// A block's rows: what their tokens say, and the row in shared memory that adds up what they count.
#pragma once
#include "gate_count.cuh"
#include "gate_layout.h"

namespace moe_route::cuda {
namespace {

struct Token {
  int32_t steering_row = -1;
  int32_t group = 0;
  int32_t segment = -1;
  int32_t valid = 1;
};

// One load where the table's address allows it; `kWhole`: it does.
template <bool kWhole = false>
__device__ __forceinline__ Token read_token(const GateLaunch& launch, int64_t t) {
  Token token;
  const int32_t* table = launch.args.token_table;
  if (table == nullptr) return token;
  const int32_t* row = table + t * kTokenColumns;
  if (kWhole || launch.layout.whole_tokens) {
    const int4 columns = __ldg(reinterpret_cast<const int4*>(row));
    token.steering_row = columns.x, token.group = columns.y, token.segment = columns.z;
    token.valid = columns.w;
    return token;
  }
  token.steering_row = __ldg(row + kTokenSteeringRow);
  token.group = __ldg(row + kTokenGroup);
  token.segment = __ldg(row + kTokenSegment);
  token.valid = __ldg(row + kTokenValid);
  return token;
}

// The place of the first token of [begin, end) that counts; every warp finds it for itself.
__device__ __forceinline__ Place first_place(const GateLaunch& launch, int64_t begin, int64_t end) {
  const GateArgs& args = launch.args;
  Place place;
  if (args.token_table == nullptr) return place_of(launch.layout, Token{}.group, Token{}.segment);
  for (int64_t first = begin; first < end; first += kLanes) {
    Token token;
    const int64_t t = first + lane();
    if (t < end) token = read_token(launch, t);
    const bool valid = t < end && token.valid != 0;
    if (valid) place = place_of(launch.layout, token.group, token.segment);
    const unsigned counted = ballot(valid && place.counted());
    if (counted == 0) continue;
    const int source = __ffs(static_cast<int>(counted)) - 1;
    place.group = from_lane(place.group, source);
    place.segment = from_lane(place.segment, source);
    return place;
  }
  return Place{};
}

struct RowRange {
  int64_t begin, end;
};
__device__ __forceinline__ RowRange rows_of_block(const GateLaunch& launch) {
  const int64_t begin = int64_t{blockIdx.x} * launch.rows_per_block, last = begin + launch.rows_per_block;
  return {begin, last < launch.args.tokens ? last : launch.args.tokens};
}

// Clears the block's row in shared memory, if it has one, and says what place it is for.
__device__ __forceinline__ Place begin_block(const GateLaunch& launch, const RowRange& range) {
  if (launch.layout.block_row == 0) return Place{};
  const Place place = first_place(launch, range.begin, range.end);
  for (int i = lane(); i < launch.layout.statistics_width; i += kLanes)
    reinterpret_cast<Sum*>(moe_route_shared)[i] = 0;
  __syncwarp();
  return place;
}

// Adds the block's row to the tables.
__device__ __forceinline__ void end_block(const GateLaunch& launch, const Place& place) {
  if (launch.layout.block_row == 0 || !place.counted()) return;
  const Sum* const row = reinterpret_cast<const Sum*>(moe_route_shared);
  const int width = launch.layout.statistics_width;
  const TableRows rows(launch.args.statistics, place, width);
  __syncwarp();
  for (int i = lane(); i < width; i += kLanes) {
    if (row[i] != 0) rows.add(i, row[i]);
  }
}

}  // namespace
}  // namespace moe_route::cuda
