// Activations of one number with their slopes. The CPU has the same formulas in vectors.
#pragma once

#include <math.h>

#include "mlp_net.h"
#include "portability.h"

namespace levelset {

LEVELSET_HD void sine_and_cosine(double x, double& sine, double& cosine) {
  sine = sin(x);
  cosine = cos(x);
}

// To about an ulp for |x| up to 1e9; beyond, where the next float32 number is many turns away, it
// is some number from -1 to 1. The device's own sine keeps an array for such numbers, and with it
// every kernel that may call it.
LEVELSET_HD void sine_and_cosine(float x, float& sine, float& cosine) {
  float r;
  int quarter;
  if (x > -8192.0f && x < 8192.0f) {
    // Cody and Waite: pi / 2 in three parts, so short that n times the first two is exact.
    const float n = rintf(x * 0.636619772f);
    r = ((x - n * 1.5703125f) - n * 4.83751297e-4f) - n * 7.54978943e-8f;
    quarter = int(n);
  } else {
    const double n = rint(double(x) * 0.63661977236758134308);
    double rest = double(x) - n * 1.57079632679489655800;
    rest -= n * 6.12323399573676603587e-17;
    r = float(rest > 0.8 ? 0.8 : (rest < -0.8 ? -0.8 : rest));  // NaN stays
    const double turns = n - 4.0 * floor(0.25 * n);
    quarter = turns > 0.0 && turns < 4.0 ? int(turns) : 0;
  }
  const float t = r * r;
  float s = -1.0f / 39916800;
  s = s * t + 1.0f / 362880;
  s = s * t - 1.0f / 5040;
  s = s * t + 1.0f / 120;
  s = s * t - 1.0f / 6;
  s = s * t * r + r;
  float c = 1.0f / 479001600;
  c = c * t - 1.0f / 3628800;
  c = c * t + 1.0f / 40320;
  c = c * t - 1.0f / 720;
  c = c * t + 1.0f / 24;
  c = c * t - 0.5f;
  c = c * t + 1.0f;
  const float a = quarter & 1 ? c : s, b = quarter & 1 ? s : c;
  sine = quarter & 2 ? -a : a;
  cosine = (quarter + 1) & 2 ? -b : b;
}

// z becomes a(z), and slope a'(z). NaN stays NaN.
template <typename A>
LEVELSET_HD void activate(Activation activation, A sharpness, A threshold, A& z, A& slope) {
  const A t = z * sharpness;
  slope = A(1);
  switch (activation) {
    case Activation::kNone: return;
    case Activation::kRelu:
      z = z < A(0) ? A(0) : z;
      slope = z <= A(0) ? A(0) : A(1);
      return;
    case Activation::kSilu: {
      const A sigmoid = A(1) / (A(1) + exp(-t));
      slope = sigmoid * (A(1) + t * (A(1) - sigmoid));
      z = z * sigmoid;
      return;
    }
    case Activation::kSoftplus: {
      if (t > threshold) return;
      const A u = exp(t > A(0) ? -t : t);
      slope = (t > A(0) ? A(1) : u) / (A(1) + u);
      z = ((t > A(0) ? t : t - t) + log1p(u)) / sharpness;  // t - t keeps a NaN
      return;
    }
    case Activation::kSine:
      sine_and_cosine(t, z, slope);
      slope *= sharpness;
      return;
    case Activation::kTanh:
      z = tanh(z);
      slope = A(1) - z * z;
      return;
  }
}

}  // namespace levelset
