  // Computes the gradients of h = phi(z) up(u), dz = dh up(u) phi'(z) and du = dh phi(z) up'(u). It recomputes z and u
  // from the forward's inputs.
  //
  // Inputs: those of forward.metal, and
  // dh   [N, F] T              gradient of h
  //
  // Output:
  // d    [2, N, F] T           dz and du; or [N, 2F] T where one projection computes both, each in its half
  const uint rows = g0_shape[0];
  const Place at(thread_position_in_grid.x, g0_shape[1], HALVES);
  const uint tile = thread_position_in_grid.y;
  if (at.count == 0) return;
  const uint expert = EXPERTS ? tiles[3 * tile] : 0;
  const uint start = EXPERTS ? tiles[3 * tile + 1] : tile * TILE;
  const uint stop = EXPERTS ? tiles[3 * tile + 2] : metal::min(rows, (tile + 1) * TILE);
  const uint last = stop - 1;
  const LowRank<L, RANK, EXPERTS> to_gate(bg, expert, at.width, at.gate + at.channel, at.count);
  const LowRank<L, RANK, EXPERTS> to_up(bu, expert, at.width, at.up + at.channel, at.count);
  const float scale[2] = {p[0], p[1]}, c[4] = {p[4], p[5], p[6], p[7]};
  const size_t apart = HALVES == 0 ? size_t(rows) * at.features : 0;

  // As in forward.metal, the loop is compiled twice, and rows are loaded AHEAD rows before they are used.
  UNROLL for (int copy = 0; copy < 2; ++copy) {
    const bool whole = copy == 0;
    if (whole != at.whole) continue;
    vec<T, 4> next_g0[AHEAD], next_u0[AHEAD], next_dh[AHEAD];
    UNROLL for (uint i = 0; i < AHEAD; ++i) {
      const size_t next = metal::min(start + i, last);
      next_g0[i] = load4<T>(g0 + next * at.width + at.channel + at.gate, whole, at.count);
      next_u0[i] = load4<T>(u0 + next * at.width + at.channel + at.up, whole, at.count);
      next_dh[i] = load4<T>(dh + next * at.features + at.channel, whole, at.count);
    }
    for (uint first = start; first < stop; first += AHEAD) {
      UNROLL for (uint i = 0; i < AHEAD; ++i) {
        const uint n = first + i;
        if (n >= stop) continue;
        float z[4], u[4], g[4], to_z[4], to_u[4];
        UNROLL for (int j = 0; j < 4; ++j) {
          z[j] = float(next_g0[i][j]);
          u[j] = float(next_u0[i][j]);
          g[j] = float(next_dh[i][j]);
        }
        const size_t next = metal::min(n + AHEAD, last);
        next_g0[i] = load4<T>(g0 + next * at.width + at.channel + at.gate, whole, at.count);
        next_u0[i] = load4<T>(u0 + next * at.width + at.channel + at.up, whole, at.count);
        next_dh[i] = load4<T>(dh + next * at.features + at.channel, whole, at.count);
        if (RANK > 0) {
          to_gate.add(ag, n, scale[0], z);
          to_up.add(au, n, scale[1], u);
        }
        UNROLL for (int j = 0; j < 4; ++j) {
          float slope, up_slope;
          const float phi = GATE::phi(z[j], c, slope);
          const float v = GATE::up(u[j], c, up_slope);
          to_z[j] = g[j] * v * slope;
          to_u[j] = g[j] * phi * up_slope;
        }
        const size_t row = size_t(n) * at.width + at.channel;
        store4<T>(d + row + at.gate, whole, at.count, to_z);
        store4<T>(d + apart + row + at.up, whole, at.count, to_u);
      }
    }
  }
