"use strict";
// Draws the charts of a report from the page's JSON data, in the colors of the current theme.
(() => {
  const { runs, scalars, preferences, lossAxis, statistics, markers, dashes, colorScale, regionColors, regions, lastStep, fewValidations, logScale, refresh, storageKey } = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const element = (id) => document.getElementById(id);
  const themeColor = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
  const stored = (store, name, value) => {
    try { // some browsers store nothing for local files
      if (value === undefined) return store.getItem(storageKey + name);
      store.setItem(storageKey + name, value);
    } catch { /* then the choice is lost on reload */ }
    return null;
  };
  // Choices on this page, kept when it reloads itself.
  const saved = (name, value) => stored(sessionStorage, `${location.pathname} ${name}`, value);
  const several = runs.length > 1;
  const iterationCharts = new Set(); // ids of charts whose x axis is the iteration
  const savedRange = JSON.parse(saved("range") || "[0,null]"); // null is the last step, which moves during a run
  let range = savedRange[0] < (savedRange[1] ?? lastStep) ? [savedRange[0], savedRange[1] ?? lastStep] : [0, lastStep];

  const axis = (title, more = {}) => ({
    title: { text: title, standoff: 8, font: { size: 12 } }, gridcolor: themeColor("line"), linecolor: themeColor("axis"),
    tickcolor: themeColor("axis"), zeroline: false, showline: true, ticks: "outside", ticklen: 4, ...more,
  });
  const layout = (x, y, more = {}) => ({
    autosize: true, margin: { l: 56, r: 16, t: 8, b: 44 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: themeColor("text") }, hovermode: "x unified",
    hoverlabel: { bgcolor: themeColor("card"), bordercolor: themeColor("axis"), font: { color: themeColor("text") } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "normal" }, showlegend: false, xaxis: x, yaxis: { automargin: true, ...y }, ...more,
  });
  const steps = (more = {}) => axis("iteration", { range: range[0] < range[1] ? range : undefined, rangemode: "tozero", ...more });
  const rgba = (hex, alpha) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",")},${alpha})`;

  const isFolded = (place) => place.closest("details:not([open])") !== null;

  // Charts in closed folds have no size. They are drawn when their fold opens.
  function draw(id, traces, shape) {
    const place = element(id);
    if (!place || isFolded(place)) return;
    Plotly.react(place, traces, shape, { displayModeBar: false, responsive: true, doubleClick: "reset" });
    if (iterationCharts.has(id)) return;
    iterationCharts.add(id);
    place.on("plotly_relayout", (event) => {
      if ("xaxis.range[0]" in event) setRange([event["xaxis.range[0]"], event["xaxis.range[1]"]]);
      else if (event["xaxis.autorange"]) setRange([0, lastStep]);
    });
  }

  function setRange(wanted) {
    const next = [Math.max(0, Math.round(wanted[0])), Math.round(wanted[1])];
    if (!(next[0] < next[1]) || (next[0] === range[0] && next[1] === range[1])) return;
    range = next;
    [element("from").value, element("to").value] = range;
    saved("range", JSON.stringify([range[0], range[1] === lastStep ? null : range[1]]));
    for (const id of iterationCharts) if (!isFolded(element(id))) Plotly.relayout(id, { "xaxis.range": [...range] });
  }

  const label = (x, y, text, ax, ay, color, log) => ({
    x, y: log ? Math.log10(y) : y, text, ax, ay, bgcolor: themeColor("card"), bordercolor: color, borderpad: 3, arrowcolor: color, arrowwidth: 1.2, arrowhead: 0, standoff: 9,
  });

  function lossChart() {
    const traces = [], labels = [], log = element("log").checked;
    runs.forEach((run, i) => {
      const training = themeColor(`run-${i}`), validation = several ? training : themeColor("run-1");
      const name = several ? `${run.name}: ` : "";
      if (run.train.loss) {
        const smooth = run.smooth.loss;
        if (smooth && !several) traces.push({ x: run.train.loss[0], y: run.train.loss[1], mode: "lines", line: { color: rgba(training, 0.28), width: 1 }, name: name + "training, as reported", showlegend: false, hoverinfo: "skip" });
        const [x, y] = smooth || run.train.loss;
        traces.push({ x, y, mode: "lines", line: { color: training, width: several ? 1.5 : 2, dash: dashes[i] }, name: name + "training", hovertemplate: "%{y:.4f}" });
      }
      if (run.valid[0].length) {
        const count = run.valid[0].length, few = count <= fewValidations; // a line through few points looks like a curve, and there is none
        traces.push({ x: run.valid[0], y: run.valid[1], mode: few ? "markers" : "lines+markers", line: { color: validation, width: 2.5 }, cliponaxis: false, marker: { symbol: markers[i], size: few ? 10 : count > 60 ? 4 : 7, color: validation }, name: name + "validation", hovertemplate: "%{y:.4f}" });
        if (few && !several && run.valid[0][0] === 0 && run.valid[1][0] !== null) labels.push(label(0, run.valid[1][0], `before ${run.valid[1][0].toPrecision(3)}`, 58, -4, validation, log));
      }
      if (run.best) {
        traces.push({ x: [run.best[0]], y: [run.best[1]], mode: "markers", cliponaxis: false, marker: { symbol: "star", size: 16, color: validation, line: { color: themeColor("card"), width: 1.5 } }, name: name + "best", hoverinfo: "skip", showlegend: !several });
        // Labels of several runs would overlap. The result and the caption have these numbers too.
        if (!several && run.best[0] > 0) labels.push(label(run.best[0], run.best[1], `best ${run.best[1].toPrecision(3)}`, run.best[0] > 0.8 * lastStep ? -36 : 36, -34, validation, log));
      }
    });
    draw("chart-loss", traces, layout(steps(), axis(lossAxis, log ? { type: "log", dtick: "D2", tickformat: "~g" } : {}), { showlegend: true, annotations: labels }));
  }

  function scalarCharts() {
    for (const { key: name, unit, format } of scalars) {
      const traces = runs.flatMap((run, i) => {
        const found = run.train[name];
        if (!found) return [];
        const line = { color: themeColor(`run-${i}`), width: 1.8, dash: dashes[i] }, smooth = run.smooth[name];
        const shown = (smooth || found), main = { x: shown[0], y: shown[1], mode: "lines", line, name: run.name, hovertemplate: `%{y:${format}}` };
        return smooth && !several ? [{ x: found[0], y: found[1], mode: "lines", line: { color: rgba(themeColor(`run-${i}`), 0.28), width: 1 }, hoverinfo: "skip" }, main] : [main];
      });
      draw("chart-" + name, traces, layout(steps(), axis(unit, { range: [0, 1.12 * extent(traces.map((trace) => [trace.y]))[1]], exponentformat: name === "learning_rate" ? "e" : "SI" }), { showlegend: several }));
    }
  }

  // Training as lines, validation as points. Of two measures in one chart, the second is dotted.
  function preferenceCharts() {
    for (const { key, unit, format, measures } of preferences) {
      const traces = [], pair = measures.length > 1;
      runs.forEach((run, i) => measures.forEach(([name, label], n) => {
        const training = themeColor(`run-${!several && pair ? n : i}`), validation = several || pair ? training : themeColor("run-1");
        const found = run.train[name], valid = run.validMeasures[name], prefix = [several ? `${run.name}: ` : "", label && `${label}, `].join("");
        if (found) {
          const [x, y] = run.smooth[name] || found;
          traces.push({ x, y, mode: "lines", line: { color: training, width: 2, dash: n ? "dot" : several ? dashes[i] : "solid" }, name: prefix + "training", hovertemplate: `%{y:${format}}` });
        }
        if (valid && valid[0].length) {
          const few = valid[0].length <= fewValidations;
          traces.push({ x: valid[0], y: valid[1], mode: few ? "markers" : "lines+markers", line: { color: validation, width: 1.5, dash: n ? "dot" : "solid" }, cliponaxis: false, marker: { symbol: markers[several ? i : n], size: few ? 9 : 6, color: validation }, name: prefix + "validation", hovertemplate: `%{y:${format}}` });
        }
      }));
      draw("chart-" + key, traces, layout(steps(), axis(unit, key === "accuracy" ? { range: [0, 1.04], tickformat: ".0%" } : {}), { showlegend: true }));
    }
  }

  const heatTrace = (x, y, z, low, high, unit) => ({
    type: "heatmap", x, y, z, zmin: low, zmax: high, colorscale: colorScale, hoverongaps: false, hovertemplate: "iteration %{x}<br>%{y}<br>%{z:.4f}<extra></extra>",
    colorbar: { title: { text: unit, side: "right", font: { size: 12 } }, thickness: 12, outlinewidth: 0, len: 1, exponentformat: "e" },
  });

  // Not Math.min(...values): that overflows the stack for grids of many thousand values.
  const extent = (grids) => {
    let low = Infinity, high = -Infinity;
    for (const grid of grids) for (const row of grid) for (const value of row) if (value !== null) { if (value < low) low = value; if (value > high) high = value; }
    return [low, high];
  };

  function heatCharts() {
    const choice = element("statistic");
    if (!choice) return;
    const { label, unit } = statistics[choice.value];
    const shown = runs.map((run) => run.grids[choice.value]);
    const [low, high] = extent(shown.filter(Boolean).map((grid) => grid.z));
    for (const place of document.querySelectorAll(".statistic-name")) place.textContent = label;
    runs.forEach((run, i) => {
      if (!run.layers.length) return;
      const grid = shown[i] || { x: [], z: [] }, names = run.layers.map((layer) => "layer " + layer);
      const ticks = Math.ceil(names.length / 16);
      draw(`heat-${i}`, [heatTrace(grid.x, names, grid.z, low, high, unit)],
        layout(steps({ showgrid: false }), axis("layer", { type: "category", showgrid: false, tickvals: names.filter((_, n) => n % ticks === 0), ticktext: run.layers.filter((_, n) => n % ticks === 0) }), { hovermode: "closest" }));
      element(`heat-caption-${i}`).textContent = caption(run, grid, label);
    });
  }

  function caption(run, grid, label) {
    if (!grid.z.length) return "This run did not record it.";
    const final = grid.z.map((row) => row[row.length - 1]);
    const known = final.map((value, n) => [value, run.layers[n]]).filter(([value]) => value !== null).sort((a, b) => a[0] - b[0]);
    if (!known.length) return "";
    const [least, most] = [known[0], known[known.length - 1]];
    return `${label}, at the end: lowest ${least[0].toPrecision(3)} in layer ${least[1]}, highest ${most[0].toPrecision(3)} in layer ${most[1]}.`;
  }

  // A statistic of the selected layer, or its mean over the layers that have it.
  function layerLine(run, name) {
    const grid = run.grids[name], layer = element("layer-choice").value;
    if (!grid) return null;
    if (layer) {
      const n = run.layers.indexOf(layer);
      return n < 0 ? null : { x: grid.x, y: grid.z[n] };
    }
    const y = grid.x.map((_, t) => {
      const known = grid.z.map((layer) => layer[t]).filter((value) => value !== null);
      return known.length ? known.reduce((a, b) => a + b) / known.length : null;
    });
    return { x: grid.x, y };
  }

  function layerCharts() {
    if (!element("layer-choice")) return;
    for (const [name, unit] of [["importance", "importance |φ'|"], ["mask", "mask m"], ["step_scale", "step scale g"], ["multiplier", "step multiplier q"]]) {
      const traces = [];
      runs.forEach((run, i) => {
        const [low, middle, high] = ["p10", "p50", "p90"].map((part) => layerLine(run, `${name}.${part}`));
        if (!low || !high || !middle) return;
        const line = { color: themeColor(`run-${i}`) };
        traces.push({ ...low, mode: "lines", line: { ...line, width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: i });
        traces.push({ ...high, mode: "lines", line: { ...line, width: 0 }, fill: "tonexty", fillcolor: rgba(themeColor(`run-${i}`), 0.2), hoverinfo: "skip", name: several ? run.name : "80% of channels", showlegend: !several, legendgroup: i });
        traces.push({ ...middle, mode: "lines", line: { ...line, width: 2, dash: dashes[i] }, name: several ? run.name : "median", legendgroup: i, hovertemplate: "%{y:.4f}" });
      });
      draw(`band-${name}`, traces, layout(steps(), axis(unit, { rangemode: "tozero" }), { showlegend: true }));
    }
    const share = { range: [0, 1.02], tickformat: ".0%" };
    for (const [name, unit, scale] of [["sparsity", "share of channels", share], ["effective", "share of channels", share], ["misalignment", "selection misalignment", { rangemode: "tozero" }]]) {
      draw(`band-${name}`, runs.flatMap((run, i) => {
        const found = layerLine(run, name);
        return found ? [{ ...found, mode: "lines", line: { color: themeColor(`run-${i}`), width: 2, dash: dashes[i] }, name: run.name, hovertemplate: "%{y:.4f}" }] : [];
      }), layout(steps(), axis(unit, scale), { showlegend: several }));
    }
    runs.forEach((run, i) => {
      const traces = regions.flatMap((region, n) => {
        const found = layerLine(run, `occupancy.${region}`);
        const regionColor = regionColors[regions.length === 2 ? 2 * n : n];
        return found ? [{ ...found, mode: "lines", stackgroup: "all", line: { color: themeColor("card"), width: 1 }, fillcolor: regionColor, name: region, hovertemplate: "%{y:.1%}" }] : [];
      });
      draw(`occupancy-${i}`, traces, layout(steps(), axis("share of tokens", { range: [0, 1], tickformat: ".0%" }), { showlegend: true }));
      channelChart(run, i);
    });
  }

  function channelChart(run, i) {
    const place = element(`channels-${i}`);
    if (!place) return;
    const wanted = element("layer-choice").value, layer = wanted in run.channels ? wanted : Object.keys(run.channels)[0];
    const { x, z } = run.channels[layer];
    element(`channels-note-${i}`).textContent = `Layer ${layer}: ${z.length} evenly spaced channels.`;
    draw(`channels-${i}`, [heatTrace(x, z.map((_, n) => n + 1), z, ...extent([z]), "importance |φ'|")],
      layout(steps({ showgrid: false }), axis("channel, by final importance", { autorange: "reversed", showgrid: false }), { hovermode: "closest" }));
  }

  // Shortens long texts, with a button that shows all of them.
  function clampTexts() {
    for (const text of document.querySelectorAll(".clamp")) {
      text.classList.add("clamped");
      if (text.scrollHeight <= text.clientHeight + 4) { text.classList.remove("clamped"); continue; }
      const more = document.createElement("button");
      more.type = "button";
      more.className = "more";
      const show = (all) => {
        text.classList.toggle("clamped", !all);
        more.textContent = all ? "Show less" : "Show more";
        more.setAttribute("aria-expanded", all);
      };
      more.setAttribute("aria-controls", text.id);
      more.addEventListener("click", () => show(more.getAttribute("aria-expanded") !== "true"));
      show(false);
      text.after(more);
    }
  }

  // One kind of chart at a time, so that the page stays responsive. A later call takes over from an earlier one.
  let calls = 0;
  function drawAll() {
    const call = ++calls, parts = [preferenceCharts, lossChart, scalarCharts, heatCharts, layerCharts];
    const next = () => {
      if (call !== calls) return;
      const part = parts.shift();
      // Milliseconds from navigation to the first frame with all charts; the tests read it.
      if (!part) return requestAnimationFrame(() => setTimeout(() => { root.dataset.drawn ||= Math.round(performance.now()); }));
      part();
      setTimeout(next);
    };
    next();
  }

  function setDark(on) {
    root.dataset.theme = on ? "dark" : "light";
    element("theme").setAttribute("aria-pressed", on);
  }

  const prefers = matchMedia("(prefers-color-scheme: dark)");
  setDark((stored(localStorage, "theme") || (prefers.matches ? "dark" : "light")) === "dark");
  prefers.addEventListener("change", (event) => { if (!stored(localStorage, "theme")) { setDark(event.matches); drawAll(); } });
  element("theme").addEventListener("click", () => {
    setDark(root.dataset.theme !== "dark");
    stored(localStorage, "theme", root.dataset.theme);
    drawAll();
  });
  const choices = ["statistic", "layer-choice"].map(element).filter(Boolean);
  for (const choice of choices) {
    const before = saved(choice.id);
    if (before !== null && [...choice.options].some((option) => option.value === before)) choice.value = before;
    choice.addEventListener("change", () => {
      saved(choice.id, choice.value);
      (choice.id === "statistic" ? heatCharts : layerCharts)();
    });
  }
  const log = element("log");
  log.checked = (saved("log") ?? String(logScale)) === "true";
  log.addEventListener("change", () => { saved("log", log.checked); lossChart(); });
  const folds = [...document.querySelectorAll("details")];
  const open = JSON.parse(saved("open") || "[]");
  for (const fold of folds) {
    fold.open = open.includes(fold.id);
    fold.addEventListener("toggle", () => {
      saved("open", JSON.stringify(folds.filter((each) => each.open).map((each) => each.id)));
      if (fold.open && fold.querySelector(".chart")) drawAll();
    });
  }
  // A link to a section opens it.
  const openTarget = () => {
    const fold = location.hash.length > 1 && element(decodeURIComponent(location.hash.slice(1)))?.closest("details");
    if (fold) fold.open = true;
  };
  addEventListener("hashchange", openTarget);
  openTarget();
  clampTexts();
  [element("from").value, element("to").value] = range;
  for (const id of ["from", "to"]) element(id).addEventListener("change", () => setRange([+element("from").value, +element("to").value]));
  element("all").addEventListener("click", () => setRange([0, lastStep]));
  drawAll();

  const pause = element("pause");
  if (pause) {
    const paused = (on) => { pause.setAttribute("aria-pressed", on); saved("paused", on); };
    paused(saved("paused") === "true");
    pause.addEventListener("click", () => paused(pause.getAttribute("aria-pressed") !== "true"));
    setInterval(() => { if (pause.getAttribute("aria-pressed") !== "true" && !document.hidden) location.reload(); }, refresh * 1000);
  }
})();
