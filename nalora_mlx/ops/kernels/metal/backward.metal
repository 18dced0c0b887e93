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
  const LowRank<L, RANK, EXPERTS> to_gate(bg, expert, at.width, at.gate + at.channel, at.count);
  const LowRank<L, RANK, EXPERTS> to_up(bu, expert, at.width, at.up + at.channel, at.count);
  const float c[4] = {p[4], p[5], p[6], p[7]};

  for (uint n = start; n < stop; ++n) {
    const size_t row = size_t(n) * at.width + at.channel;
    float z[4], u[4], g[4], to_z[4], to_u[4];
    load4<T>(g0 + row + at.gate, at.whole, at.count, z);
    load4<T>(u0 + row + at.up, at.whole, at.count, u);
    load4<T>(dh + size_t(n) * at.features + at.channel, at.whole, at.count, g);
    if (RANK > 0) {
      to_gate.add(ag, n, p[0], z);
      to_up.add(au, n, p[1], u);
    }
    UNROLL for (int j = 0; j < 4; ++j) {
      float slope, up_slope;
      const float phi = GATE::phi(z[j], c, slope);
      const float v = GATE::up(u[j], c, up_slope);
      to_z[j] = g[j] * v * slope;
      to_u[j] = g[j] * phi * up_slope;
    }
    const size_t apart = HALVES == 0 ? size_t(rows) * at.features : 0;
    store4<T>(d + row + at.gate, at.whole, at.count, to_z);
    store4<T>(d + apart + row + at.up, at.whole, at.count, to_u);
  }
