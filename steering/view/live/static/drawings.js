// What is drawn: the Bokeh document, and its sources. See page.js for where the messages come from.
"use strict";

const NOTHING = 255, FRAMES = {first: 0, x: [], y: [], residual: []}, MODELS = {}, SHOWN = {};
const COLOURS = ["#1f83c4", "#d9730d", "#2a9d6f", "#b85bb0", "#8a78d6", "#a8842c"];
const MAPS = ["amplitude", "phase", "amplitude_refined", "phase_refined", "trust", "pixel_residual"];
let bokeh = null, image = null;

// A drawing is made while it is in sight, once for all that has come since it was last made; one out of sight when it
// comes into sight. It takes at most a quarter of the time, so that buttons work on a slow phone, too.
const WAITING = new Map(), IN_SIGHT = new Set(), REST = 3;
let drawing = false;
const sight = new IntersectionObserver((entries) => {
  for (const {target, isIntersecting} of entries) IN_SIGHT[isIntersecting ? "add" : "delete"](target.id);
  soon();
}, {rootMargin: "50%"});

function later(name, make) { WAITING.set("drawing-" + name, make); soon(); }

function soon() {
  if (drawing || ![...WAITING.keys()].some((id) => IN_SIGHT.has(id))) return;
  drawing = true;
  requestAnimationFrame(() => {
    const begun = performance.now();
    for (const [id, make] of [...WAITING]) if (IN_SIGHT.has(id)) { WAITING.delete(id); make(); }
    // Bokeh paints in the frames that follow.
    requestAnimationFrame(() => requestAnimationFrame(() => {
      if (image && !document.body.dataset.painted) document.body.dataset.painted = performance.now();
      setTimeout(() => { drawing = false; soon(); }, REST * (performance.now() - begun));
    }));
  });
}

const model = (name) => MODELS[name] = MODELS[name] || bokeh.get_model_by_name(name);

async function embed() {
  const {docs, items} = await (await fetch("document.json")).json();
  await Bokeh.embed.embed_items(docs, items);
  bokeh = Bokeh.documents[Bokeh.documents.length - 1];
  // A finger scrolls the page, two zoom in a drawing.
  if (matchMedia("(pointer: coarse)").matches) for (const root of bokeh.roots()) root.toolbar.active_drag = null;
  for (const at of document.querySelectorAll(".drawing")) sight.observe(at);
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
}

function paint() {  // text and lines of the drawings in the colours of the page
  const style = getComputedStyle(document.body), ink = style.getPropertyValue("--soft").trim(), card = style.getPropertyValue("--card").trim();
  for (const root of bokeh.roots()) {
    for (const axis of [...root.below, ...root.left]) {
      axis.setv({major_label_text_color: ink, axis_label_text_color: ink, axis_line_color: ink, major_tick_line_color: ink});
    }
  }
  for (const name of [...MAPS, "positions"]) {
    model("scale_" + name).setv({label_text_color: ink, background_fill_color: card});
  }
  for (const name of ["residual", "error"]) model("words_" + name).glyph.text_color = {value: ink};
}

function span(name, start, end) {  // a range that follows the data until somebody has zoomed
  const range = model(name), before = SHOWN[name];
  if (before && (range.start !== before[0] || range.end !== before[1])) return;
  range.setv({start, end, reset_start: start, reset_end: end});
  SHOWN[name] = [start, end];
}

// The object.

function draw(head, data) {
  if (head.whole || !image || image.key !== head.key) {
    const [ny, nx] = head.shape, same = image && image.scan === head.scan && String(image.shape) === String(head.shape);
    image = {key: head.key, scan: head.scan, unit: head.unit, maps: {}, head, shape: [ny, nx], view: same ? image.view : null};
    FRAMES.first = head.frames.first;
    for (const key of ["x", "y", "residual"]) FRAMES[key] = [];
    for (const name of MAPS) {  // of the scan before
      if (!head.maps[name]) { image.maps[name] = new Float32Array(ny * nx).fill(NaN); later(name, () => place(name)); }
    }
    if (!same) fit(head);
  }
  for (const [name, tiles] of Object.entries(head.maps)) unpack(name, tiles, head, data);
  frames(head.frames, data);
}

function unpack(name, tiles, head, data) {
  const [ny, nx] = head.shape, side = head.side, columns = head.grid[1];
  const values = image.maps[name] = image.maps[name] || new Float32Array(ny * nx).fill(NaN);
  const where = new Int32Array(data, tiles.place, tiles.count);
  const scale = new Float32Array(data, tiles.scale, 2 * tiles.count);
  const pixels = new Uint8Array(data, tiles.pixels, tiles.count * side * side);
  for (let k = 0; k < tiles.count; k++) {
    const top = Math.floor(where[k] / columns) * side, left = (where[k] % columns) * side;
    const low = scale[2 * k], step = (scale[2 * k + 1] - low) / (NOTHING - 1);
    const width = Math.min(side, nx - left);
    for (let y = 0; y < side && top + y < ny; y++) {
      const from = (k * side + y) * side, to = (top + y) * nx + left;
      for (let x = 0; x < width; x++) {
        const v = pixels[from + x];
        values[to + x] = v === NOTHING ? NaN : low + v * step;
      }
    }
  }
  later(name, () => place(name));
}

function centred(values) {  // the global phase is free: the mean phase is shown as 0, so that nothing wraps in the middle
  let re = 0, im = 0;
  for (let i = 0; i < values.length; i += 7) {
    if (!Number.isNaN(values[i])) { re += Math.cos(values[i]); im += Math.sin(values[i]); }
  }
  const middle = Math.atan2(im, re), turn = 2 * Math.PI;
  return values.map((v) => v - middle - turn * Math.round((v - middle) / turn));
}

function place(name) {
  const source = model("image_" + name), {head, shape: [ny, nx]} = image;
  const values = name.startsWith("phase") ? centred(image.maps[name]) : image.maps[name];
  const made = new source.data.image[0].constructor(values, [ny, nx]);
  source.data = {
    image: [made], x: [head.origin[1] - head.pixel / 2], y: [head.origin[0] - head.pixel / 2],
    dw: [nx * head.pixel], dh: [ny * head.pixel],
  };
  const found = limits(values), [low, high] = name === "trust" || !found ? [0, 1] : found;
  model("colours_" + name).setv({low, high});
  legend(name, found ? [low, high] : null);
}

function limits(values, share = 0.01) {  // from the 1 % to the 99 % quantile; null where nothing is known
  const step = Math.max(1, Math.floor(values.length / 8192)), known = [];
  for (let i = 0; i < values.length; i += step) if (!Number.isNaN(values[i])) known.push(values[i]);
  if (!known.length) return null;
  known.sort((a, b) => a - b);
  const low = known[Math.floor(share * (known.length - 1))], high = known[Math.ceil((1 - share) * (known.length - 1))];
  return [low, Math.max(high, low + 1e-3)];
}

function legend(name, found) {
  const at = $("scale-" + name);
  at.classList.toggle("nothing", !found);
  at.innerHTML = found ? found.map((value) => `<i>${value.toFixed(2)}</i>`).join("") : "nothing yet";
}

function fit(head) {  // the whole of the scan, as a square
  const [ny, nx] = head.shape, p = head.pixel, side = Math.max(ny, nx) * p / 2;
  const cy = head.origin[0] + (ny - 1) * p / 2, cx = head.origin[1] + (nx - 1) * p / 2;
  image.view = [cx - side, cx + side, cy - side, cy + side];
  for (const name of [...MAPS, "positions"]) model("scale_" + name).visible = head.unit === "m";
  refit();
}

function refit() {
  if (!image) return;
  const [left, right, top, bottom] = image.view;
  model("map_x").setv({start: left, end: right, reset_start: left, reset_end: right});
  model("map_y").setv({start: bottom, end: top, reset_start: bottom, reset_end: top});
}

function frames(part, data) {
  if (!part.count) return;
  const keep = Math.max(0, part.first - FRAMES.first);
  for (const key of ["x", "y", "residual"]) {
    const fresh = new Float64Array(data, part.columns[key], part.count);
    FRAMES[key] = FRAMES[key].slice(0, keep).concat(Array.from(fresh)).slice(-4096);
  }
  FRAMES.first = part.first + part.count - FRAMES.x.length;
  later("positions", dots);
}

function dots() {
  model("measured").data = {x: FRAMES.x, y: FRAMES.y, residual: FRAMES.residual};
  const found = limits(FRAMES.residual), [low, high] = found || [0, 1];
  model("colours_positions").setv({low, high});
  model("dots").glyph.size = {value: FRAMES.x.length > 1000 ? 3.5 : 6};
  legend("positions", found);
}

function aims() {
  const points = (where) => ({x: where.map((p) => p[1]), y: where.map((p) => p[0])});
  model("next").data = points(FACTS.next || []);
  model("proposed").data = points(FACTS.proposed ? FACTS.proposed.positions : []);
  const area = FACTS.limits && FACTS.limits.area;
  model("area").data = area ? {left: [area.x0], right: [area.x1], top: [area.y0], bottom: [area.y1]}
    : {left: [], right: [], top: [], bottom: []};
}

// Curves.

const col = (name, key) => (SERIES[name] && SERIES[name][key]) || [];

function curves() {
  $("of-error").hidden = !col("error", "time").length;
  for (const name of ["residual", "error"]) later(name, () => curve(name));
}

function curve(name) {
  const last = Math.max(0, ...["residual", "error", "versions", "labels"].map((name) => col(name, "time").slice(-1)[0] || 0));
  const first = Math.min(last, ...["residual", "scans"].map((name) => col(name, "time")[0] ?? last));
  const now = FACTS.live ? Math.max(last, FACTS.elapsed_s || 0) : last;
  span("time", first - 0.01 * (now - first), now + 0.02 * (now - first) + 0.1);
  const expected = {time: [...col("expected", "time")], residual: [...col("expected", "residual")]};
  if (expected.time.length) { expected.time.push(now); expected.residual.push(expected.residual.slice(-1)[0]); }
  if (name === "residual") model("curve_expected").data = expected;
  const values = col(name, name), high = 1.3 * Math.max(1e-6, ...(limits([...values, ...(name === "residual" ? expected.residual : [])], 0) || []));
  model("curve_" + name).data = {time: col(name, "time"), [name]: values};
  span("range_" + name, 0, high);
  const marks = (kind, y, words) => {
    const time = col(kind, "time");
    model(`${kind}_${name}`).data = {time, y: time.map(() => y), words: time.map((_, i) => words(i))};
  };
  marks("versions", 0.95 * high, (i) => `version ${col("versions", "version")[i]}`);
  marks("labels", 0.02 * high, (i) => `${col("labels", "count")[i]} frames labelled`);
  const scans = col("scans", "time");
  model("scans_" + name).data = {time: scans};
  model("names_" + name).data = {time: scans, y: scans.map(() => 0.85 * high), scan: col("scans", "scan")};
  model("rollbacks_" + name).data = {time: col("rollbacks", "time")};
  model("drift_" + name).data = {left: col("drift", "start"), right: col("drift", "stop").map((v) => v === null ? now : v)};
}

function buffer() {
  const held = (FACTS.buffer && FACTS.buffer.steps) ? FACTS.buffer : (FACTS.figures && FACTS.figures.rehearsal_buffer) || {};
  const steps = held.steps || [];
  $("of-buffer").hidden = !steps.length;
  if (!steps.length) return;
  const xs = [], ys = [], colour = [], scan = [];
  let below = steps.map(() => 0);
  Object.entries(held.stored).forEach(([name, counts], k) => {
    const above = counts.map((n, i) => below[i] + n);
    xs.push([...steps, ...[...steps].reverse()]);
    ys.push([...above, ...[...below].reverse()]);
    colour.push(COLOURS[k % COLOURS.length]); scan.push(name);
    below = above;
  });
  model("stored").data = {xs, ys, colour, scan};
  span("steps", steps[0], Math.max(steps[steps.length - 1], steps[0] + 1));
  span("samples", 0, 1.05 * Math.max(1, ...below));
  $("buffer-key").replaceChildren("Samples stored, by scan:", ...scan.map((name, k) => {
    const entry = document.createElement("span"), box = document.createElement("i");
    box.className = "swatch"; box.style.background = colour[k];
    entry.append(box, name);
    return entry;
  }));
  const rows = Object.entries(held.age || {}).map(([name, a]) => [name, ...["age_p10", "age_p50", "age_p90"].map((q) => Math.round(a[q]))]);
  table("ages", ["age: samples offered since", "10 %", "median", "90 %"], rows);
}
