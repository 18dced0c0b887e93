  // Computes h = phi(z) up(u) with z = g0 + s_g ag Bg and u = u0 + s_u au Bu, and sums over the rows of each tile.
  // ag and au are x A of gate and up.
  //
  // Inputs:
  // g0, u0   [N, W] T      W = F, or 2 F where one projection computes both (HALVES 1, 2; then g0 = u0)
  // z0       [N, W] T      gate without the update; read only with RANK = 0 and DIAGNOSE
  // ag, au   [N, R] L      bg, bu [R, W] L; with EXPERTS [E, W, R]
  // w        [N] float     row weights, 0 for padding
  // p        [8] float     s_g, s_u, two boundaries, four constants of the activation
  // tiles    [T, 3] int    expert, first row, last row + 1 (at least 1) of each tile; read only with EXPERTS
  //
  // Outputs:
  // h        [N, F] T
  // sums     [S, T, F] float: |phi'| or |phi' up|, above boundary 0, above boundary 1, |delta rho(z0) up|,
  //                           |z (rho(z) - rho(z0)) up|; a single zero without STATISTIC
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
  const float scale[2] = {p[0], p[1]}, boundary[2] = {p[2], p[3]}, c[4] = {p[4], p[5], p[6], p[7]};
  float response[4] = {0, 0, 0, 0}, above0[4] = {0, 0, 0, 0}, above1[4] = {0, 0, 0, 0};
  float feature[4] = {0, 0, 0, 0}, selected[4] = {0, 0, 0, 0};

  // The loop is compiled twice. Where `whole` is known, no branch lies between a load and the next one.
  UNROLL for (int copy = 0; copy < 2; ++copy) {
    const bool whole = copy == 0;
    if (whole != at.whole) continue;
    // Rows are loaded AHEAD rows before they are used. Past the end, the last row is loaded again.
    vec<T, 4> next_g0[AHEAD], next_u0[AHEAD];
    UNROLL for (uint i = 0; i < AHEAD; ++i) {
      const size_t next = metal::min(start + i, last);
      next_g0[i] = load4<T>(g0 + next * at.width + at.channel + at.gate, whole, at.count);
      next_u0[i] = load4<T>(u0 + next * at.width + at.channel + at.up, whole, at.count);
    }
    for (uint first = start; first < stop; first += AHEAD) {
      UNROLL for (uint i = 0; i < AHEAD; ++i) {
        const uint n = first + i;
        if (n >= stop) continue;
        float z[4], u[4], before[4], out[4];
        UNROLL for (int j = 0; j < 4; ++j) {
          z[j] = before[j] = float(next_g0[i][j]);
          u[j] = float(next_u0[i][j]);
        }
        const size_t next = metal::min(n + AHEAD, last);
        next_g0[i] = load4<T>(g0 + next * at.width + at.channel + at.gate, whole, at.count);
        next_u0[i] = load4<T>(u0 + next * at.width + at.channel + at.up, whole, at.count);
        if (DIAGNOSE && RANK == 0) {
          const vec<T, 4> v = load4<T>(z0 + size_t(n) * at.width + at.channel + at.gate, whole, at.count);
          UNROLL for (int j = 0; j < 4; ++j) before[j] = float(v[j]);
        }
        if (RANK > 0) {
          to_gate.add(ag, n, scale[0], z);
          to_up.add(au, n, scale[1], u);
        }
        const float weight = STATISTIC > 0 ? w[n] : 0.0f;
        UNROLL for (int j = 0; j < 4; ++j) {
          float slope, unused;
          const float phi = GATE::phi(z[j], c, slope);
          const float v = GATE::up(u[j], c, unused);
          out[j] = phi * v;
          // Padding may hold anything, NaN included, so it is skipped rather than multiplied by zero.
          if (STATISTIC > 0 && weight > 0.0f) {
            response[j] += weight * metal::abs(STATISTIC == 2 ? slope * v : slope);
            if (BOUNDARIES > 0) above0[j] += (CLOSED ? z[j] >= boundary[0] : z[j] > boundary[0]) ? weight : 0.0f;
            if (BOUNDARIES > 1) above1[j] += (CLOSED ? z[j] >= boundary[1] : z[j] > boundary[1]) ? weight : 0.0f;
            if (DIAGNOSE) {
              const float frozen = GATE::selection(before[j]);
              feature[j] += weight * metal::abs((z[j] - before[j]) * frozen * v);
              selected[j] += weight * metal::abs(z[j] * (GATE::selection(z[j]) - frozen) * v);
            }
          }
        }
        store4<T>(h + size_t(n) * at.features + at.channel, whole, at.count, out);
      }
    }
  }

  if (STATISTIC > 0) {
    const size_t plane = size_t(threads_per_grid.y) * at.features;
    device float* to = sums + size_t(tile) * at.features + at.channel;
    store4<float>(to, at.whole, at.count, response);
    if (BOUNDARIES > 0) store4<float>(to + plane, at.whole, at.count, above0);
    if (BOUNDARIES > 1) store4<float>(to + 2 * plane, at.whole, at.count, above1);
    if (DIAGNOSE) {
      store4<float>(to + (1 + BOUNDARIES) * plane, at.whole, at.count, feature);
      store4<float>(to + (2 + BOUNDARIES) * plane, at.whole, at.count, selected);
    }
  } else if (at.channel == 0 && tile == 0) {
    sums[0] = 0.0f;
  }
