// Activations and memory access of the gated residual kernels, in the subset of the Metal Shading Language that is also
// CUDA C++ (see ../cuda/prelude.cuh). All arithmetic is in float. An activation is a struct with
//
//   phi(z, c, slope)     returns phi(z), writes phi'(z) to slope
//   selection(z)         returns rho(z) with phi(z) = z rho(z), or 0 if phi is not self-gated
//   up(u, c, slope)      returns the factor that multiplies phi(z), writes its derivative in u to slope
//
// c holds the activation's four constants. Comparisons are written so that NaN propagates wherever it does in MLX.

#if !defined(FUNCTION)  // prelude.cuh defines it for CUDA
#define FUNCTION inline
#define UNROLL _Pragma("clang loop unroll(full)")
#endif

// sigmoid(z) without overflow, accurate to a few ulp for every z.
FUNCTION float sigmoid(float z) {
  const float e = metal::precise::exp(-metal::abs(z));
  const float p = 1.0f / (1.0f + e);
  return z >= 0.0f ? p : e * p;
}

FUNCTION float at_most(float x, float limit) {
  return x > limit ? limit : x;
}

FUNCTION float clamped(float x, float limit) {
  return x < -limit ? -limit : at_most(x, limit);
}

// Members shared by several activations. They are macros because Metal has no derived classes.

// The up branch unchanged.
#define PLAIN_UP                                                                    \
  FUNCTION static float up(float u, thread const float* c, thread float& slope) {   \
    slope = 1.0f;                                                                   \
    return u;                                                                       \
  }

// The up branch clamped to [-c[LIMIT], c[LIMIT]], plus an offset.
#define CLAMPED_UP(LIMIT, OFFSET)                                                   \
  FUNCTION static float up(float u, thread const float* c, thread float& slope) {   \
    slope = u > -c[LIMIT] && u < c[LIMIT] ? 1.0f : 0.0f;                            \
    return clamped(u, c[LIMIT]) + OFFSET;                                           \
  }

#define NO_SELECTION                            \
  FUNCTION static float selection(float z) {    \
    return 0.0f;                                \
  }

struct silu {
  PLAIN_UP
  FUNCTION static float selection(float z) {
    return sigmoid(z);
  }
  FUNCTION static float phi(float z, thread const float* c, thread float& slope) {
    const float s = sigmoid(z);
    slope = s * (1.0f + z * sigmoid(-z));
    return z * s;
  }
};

// exp(-z^2 / 2) / sqrt(2 pi). It underflows float for |z| > 15; the clamp keeps the square finite.
FUNCTION float gaussian_density(float z) {
  const float x = clamped(z, 15.0f);
  return metal::precise::exp(-0.5f * x * x) * 0.3989422804014327f;
}

// Mills ratio (1 - Phi(x)) / pdf(x) for x >= 0, by the same fit as in activations.py.
FUNCTION float mills(float x) {
  const float t = 4.0f / (4.0f + x);
  float p = 0.050289818273336714f;
  p = p * t - 0.2056031348148825f;
  p = p * t + 0.24446858433423266f;
  p = p * t - 0.08385410415595711f;
  p = p * t + 0.1619176653846931f;
  p = p * t + 0.14715704950253694f;
  p = p * t + 0.20465938601587808f;
  p = p * t + 0.23427646281879944f;
  p = p * t + 0.2500024305793807f;
  p = p * t + 0.2499999902247973f;
  return t * p;
}

struct gelu {
  PLAIN_UP
  FUNCTION static float selection(float z) {
    const float tail = gaussian_density(z) * mills(metal::abs(z));
    return z < 0.0f ? tail : 1.0f - tail;
  }
  FUNCTION static float phi(float z, thread const float* c, thread float& slope) {
    const float density = gaussian_density(z);
    const float m = mills(metal::abs(z));
    slope = z < 0.0f ? density * (m + z) : 1.0f - density * (m - z);
    return z * (z < 0.0f ? density * m : 1.0f - density * m);
  }
};

// Twice the argument of the tanh in GELU's approximation: 2 sqrt(2 / pi) (z + 0.044715 z^3).
FUNCTION float gelu_tanh_argument(float z) {
  return 1.5957691216057308f * (z + 0.044715f * z * z * z);
}

struct gelu_tanh {
  PLAIN_UP
  FUNCTION static float selection(float z) {
    return sigmoid(gelu_tanh_argument(z));
  }
  FUNCTION static float phi(float z, thread const float* c, thread float& slope) {
    const float w = gelu_tanh_argument(z);
    const float s = sigmoid(w);
    slope = s * (1.0f + z * 1.5957691216057308f * (1.0f + 0.134145f * z * z) * sigmoid(-w));
    return z * s;
  }
};

struct relu {
  PLAIN_UP
  FUNCTION static float selection(float z) {
    return z > 0.0f ? 1.0f : 0.0f;
  }
  FUNCTION static float phi(float z, thread const float* c, thread float& slope) {
    slope = z > 0.0f ? 1.0f : 0.0f;
    return z <= 0.0f ? 0.0f : z;
  }
};

struct relu2 {
  PLAIN_UP
  FUNCTION static float selection(float z) {
    return z <= 0.0f ? 0.0f : z;
  }
  FUNCTION static float phi(float z, thread const float* c, thread float& slope) {
    const float m = z <= 0.0f ? 0.0f : z;
    slope = 2.0f * m;
    return m * m;
  }
};

struct logistic {
  PLAIN_UP
  NO_SELECTION
  FUNCTION static float phi(float z, thread const float* c, thread float& slope) {
    const float s = sigmoid(z);
    slope = s * sigmoid(-z);
    return s;
  }
};

// c = alpha, limit
struct swiglu_oai {
  CLAMPED_UP(1, 1.0f)
  NO_SELECTION
  FUNCTION static float phi(float z, thread const float* c, thread float& slope) {
    const float m = at_most(z, c[1]);
    const float s = sigmoid(c[0] * m);
    slope = z >= c[1] ? 0.0f : s * (1.0f + c[0] * m * sigmoid(-c[0] * m));
    return m * s;
  }
};

// c = limit
struct swiglu_input_clamped {
  CLAMPED_UP(0, 0.0f)
  NO_SELECTION
  FUNCTION static float phi(float z, thread const float* c, thread float& slope) {
    const float value = silu::phi(at_most(z, c[0]), c, slope);
    slope = z >= c[0] ? 0.0f : slope;
    return value;
  }
};

// c = limit
struct swiglu_output_clamped {
  CLAMPED_UP(0, 0.0f)
  NO_SELECTION
  FUNCTION static float phi(float z, thread const float* c, thread float& slope) {
    const float value = silu::phi(z, c, slope);
    slope = value >= c[0] ? 0.0f : slope;
    return at_most(value, c[0]);
  }
};

// c = beta, linear_beta (0 for none)
struct situ {
  NO_SELECTION
  FUNCTION static float phi(float z, thread const float* c, thread float& slope) {
    const float s = sigmoid(z);
    const float t = metal::precise::tanh(z / c[0]);
    slope = s * ((1.0f - t * t) + c[0] * t * sigmoid(-z));
    return c[0] * t * s;
  }
  FUNCTION static float up(float u, thread const float* c, thread float& slope) {
    if (c[1] == 0.0f) {
      slope = 1.0f;
      return u;
    }
    const float t = metal::precise::tanh(u / c[1]);
    slope = 1.0f - t * t;
    return c[1] * t;
  }
};

// exp(x) - 1 - x for x <= 0, by its Taylor series where the difference would cancel.
FUNCTION float exp_beyond_linear(float x) {
  if (x < -0.5f) return metal::precise::exp(x) - 1.0f - x;
  float p = 2.4801587e-5f;
  p = p * x + 1.9841270e-4f;
  p = p * x + 1.3888889e-3f;
  p = p * x + 8.3333333e-3f;
  p = p * x + 4.1666667e-2f;
  p = p * x + 1.6666667e-1f;
  p = p * x + 0.5f;
  return p * x * x;
}

// c = a, n, beta, eps: a z^2 + beta z for z > 0, n (exp(min(z, eps)) - 1 - z) + beta z otherwise.
struct xielu {
  PLAIN_UP
  NO_SELECTION
  FUNCTION static float phi(float z, thread const float* c, thread float& slope) {
    const float x = at_most(z, c[3]);
    const float low = c[1] * (exp_beyond_linear(x) + (x - z));
    const float low_slope = c[1] * ((z >= c[3] ? 0.0f : metal::precise::exp(x)) - 1.0f);
    slope = (z > 0.0f ? 2.0f * c[0] * z : low_slope) + c[2];
    return (z > 0.0f ? c[0] * z * z : low) + c[2] * z;
  }
};

// --- memory -------------------------------------------------------------------------------------------------------

// Load `count` of four neighbouring elements, at least one, followed by zeros. `whole`: all four exist, and p is aligned.
template <typename T>
FUNCTION vec<T, 4> load4(const device T* p, bool whole, uint count) {
  if (whole) return *reinterpret_cast<const device vec<T, 4>*>(p);
  const T zero = T(0.0f);
  return vec<T, 4>(p[0], count > 1 ? p[1] : zero, count > 2 ? p[2] : zero, count > 3 ? p[3] : zero);
}

template <typename T>
FUNCTION void store4(device T* p, bool whole, uint count, thread const float* from) {
  if (whole) {
    *reinterpret_cast<device vec<T, 4>*>(p) = vec<T, 4>(T(from[0]), T(from[1]), T(from[2]), T(from[3]));
  } else {
    UNROLL for (uint j = 0; j < 4; ++j)
      if (j < count) p[j] = T(from[j]);
  }
}

// The channels that a thread computes: four, starting at `channel`.
struct Place {
  uint width;    // elements per row of g0 and u0
  uint channel;  // first channel
  uint count;    // number of the four channels that exist
  uint gate;     // offset of the gate's channels in a row
  uint up;       // offset of the up branch's channels in a row
  uint features;  // F
  bool whole;    // all four channels exist and are aligned in every row

  // halves: 0 for two arrays [N, F]; 1 for one array [N, 2F] with gate first; 2 for one with up first
  FUNCTION Place(uint thread_x, uint row_width, int halves) thread {
    width = row_width;
    features = halves == 0 ? width : width / 2;
    channel = 4 * thread_x;
    count = channel < features ? metal::min(4u, features - channel) : 0;
    gate = halves == 2 ? features : 0;
    up = halves == 1 ? features : 0;
    whole = features % 4 == 0;
  }
};

// The low-rank update of four channels, z += scale (x A) B, with the columns of B in registers.
template <typename L, int RANK, bool EXPERTS>
struct LowRank {
  L b[RANK > 0 ? RANK : 1][4];

  // B is [RANK, W], or [E, W, RANK] with experts; `first` is the column of the first channel.
  FUNCTION LowRank(const device L* B, uint expert, uint width, uint first, uint count) thread {
    UNROLL for (int k = 0; k < RANK; ++k) {
      UNROLL for (uint j = 0; j < 4; ++j) {
        const size_t column = first + metal::min(j, count - 1);
        b[k][j] = EXPERTS ? B[(size_t(expert) * width + column) * RANK + k] : B[size_t(k) * width + column];
      }
    }
  }

  // low is [N, RANK]. If RANK is a multiple of four, every row is aligned, also in an array that starts at a later row.
  FUNCTION void add(const device L* low, uint row, float scale, thread float* to) const thread {
    float sum[4] = {0, 0, 0, 0};
    UNROLL for (int k = 0; k < RANK; k += 4) {
      const vec<L, 4> a = load4<L>(low + size_t(row) * RANK + k, RANK % 4 == 0, RANK - k);
      UNROLL for (int i = 0; i < 4; ++i) {
        if (k + i >= RANK) continue;
        UNROLL for (int j = 0; j < 4; ++j) sum[j] = metal::fma(float(a[i]), float(b[k + i][j]), sum[j]);
      }
    }
    UNROLL for (int j = 0; j < 4; ++j) to[j] = metal::fma(scale, sum[j], to[j]);
  }
};
