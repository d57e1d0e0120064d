// Lines by layer, with bands and a floor; and points with intervals.
const COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"];
function styleOf(group) {
  const { color, dash } = (Object.hasOwn(data.styles, group) && data.styles[group]) || { color: COLORS[0], dash: null };
  return { color: `var(--c${Math.max(COLORS.indexOf(color), 0)})`, dash };
}

function ticks(low, high, count = 5) {
  const span = high - low || 1, rough = span / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => span / s <= count) || 10 * power;
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) found.push(Math.abs(value) < step / 1e6 ? 0 : value);
  return { found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

// a series: {name, label, values, low, high, floor, color, dash, faint}; the heading stands over the vertical axis
function lineChart(host, { series, yLabel, heading = yLabel, describe, height = 320, bounds = null, state = {}, emphasized = () => {}, dots = null, legend = true, zeroLine = false, hatched = [] }) {
  const box = el("div", {});
  const list = el("ul", { class: "legend", "aria-label": "Lines; press one to bring it out" });
  const solid = series.filter((one) => !one.faint);
  host.classList.add("chart");
  if (!legend || solid.length < 2) host.classList.add("alone");
  host.append(box);
  if (legend && solid.length > 1) host.append(list);
  let lines = new Map(), hovered = null;
  const buttons = new Map(solid.map((one) => [one.name, el("button", {
    type: "button", "aria-pressed": "false",
    onclick: () => { state.pinned = state.pinned === one.name ? null : one.name; mark(); emphasized(); },
    onpointerenter: () => { hovered = one.name; mark(); }, onpointerleave: () => { hovered = null; mark(); },
    onfocus: () => { hovered = one.name; mark(); }, onblur: () => { hovered = null; mark(); },
  }, draw("svg", { width: 26, height: 8, "aria-hidden": "true" }, draw("line", { x1: 0, x2: 26, y1: 4, y2: 4, stroke: one.color, "stroke-width": 2.2, "stroke-dasharray": one.dash })), one.label)]));
  list.append(...[...buttons.values()].map((button) => el("li", {}, button)));
  function mark() {
    const chosen = hovered || state.pinned;
    for (const [name, parts] of lines) parts.forEach((part) => part.classList.toggle("dim", Boolean(chosen) && chosen !== name));
    for (const [name, button] of buttons) button.setAttribute("aria-pressed", String(state.pinned === name));
    box.querySelectorAll("g.floors path").forEach((path) => path.classList.toggle("dim", Boolean(chosen) && path.dataset.name !== chosen));
  }
  const layers = Math.max(...series.map((one) => one.values.length));
  const all = series.flatMap((one) => [...one.values, ...(one.low || []), ...(one.high || []), ...(one.floor || [])]).filter((v) => v !== null);
  const [least, most] = bounds || [Math.min(0, ...all), Math.max(0, ...all) * 1.04 || 1];
  let at = { layer: 0, line: 0 };
  function redraw(width) {
    const left = 46, right = 8, top = heading ? 26 : 10, bottom = 38, inner = width - left - right, down = height - top - bottom;
    const x = (layer) => left + (layers > 1 ? (layer / (layers - 1)) * (inner - 8) + 4 : inner / 2);
    const y = (value) => top + down - ((value - least) / (most - least || 1)) * down;
    const path = (values) => {
      let text = "", pen = false;
      values.forEach((value, layer) => { if (value === null) pen = false; else { text += `${pen ? "L" : "M"}${x(layer).toFixed(1)} ${y(value).toFixed(1)}`; pen = true; } });
      return text;
    };
    const svg = draw("svg", { width, height, role: "img", tabindex: 0, "aria-label": `${yLabel} by layer, ${many(solid.length, "line")}. Left and right move along the layers, up and down between the lines. The values are in the table below.` });
    if (heading) svg.append(draw("text", { x: 2, y: 13 }, heading));
    const half = layers > 1 ? (inner - 8) / (layers - 1) / 2 : inner / 2;
    for (const layer of hatched) for (let from = -half; from < half; from += 5) {
      svg.append(draw("line", { class: "axis", x1: x(layer) + from, x2: x(layer) + Math.min(from + 5, half), y1: top + down, y2: top }));
    }
    const { found, digits } = ticks(least, most);
    for (const value of found) svg.append(draw("line", { class: "axis", x1: left, x2: width - right, y1: y(value), y2: y(value) }), draw("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(digits)));
    const step = Math.max(1, Math.ceil(layers / Math.max(2, Math.floor(inner / 34))));
    for (let layer = 0; layer < layers; layer += step) svg.append(draw("text", { x: x(layer), y: height - 22, "text-anchor": "middle" }, layer));
    svg.append(draw("text", { x: left + inner / 2, y: height - 6, "text-anchor": "middle" }, "MoE layer"));
    lines = new Map();
    const floors = draw("g", { class: "floors" });
    for (const one of [...series].sort((a, b) => Boolean(b.faint) - Boolean(a.faint))) {
      const parts = [];
      if (one.low && one.high && !one.faint) {
        const runs = one.values.map((v, i) => i).filter((i) => one.low[i] !== null && one.high[i] !== null);
        parts.push(draw("path", { class: "band", fill: one.color, d: runs.length ? `M${[...runs.map((i) => `${x(i)} ${y(one.high[i])}`), ...runs.reverse().map((i) => `${x(i)} ${y(one.low[i])}`)].join("L")}Z` : "" }));
      }
      parts.push(draw("path", { class: "series", d: path(one.values), stroke: one.faint ? "var(--line)" : one.color, "stroke-dasharray": one.faint ? null : one.dash, "stroke-width": one.faint ? 1 : null }));
      if (dots) one.values.forEach((value, i) => { if (value !== null) parts.push(draw("circle", { cx: x(i), cy: y(value), r: 4, stroke: one.color, "stroke-width": 1.6, fill: dots(one, i) ? one.color : "var(--paper)" })); });
      if (one.floor && !one.faint) floors.append(draw("path", { class: "floor", d: path(one.floor), "data-name": one.name }));
      svg.append(...parts);
      if (!one.faint) lines.set(one.name, parts);
    }
    svg.append(floors);
    if (zeroLine) svg.append(draw("line", { x1: left, x2: width - right, y1: y(0), y2: y(0), stroke: "var(--quiet)" }));
    const guide = draw("g", { visibility: "hidden" });
    svg.append(guide);
    function point(layer, line, event) {
      at = { layer, line };
      const one = solid[line], value = one.values[layer];
      guide.setAttribute("visibility", "visible");
      guide.replaceChildren(draw("line", { class: "guide", x1: x(layer), x2: x(layer), y1: top, y2: top + down }));
      if (value !== null) guide.append(draw("circle", { cx: x(layer), cy: y(value), r: 4.5, fill: one.color, stroke: "var(--paper)", "stroke-width": 1.5 }));
      const box = svg.getBoundingClientRect();
      showTip(describe(one, layer), event ? event.clientX : box.left + x(layer), event ? event.clientY : box.top + y(value === null ? least : value));
      hovered = one.name; mark();
    }
    const leave = () => { guide.setAttribute("visibility", "hidden"); hovered = null; hideTip(); mark(); };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
      const layer = Math.max(0, Math.min(layers - 1, Math.round(layers > 1 ? ((px - left - 4) / (inner - 8)) * (layers - 1) : 0)));
      const near = solid.map((one, i) => [one.values[layer] === null || one.values[layer] === undefined ? Infinity : Math.abs(y(one.values[layer]) - py), i]).sort((a, b) => a[0] - b[0])[0];
      if (near && near[0] < Infinity) point(layer, near[1], event);
    });
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("click", () => { const name = solid[at.line].name; state.pinned = state.pinned === name ? null : name; mark(); emphasized(); });
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!move) return;
      event.preventDefault();
      point(Math.max(0, Math.min(layers - 1, at.layer + move[0])), (at.line + move[1] + solid.length) % solid.length);
    });
    box.replaceChildren(svg);
    mark();
  }
  redrawn(box, redraw);
  return { mark };
}

// the values of a figure, for readers who do not see it, and to copy
function valuesTable(rows, layers, digits = 3) {
  const columns = [{ name: "" }, ...Array.from({ length: layers }, (_, layer) => ({ name: `${layer}`, number: true }))];
  const body = () => table(columns, rows.map(([name, values]) => [cell(name), ...values.map((v) => cell(shown(v, digits), v))]), { caption: "values by layer" });
  const node = el("details", { ontoggle: () => { if (node.open && node.children.length === 1) node.append(body()); } }, el("summary", {}, "Values as a table"));
  return node;
}

// points with their intervals, a line each: {label, value, low, high}; better is the sign of a good value; gray where zero lies inside
function intervals(host, rows, name, better) {
  redrawn(host, (width) => {
    const left = Math.min(190, width * 0.42), right = 60, line = 24, top = 8, bottom = 38, height = top + rows.length * line + bottom;
    const numbers = rows.flatMap((r) => [r.value, r.low, r.high]).filter((v) => Number.isFinite(v));
    const low = Math.min(0, ...numbers), high = Math.max(0, ...numbers), pad = (high - low || 1) * 0.05;
    const x = (value) => left + ((value - low + pad) / (high - low + 2 * pad)) * (width - left - right);
    const svg = draw("svg", { width, height, role: "img", "aria-label": `${name}: a point with its interval per row; the values are in the table` });
    const { found, digits } = ticks(low - pad, high + pad, Math.max(3, Math.floor((width - left - right) / 70)));
    for (const value of found) svg.append(draw("line", { class: "axis", x1: x(value), x2: x(value), y1: top, y2: height - bottom }), draw("text", { x: x(value), y: height - 22, "text-anchor": "middle" }, value.toFixed(digits)));
    svg.append(draw("line", { x1: x(0), x2: x(0), y1: top, y2: height - bottom, stroke: "var(--quiet)" }), draw("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, name));
    rows.forEach((row, i) => {
      const y = top + i * line + line / 2, unclear = row.value === 0 || (row.low <= 0 && row.high >= 0), color = unclear ? "var(--quiet)" : row.value * better > 0 ? "var(--positive)" : "var(--negative)", known = Number.isFinite(row.value);
      const group = draw("g", { onpointermove: (event) => showTip(`${row.label}\n${name} ${signed(row.value, 4)}${Number.isFinite(row.low) ? `\ninterval ${signed(row.low, 4)} to ${signed(row.high, 4)}` : ""}`, event.clientX, event.clientY), onpointerleave: hideTip },
        draw("rect", { x: 0, y: y - line / 2, width, height: line, fill: "transparent" }),
        draw("text", { x: left - 10, y: y + 4, "text-anchor": "end" }, row.label.length > 28 ? `${row.label.slice(0, 27)}…` : row.label));
      if (Number.isFinite(row.low) && Number.isFinite(row.high)) group.append(draw("line", { x1: x(row.low), x2: x(row.high), y1: y, y2: y, stroke: color, "stroke-width": 2.5 }));
      if (known) group.append(draw("circle", { cx: x(row.value), cy: y, r: 4.5, fill: color }), draw("text", { x: width - right + 8, y: y + 4 }, signed(row.value, 3)));
      svg.append(group);
    });
    host.replaceChildren(svg);
  });
}
