// Launchers of planted_bugs.cu, by name.
#pragma once

#include <cuda_runtime.h>

namespace planted_bugs {

constexpr int n = 64;  // threads of the block and values in x and out

struct Bug {
  const char* name;
  void (*kernel)(const float* x, float* out);
  size_t shared_bytes;
  // Without sanitizers: a part of the message with which the emulator ends the process. Empty: the
  // numbers are wrong in at least one order. Null: not noticed.
  const char* message;
  // A part of the message of the sanitizer that stops the kernel first, or null.
  const char* sanitizer_message;
};

extern const Bug bugs[];
extern const int n_bugs;

}  // namespace planted_bugs
