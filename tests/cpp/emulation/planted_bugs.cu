// One bug per kernel. self_test.cpp runs each in a process of its own and wants to see it fail.
// Apart from the bug, every kernel computes out[i] = x[i] + x[(i + 1) % n].
#include "planted_bugs.h"

namespace planted_bugs {

extern __shared__ __align__(16) unsigned char bug_shared[];

namespace {

constexpr unsigned all_lanes = 0xffffffffu;

__device__ int self() { return static_cast<int>(threadIdx.x); }
__device__ int next() { return (self() + 1) % n; }

// A helper that gets a pointer: no bounds are left in its type.
__device__ void store(float* to, int i, float value) { to[i] = value; }
__device__ float load(const float* from, int i) { return from[i]; }

// Threads that run in ascending order have not written what their neighbour reads ...
__global__ void missing_barrier_forward(const float* x, float* out) {
  __shared__ float tile[n];
  tile[self()] = x[self()];
  out[self()] = x[self()] + (self() + 1 < n ? tile[self() + 1] : x[0]);
}

// ... and the same in descending order.
__global__ void missing_barrier_reverse(const float* x, float* out) {
  __shared__ float tile[n];
  tile[self()] = x[next()];
  out[self()] = self() > 0 ? tile[self() - 1] + x[next()] : x[0] + x[1];
}

// Relies on atomics happening in the order of the threads, up or down.
__global__ void ordered_atomics(const float* x, float* out) {
  __shared__ int ticket;
  if (self() == 0) ticket = 0;
  __syncthreads();
  const int mine = atomicAdd(&ticket, 1);
  out[self()] = mine == self() || mine == n - 1 - self() ? x[self()] + x[next()] : 0.0f;
}

// The second round overwrites what slower threads have not read yet.
__global__ void missing_second_barrier(const float* x, float* out) {
  __shared__ float tile[n];
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    tile[self()] = round == 0 ? 0.0f : x[self()];
    __syncthreads();
    sum += tile[self()] + tile[next()];
  }
  out[self()] = sum;
}

// Every thread comes to one barrier, but not to the same one.
__global__ void barrier_at_two_places(const float* x, float* out) {
  __shared__ float tile[n];
  tile[self()] = x[self()];
  if (self() % 32 == 31)
    __syncthreads();
  else
    __syncthreads();
  out[self()] = tile[self()] + tile[next()];
}

// Takes it that shared memory starts as zero.
__global__ void unset_shared(const float* x, float* out) {
  __shared__ float sum[n];
  sum[self()] += x[self()];
  out[self()] = sum[self()] + x[next()];
}

__global__ void divergent_barrier(const float* x, float* out) {
  __shared__ float tile[n];
  tile[self()] = x[self()];
  if (self() < n / 2) {
    __syncthreads();
    out[self()] = tile[self()] + tile[next()];
  } else {
    out[self()] = x[self()] + x[next()];
    __syncthreads();
  }
}

__global__ void barrier_or_shuffle(const float* x, float* out) {
  float other = x[next()];
  if (self() % 2 == 0)
    __syncthreads();
  else
    other = __shfl_sync(all_lanes, other, self() % 32);
  out[self()] = x[self()] + other;
}

__global__ void shuffle_with_exited_lane(const float* x, float* out) {
  out[self()] = x[self()] + x[next()];
  if (self() % 32 >= 30) return;
  out[self()] += 0.0f * __shfl_down_sync(all_lanes, x[self()], 1);
}

__global__ void ballot_in_a_branch(const float* x, float* out) {
  if (self() % 2 == 0 && __ballot_sync(all_lanes, 1) == 0) return;
  out[self()] = x[self()] + x[next()];
}

__global__ void shuffle_without_caller(const float* x, float* out) {
  const float other = __shfl_sync(0x0000ffffu, x[next()], self() % 16);
  out[self()] = x[self()] + (self() % 32 < 16 ? other : x[next()]);
}

__global__ void different_masks(const float* x, float* out) {
  const unsigned mask = self() % 32 < 16 ? all_lanes : 0xffff0000u | (self() % 32 == 16 ? 1u : 0u);
  const float other = __shfl_sync(mask, x[next()], self() % 32);
  out[self()] = x[self()] + other;
}

__global__ void shuffle_or_ballot(const float* x, float* out) {
  float other = x[next()];
  if (self() % 32 < 16)
    other = __shfl_sync(all_lanes, other, self() % 32);
  else
    other += __ballot_sync(all_lanes, 0) == 0 ? 0.0f : 1.0f;
  out[self()] = x[self()] + other;
}

__global__ void any_or_all(const float* x, float* out) {
  const bool yes = self() % 32 < 16 ? __any_sync(all_lanes, 1) != 0 : __all_sync(all_lanes, 1) != 0;
  out[self()] = yes ? x[self()] + x[next()] : 0.0f;
}

// Reads from a lane outside of the mask.
__global__ void shuffle_from_outside(const float* x, float* out) {
  const unsigned mask = self() % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  const float following = __shfl_down_sync(mask, x[self()], 1);
  out[self()] = x[self()] + (self() % 32 == 31 ? x[next()] : following);
}

__global__ void waits_for_another_block(const float* x, float* out) {
  __shared__ int never;
  if (self() == 0) never = 0;
  __syncthreads();
  while (atomicAdd(&never, 0) == 0) {
  }
  out[self()] = x[self()] + x[next()];
}

__global__ void trap(const float* x, float* out) {
  out[self()] = x[self()] + x[next()];
  if (self() == n - 1) __trap();
}

__global__ void static_shared_write(const float* x, float* out) {
  __shared__ float tile[n];
  store(tile, self() + 1, x[self()]);
  __syncthreads();
  out[self()] = x[self()] + x[next()];
}

__global__ void static_shared_read(const float* x, float* out) {
  __shared__ float tile[n];
  tile[self()] = x[self()];
  __syncthreads();
  const float beyond = load(tile, self() + 1);
  out[self()] = x[self()] + (self() + 1 < n ? beyond : x[next()]);
}

__global__ void static_shared_index(const float* x, float* out) {
  __shared__ float tile[2][n / 2];
  tile[0][self()] = x[self()];  // stays inside of the array as a whole
  __syncthreads();
  out[self()] = tile[0][self()] + tile[0][next()];
}

__global__ void dynamic_shared_write(const float* x, float* out) {
  float* tile = reinterpret_cast<float*>(bug_shared);
  tile[self() + 1] = x[self()];
  __syncthreads();
  out[self()] = x[self()] + x[next()];
}

__global__ void dynamic_shared_read(const float* x, float* out) {
  float* tile = reinterpret_cast<float*>(bug_shared);
  tile[self()] = x[self()];
  __syncthreads();
  const float beyond = tile[self() + 1];
  out[self()] = x[self()] + (self() + 1 < n ? beyond : x[next()]);
}

__global__ void global_write(const float* x, float* out) {
  out[self()] = x[self()] + x[next()];
  if (self() == n - 1) out[self() + 1] = 0.0f;
}

__global__ void global_read(const float* x, float* out) {
  const float following = x[self() + 1];
  out[self()] = x[self()] + (self() + 1 < n ? following : x[next()]);
}

__global__ void misaligned_vector(const float* x, float* out) {
  const float2 pair = *reinterpret_cast<const float2*>(x + (self() + 1 < n ? self() : 0));
  out[self()] = self() + 1 < n ? pair.x + pair.y : x[self()] + x[next()];
}

}  // namespace

constexpr size_t bytes = n * sizeof(float);
constexpr const char* overrun = "wrote past the end of shared array";
constexpr const char* asan = "AddressSanitizer";
constexpr const char* ubsan = "runtime error";
const Bug bugs[] = {
    {"missing barrier, forward", missing_barrier_forward, 0, "", nullptr},
    {"missing barrier, reverse", missing_barrier_reverse, 0, "", nullptr},
    {"order of atomics", ordered_atomics, 0, "", nullptr},
    {"missing second barrier", missing_second_barrier, 0, "", nullptr},
    {"shared memory nobody wrote", unset_shared, 0, "", nullptr},
    {"shuffle from outside of the mask", shuffle_from_outside, 0, "", nullptr},
    {"divergent barrier", divergent_barrier, 0, "divergent barrier", nullptr},
    {"barrier at two places", barrier_at_two_places, 0, "divergent barrier", nullptr},
    {"barrier against shuffle", barrier_or_shuffle, 0, "deadlock", nullptr},
    {"shuffle against ballot", shuffle_or_ballot, 0, "deadlock", nullptr},
    {"any against all", any_or_all, 0, "deadlock", nullptr},
    {"different masks", different_masks, 0, "deadlock", nullptr},
    {"shuffle with exited lane", shuffle_with_exited_lane, 0, "exited", nullptr},
    {"ballot in a branch", ballot_in_a_branch, 0, "exited", nullptr},
    {"mask without the caller", shuffle_without_caller, 0, "does not name the calling lane",
     nullptr},
    {"spinning for ever", waits_for_another_block, 0, "livelock", nullptr},
    {"trap", trap, 0, "__trap", nullptr},
    {"static shared write out of bounds", static_shared_write, 0, overrun, asan},
    {"static shared read out of bounds", static_shared_read, 0, nullptr, asan},
    {"index out of a row of a shared array", static_shared_index, 0, nullptr, ubsan},
    {"dynamic shared write out of bounds", dynamic_shared_write, bytes, overrun, asan},
    {"dynamic shared read out of bounds", dynamic_shared_read, bytes, nullptr, asan},
    {"global write out of bounds", global_write, 0, nullptr, asan},
    {"global read out of bounds", global_read, 0, nullptr, asan},
    {"misaligned float2", misaligned_vector, 0, nullptr, ubsan},
};
const int n_bugs = sizeof(bugs) / sizeof(bugs[0]);

}  // namespace planted_bugs
