// The page of a run: puts into words and drawings what the messages bring, and gives commands.
// A message: length of the header (uint32), the header (JSON), spaces, the arrays of an image's change; see message.py.
"use strict";

const SERIES = {}, FACTS = {};
const $ = (id) => document.getElementById(id);
let updates = 0, bytes = 0;

function connect() {
  const at = new URL("updates", location.href);
  at.protocol = at.protocol === "https:" ? "wss:" : "ws:";
  at.search = "";
  const socket = new WebSocket(at);
  socket.binaryType = "arraybuffer";
  socket.onmessage = (event) => take(event.data);
  socket.onclose = () => {
    document.body.dataset.connected = "no";
    show({...FACTS, status: "not connected", warnings: [{kind: "alarm",
      text: "The page has lost its server: what is shown is old. It tries to connect again."}]});
    setTimeout(connect, 2000);
  };
  socket.onopen = () => { document.body.dataset.connected = "yes"; };
}

function take(data) {
  const length = new DataView(data).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  Object.assign(FACTS, header.facts);
  for (const [name, part] of Object.entries(header.series)) grow(name, part);
  if (header.image) draw(header.image, data.slice(4 + length));
  if (Object.keys(header.series).length) curves();
  show(FACTS);
  if ("next" in header.facts || "proposed" in header.facts || "limits" in header.facts) aims();
  if ("buffer" in header.facts || "figures" in header.facts) buffer();
  document.body.dataset.updates = ++updates;
  document.body.dataset.bytes = bytes += data.byteLength;
}

function grow(name, part) {
  const mine = SERIES[name] = SERIES[name] || {};
  for (const [key, column] of Object.entries(part.columns)) {
    mine[key] = (mine[key] || []).slice(0, part.first).concat(column);
  }
}

// Words and numbers.

function text(id, words) { const at = $(id); if (at.textContent !== words) at.textContent = words; }

function table(id, head, rows) {
  const made = JSON.stringify([head, rows]), at = $(id);
  if (at.dataset.made === made) return;
  at.dataset.made = made;
  at.replaceChildren();
  if (head) { const row = at.createTHead().insertRow(); head.forEach((h) => { const c = document.createElement("th"); c.scope = "col"; c.textContent = h; row.append(c); }); }
  const body = at.createTBody();
  for (const cells of rows) {
    const row = body.insertRow(), first = document.createElement("th");
    first.scope = "row"; first.textContent = cells[0]; row.append(first);
    for (const cell of cells.slice(1)) row.insertCell().textContent = cell;
  }
}

const clock = (s) => s < 60 ? `${Math.round(s)} s` : s < 3600 ? `${Math.floor(s / 60)} min ${Math.round(s % 60)} s` : `${Math.floor(s / 3600)} h ${Math.round(s % 3600 / 60)} min`;
const fixed = (v, n) => v === null || v === undefined ? "-" : Number(v).toFixed(n);

function show(f) {
  document.title = `${f.run || "run"} - steering`;
  text("run", f.run || "steering");
  const status = f.status === "running" && f.paused ? "paused" : f.status || "running";
  text("status", status); $("status").className = "badge " + status;
  const at = f.frames_acquired === undefined ? "" : `${f.frames_acquired} ${f.frames_expected ? "of " + f.frames_expected + " " : ""}frames`;
  text("line", [f.live && f.elapsed_s ? clock(f.elapsed_s) : f.how || "", at, f.version !== undefined ? `model version ${f.version}` : "",
    f.live && f.reason ? f.reason : ""].filter(Boolean).join("  ·  "));
  text("scan", !f.scan ? (image ? image.scan : "") : `${f.scan}${f.scan_index !== undefined ? ` (number ${f.scan_index + 1}${f.scans_total ? " of " + f.scans_total : ""})` : ""}`);
  warn(f.warnings || []);
  controls(f);
  numbers(f);
  $("log").dataset.made === String((f.log || []).length) + JSON.stringify((f.log || []).slice(-1)) || log(f.log || []);
}

function warn(list) {
  const at = $("warnings"), made = JSON.stringify(list);
  if (at.dataset.made === made) return;
  at.dataset.made = made;
  at.replaceChildren(...list.map(({kind, text}) => { const p = document.createElement("p"); p.className = "warning " + kind; p.textContent = text; return p; }));
}

function log(lines) {
  $("log").dataset.made = String(lines.length) + JSON.stringify(lines.slice(-1));
  $("log").replaceChildren(...lines.slice().reverse().map(([when, words]) => {
    const item = document.createElement("li"), time = document.createElement("time");
    time.textContent = `${when.toFixed(1)} s`; item.append(time, words); return item;
  }));
}

function numbers(f) {
  const rows = [], g = f.figures || {};
  const add = (name, value) => { if (value !== undefined && value !== null && value !== "") rows.push([name, value]); };
  if (f.live) {
    add("frames", `${f.frames_acquired ?? 0} acquired, ${f.frames_predicted ?? 0} predicted, ${f.frames_dropped ?? 0} dropped`);
    add("rate", f.frames_per_s ? `${f.frames_per_s.toFixed(0)} frames/s` : "");
    add("latency", f.latency_ms ? `${fixed(f.latency_ms.p50, 1)} ms median, ${fixed(f.latency_ms.p99, 1)} ms 99 %` : "");
    add("residual", `${fixed(f.residual, 3)}, ${fixed(f.residual_expected, 3)} expected`);
    add("models", `version ${f.version}, ${f.versions_published} published`);
    add("training", `${f.steps} steps${f.loss ? ", loss " + f.loss.toFixed(4) : ""}${f.training ? ", under way" : ""}`);
    add("buffer", f.buffer_samples ? `${f.buffer_samples} samples, ${Math.round(100 * f.buffer_share)} % full` : "");
    for (const line of f.waits || []) add("jobs", line);
  } else {
    add("frames", g.frames_acquired !== undefined ? `${g.frames_acquired} acquired, ${g.frames_predicted} predicted, ${g.frames_dropped} dropped` : "");
    add("latency", g.prediction_latency_ms ? `${fixed(g.prediction_latency_ms.p50, 1)} ms median, ${fixed(g.prediction_latency_ms.p99, 1)} ms 99 %` : "");
    add("models", g.versions_published !== undefined ? `${g.versions_published} published` : "");
  }
  table("figures", null, rows);
  const errors = Object.entries(g.phase_error || {});
  if (!f.live && errors.length) table("errors", ["phase error (rad)", "at first", "scan's end", "run's end"], errors.map(([scan, e]) => [scan, fixed(e.first, 3), fixed(e.own_end, 3), fixed(e.run_end, 3)]));
  const streams = Object.entries(f.streams || g.streams || {});
  $("of-streams").hidden = !streams.length;
  if (streams.length) table("streams", ["stream", "received", "joined", "wait", "lost", "dropped", "silent"], streams.map(([name, s]) => [name, s.received, s.joined ?? "-", s.waiting ?? "-", s.lost ?? 0,
    Object.values(s.dropped || {}).reduce((a, b) => a + b, 0), s.silent_s === null || s.silent_s === undefined ? "nothing yet" : s.silent_s > 2 ? `${s.silent_s.toFixed(0)} s` : "no"]));
  forgetting(f.forgetting || {});
  const spent = Object.entries({...(f.live ? f.seconds || {} : g.wall_s || {}), ...(f.live && f.predict_s ? {predict: f.predict_s} : {})}).filter(([, s]) => s > 0);
  $("of-time").hidden = !spent.length;
  bars(spent);
}

function forgetting(errors) {  // a row for each scan, a column for each version, the colour from the row's best to its worst
  const versions = errors.versions || [], made = JSON.stringify(errors), at = $("forgetting");
  $("of-forgetting").hidden = !versions.length;
  if (at.dataset.made === made || !versions.length) return;
  const box = at.parentElement, newest = box.scrollLeft + box.clientWidth >= box.scrollWidth - 4;
  table("forgetting", ["version", ...versions], Object.entries(errors.errors).map(([scan, row]) => [scan, ...row.map((e) => fixed(e, 3))]));
  at.dataset.made = made;
  Object.values(errors.errors).forEach((row, i) => {
    const known = row.filter((e) => e !== null), low = Math.min(...known), high = Math.max(...known);
    [...at.tBodies[0].rows[i].cells].slice(1).forEach((cell, k) => {
      if (row[k] !== null) cell.style.setProperty("--share", `${Math.round(45 * (row[k] - low) / Math.max(1e-9, high - low))}%`);
      else cell.textContent = "";
    });
  });
  if (newest) box.scrollLeft = box.scrollWidth;  // unless somebody looks at earlier ones
}

function bars(values) {
  const made = JSON.stringify(values), at = $("seconds");
  if (at.dataset.made === made) return;
  at.dataset.made = made;
  const longest = Math.max(...values.map(([, s]) => s), 1e-9);
  at.replaceChildren(...values.map(([name, s]) => {
    const row = document.createElement("div"), label = document.createElement("span"), track = document.createElement("span"), bar = document.createElement("i"), value = document.createElement("b");
    row.className = "bar"; label.textContent = name; bar.style.width = `${100 * s / longest}%`; value.textContent = `${s.toFixed(1)} s`;
    track.append(bar); row.append(label, track, value); return row;
  }));
}

// Commands.

function controls(f) {
  const mine = f.live && document.body.dataset.role === "operator" && f.status !== "finished";
  $("controls").hidden = !mine;
  $("limits").hidden = !f.unit;
  $("pause").hidden = !!f.paused; $("resume").hidden = !f.paused;
  const p = f.proposed;
  $("proposal").hidden = !p;
  $("proposal-controls").hidden = !mine;
  if (p) text("proposal-text", `Proposed: ${p.positions.length} positions${p.stop ? " and the end of the scan" : ""}, because ${p.reason}`);
  const versions = [...new Set(f.served || [])].filter((v) => v !== f.version).sort((a, b) => b - a), select = $("version");
  if (select.dataset.made !== String(versions)) {
    select.dataset.made = String(versions);
    select.replaceChildren(...(versions.length ? versions.map((v) => new Option(`version ${v}`, v)) : [new Option("no other yet", "")]));
    select.disabled = !versions.length;
  }
  $("rollback").querySelector("button").disabled = !versions.length;
}

async function command(order) {
  text("answer", `${order.name}: asked ...`);
  try {
    const answer = await fetch("command", {method: "POST", headers: {"Content-Type": "application/json", "X-Steering": "page"}, body: JSON.stringify(order)});
    const said = await answer.json();
    text("answer", answer.ok ? `Done: ${said.done}` : `Not done: ${said.error}`);
  } catch (error) { text("answer", `Not done: the page's server cannot be reached (${error.message})`); }
}

document.addEventListener("click", (event) => {
  const name = event.target.dataset && event.target.dataset.command;
  if (name) command({name});
});
$("fit").addEventListener("click", refit);
$("fit-time").addEventListener("click", () => { for (const name of Object.keys(SHOWN)) delete SHOWN[name]; curves(); buffer(); });
$("rollback").addEventListener("submit", (event) => { event.preventDefault(); command({name: "rollback", version: Number($("version").value)}); });
const unit = () => FACTS.unit === "m" ? {factor: 1e-6, name: "µm"} : {factor: 1, name: FACTS.unit};
$("limits").addEventListener("toggle", () => {  // what holds now, to be changed
  if (!$("limits").open) return;
  const held = FACTS.limits || {}, form = $("limit"), {factor, name} = unit();
  form.shortest_dwell.value = held.shortest_dwell ?? "";
  for (const edge of ["y0", "y1", "x0", "x1"]) form[edge].value = held.area ? +(held.area[edge] / factor).toPrecision(6) : "";
  text("limit-unit", name);
  form.dataset.factor = factor;  // of what is shown from now on, whatever becomes known meanwhile
});
$("limit").addEventListener("submit", (event) => {
  event.preventDefault();
  const value = (name) => event.target[name].value.trim() === "" ? null : Number(event.target[name].value);
  const limits = {shortest_dwell: value("shortest_dwell")};
  for (const edge of ["y0", "y1", "x0", "x1"]) limits[edge] = value(edge) === null ? null : value(edge) * Number(event.target.dataset.factor);
  command({name: "limit", limits});
});
fetch("me").then((r) => r.json()).then((me) => { document.body.dataset.role = me.role; show(FACTS); });
embed().then(connect);
