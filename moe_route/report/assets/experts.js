// How often each expert is chosen: heat map, table, and one expert in all groups.
const frequencies = Object.create(null);
for (const name of recordings) {
  const r = data.recordings[name];
  if (!r.frequency) continue;
  frequencies[name] = { ...unpack(r.frequency.values), by: r.frequency.by, groups: r.groups, experts: r.facts.experts, layers: r.facts.layers, widest: Math.max(...r.facts.experts) };
}
function frequency(name, group, layer, expert) {
  const f = frequencies[name], g = f.groups.indexOf(group);
  if (g < 0 || layer >= f.layers || expert >= f.experts[layer]) return NaN;
  const code = f.codes[(g * f.layers + layer) * f.widest + expert];
  return code === f.missing ? NaN : code * f.scale;
}

let showTokensOf = null; // set by the token view: (layer, expert)

function expertsSection() {
  const names = Object.keys(frequencies);
  if (!names.length) return;
  const f0 = frequencies[names[0]];
  const node = section("experts", "Experts by layer", "How often a token chooses each expert, and the difference to another group. Choose a cell to see that expert in every group.");
  const key = (name, group) => JSON.stringify([name, group]);
  const groupsOf = (name) => frequencies[name].groups.map((group) => [key(name, group), label(group)]);
  const options = names.length > 1 ? Object.fromEntries(names.map((n) => [n, groupsOf(n)])) : groupsOf(names[0]);
  const alike = (name, other) => frequencies[name].layers === frequencies[other].layers && frequencies[name].experts.join() === frequencies[other].experts.join();
  const reference = data.recordings[names[0]].reference;
  const first = f0.groups.find((group) => group !== reference) || f0.groups[0];
  const other = names.find((n) => n !== names[0] && alike(names[0], n) && frequencies[n].groups.includes(first));
  const base = f0.groups.length > 1 ? key(names[0], reference) : other ? key(other, first) : "none";
  const state = { shown: key(names[0], first), base, order: "id", mark: data.marks.length ? "0" : "none", layer: 0, expert: 0, chosen: false };
  const bases = () => {
    const [name] = JSON.parse(state.shown);
    const fit = names.filter((n) => alike(name, n));
    const given = fit.map((n) => [n, groupsOf(n).filter(([k]) => k !== state.shown)]);
    return { "": [["none", "nothing: the frequency itself"]], ...Object.fromEntries(given.map(([n, list]) => [several ? n : "Groups", list])) };
  };
  const controls = el("div", { class: "controls" }), host = el("div", { class: "scroll heat" }), scale = el("p", { class: "scale" }), note = el("figcaption", {}), list = el("div", {}), one = el("div", { "aria-live": "polite" });
  function control() {
    const inside = Object.values(bases()).flat().some(([k]) => k === state.base);
    if (!inside) state.base = "none";
    controls.replaceChildren(
      select("Show", options, state.shown, (v) => { state.shown = v; control(); show(); }),
      select("minus", bases(), state.base, (v) => { state.base = v; show(); }),
      select("Order in a layer", [["id", "by id"], ["value", "largest first"]], state.order, (v) => { state.order = v; show(); }),
      data.marks.length ? select("Outlined experts", [["none", "none"], ...data.marks.map((m, i) => [String(i), titled(m)])], state.mark, (v) => { state.mark = v; show(); }) : "");
  }
  function values() {
    const [name, group] = JSON.parse(state.shown), f = frequencies[name], minus = state.base === "none" ? null : JSON.parse(state.base);
    const cells = [];
    for (let layer = 0; layer < f.layers; layer++) for (let expert = 0; expert < f.experts[layer]; expert++) {
      const own = frequency(name, group, layer, expert), compared = minus ? frequency(...minus, layer, expert) : NaN;
      cells.push({ layer, expert, own, compared, value: minus ? own - compared : own });
    }
    return { name, group, minus, f, cells };
  }
  const title = (v) => label(v.group) + (names.length > 1 ? ` (${v.name})` : "");
  const titleOfBase = (v) => label(v.minus[1]) + (names.length > 1 ? ` (${v.minus[0]})` : "");
  const marked = () => new Set(state.mark === "none" ? [] : data.marks[Number(state.mark)].experts.map(([l, e]) => `${l},${e}`));
  const text = (v, c) => `layer ${c.layer}, expert ${c.expert}${marked().has(`${c.layer},${c.expert}`) ? " (outlined)" : ""}\n${title(v)}: ${shown(c.own, 4)}${v.minus ? `\n${titleOfBase(v)}: ${shown(c.compared, 4)}\ndifference ${signed(c.value, 4)}` : ""}`;
  let current = null, again = null;
  function show() {
    current = values();
    const v = current, sizes = v.cells.map((c) => Math.abs(c.value)).filter((x) => !Number.isNaN(x)).sort((a, b) => a - b);
    const limit = sizes[Math.min(sizes.length - 1, Math.ceil(0.98 * sizes.length))] || 1;
    v.limit = limit;
    v.rows = Array.from({ length: v.f.layers }, (_, layer) => v.cells.filter((c) => c.layer === layer));
    if (state.order === "value") v.rows.forEach((row) => row.sort((a, b) => (Number.isNaN(b.value) ? -1 : b.value) - (Number.isNaN(a.value) ? -1 : a.value)));
    scale.replaceChildren(v.minus ? `−${limit.toFixed(3)}` : "0", el("i", { "aria-hidden": "true", style: { background: v.minus ? "linear-gradient(to right, var(--negative), transparent, var(--positive))" : "linear-gradient(to right, transparent, var(--positive))" } }), `${v.minus ? "+" : ""}${limit.toFixed(3)} and beyond`);
    note.textContent = `${title(v)}${v.minus ? ` minus ${titleOfBase(v)}` : ""}: mean number of times that a token chooses the expert, ${v.f.by === "sequence" ? "averaged over each text, then over texts" : "over all tokens"}. A row is a layer${state.order === "id" ? ", a column an expert" : "; its experts are sorted by value, so columns are ranks"}.${v.minus ? " Blue: chosen more often, orange: less often." : ""} Colors end at the 98th percentile.${state.mark === "none" ? "" : ` Outlined: ${titled(data.marks[Number(state.mark)])}.`}`;
    if (again) again.again();
    ranking(v);
    if (state.chosen) expert(false);
  }
  function redraw(width) {
    const v = current, left = 34, top = 4, bottom = 38, w = Math.max(6, Math.min(64, (width - left - 2) / v.f.widest)), h = Math.max(10, Math.min(28, 420 / v.f.layers));
    const outlined = marked(), full = left + w * v.f.widest + 2, tall = top + h * v.f.layers + bottom;
    const svg = draw("svg", { width: full, height: tall, role: "img", tabindex: 0, "aria-label": "Heat map of experts by layer. Arrow keys move, Enter chooses an expert; the table below holds the largest values." });
    const marks = draw("g", {});
    v.rows.forEach((row, y) => {
      row.forEach((c, x) => {
        const empty = Number.isNaN(c.value);
        svg.append(draw("rect", { class: "cell", x: (left + x * w).toFixed(2), y: (top + y * h).toFixed(2), width: Math.max(w - 0.6, 1).toFixed(2), height: h - 0.6, fill: empty ? "var(--line)" : c.value < 0 ? "var(--negative)" : "var(--positive)", "fill-opacity": empty ? 1 : Math.min(1, Math.abs(c.value) / v.limit).toFixed(3), "data-layer": c.layer, "data-expert": c.expert }));
        if (outlined.has(`${c.layer},${c.expert}`)) marks.append(draw("rect", { class: "marked", x: left + x * w + 0.5, y: top + y * h + 0.5, width: Math.max(w - 1.6, 1), height: h - 1.6 }));
      });
      if (y % Math.ceil(14 / h) === 0) svg.append(draw("text", { x: left - 6, y: top + y * h + h / 2 + 4, "text-anchor": "end" }, y));
    });
    const step = Math.max(1, Math.ceil(26 / w)) > 1 ? 2 ** Math.ceil(Math.log2(26 / w)) : 1;
    for (let x = 0; x < v.f.widest; x += step) svg.append(draw("text", { x: left + x * w + w / 2, y: tall - 22, "text-anchor": "middle" }, x));
    svg.append(draw("text", { x: left + (w * v.f.widest) / 2, y: tall - 6, "text-anchor": "middle" }, state.order === "id" ? "expert" : "rank in the layer"));
    const cursor = draw("rect", { class: "cursor", width: w, height: h, visibility: "hidden" });
    svg.append(marks, cursor);
    const at = { x: 0, y: 0 };
    function point(x, y, event) {
      const c = v.rows[y] && v.rows[y][x];
      if (!c) return leave();
      Object.assign(at, { x, y });
      cursor.setAttribute("x", left + x * w); cursor.setAttribute("y", top + y * h); cursor.setAttribute("visibility", "visible");
      const box = svg.getBoundingClientRect();
      showTip(text(v, c), event ? event.clientX : box.left + left + (x + 1) * w, event ? event.clientY : box.top + top + (y + 1) * h);
    }
    const place = (event) => { const box = svg.getBoundingClientRect(); return [Math.floor((event.clientX - box.left - left) / w), Math.floor((event.clientY - box.top - top) / h)]; };
    const leave = () => { cursor.setAttribute("visibility", "hidden"); hideTip(); };
    const take = () => { const c = v.rows[at.y][at.x]; Object.assign(state, { layer: c.layer, expert: c.expert, chosen: true }); expert(false); };
    svg.addEventListener("pointermove", (event) => point(...place(event), event));
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("click", (event) => { const [x, y] = place(event); if (v.rows[y] && v.rows[y][x]) { Object.assign(at, { x, y }); take(); } });
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); take(); }
      if (!move) return;
      event.preventDefault();
      const y = Math.max(0, Math.min(v.rows.length - 1, at.y + move[1]));
      point(Math.max(0, Math.min(v.rows[y].length - 1, at.x + move[0])), y);
    });
    host.replaceChildren(svg);
  }
  function choose(layer, number) { Object.assign(state, { layer, expert: number, chosen: true }); expert(true); }
  function ranking(v) {
    const outlined = marked();
    const top = v.cells.filter((c) => !Number.isNaN(c.value)).sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, 60);
    const columns = [{ name: "Layer", number: true }, { name: "Expert", number: true }, ...(v.minus ? [{ name: "Difference", number: true }] : []), { name: title(v), number: true }, ...(v.minus ? [{ name: titleOfBase(v), number: true }] : []), ...(data.marks.length ? [{ name: "Outlined" }] : []), { name: null }];
    list.replaceChildren(table(columns, top.map((c) => [cell(c.layer, c.layer), cell(c.expert, c.expert), ...(v.minus ? [cell(signed(c.value, 4), c.value)] : []), cell(shown(c.own, 4), c.own), ...(v.minus ? [cell(shown(c.compared, 4), c.compared)] : []), ...(data.marks.length ? [cell(outlined.has(`${c.layer},${c.expert}`) ? "yes" : "")] : []),
      { node: el("button", { type: "button", "aria-label": `Layer ${c.layer}, expert ${c.expert} in every group`, onclick: () => choose(c.layer, c.expert) }, "all groups"), key: 0 }]), { caption: "experts with the largest values", tall: true, sort: 2 }));
  }
  function expert(scroll) {
    const v = current, rows = v.f.groups.map((group) => [group, frequency(v.name, group, state.layer, state.expert)]).sort((a, b) => b[1] - a[1]), most = Math.max(...rows.map((r) => r[1]), 1e-9);
    one.replaceChildren(el("h3", { tabindex: -1 }, `Layer ${state.layer}, expert ${state.expert}`), el("div", { class: "bars" }, rows.flatMap(([group, value]) => [el("span", {}, label(group)), el("i", { style: { width: `${(100 * value) / most}%` } }), el("span", {}, shown(value, 4))])),
      showTokensOf ? el("p", {}, el("button", { type: "button", onclick: () => showTokensOf(state.layer, state.expert) }, "Show its tokens in context")) : "");
    if (scroll) { one.firstChild.focus({ preventScroll: true }); one.scrollIntoView({ block: "nearest" }); }
  }
  node.append(controls, el("figure", {}, host, scale, note), one, el("h3", {}, "Largest values"), el("p", { class: "note" }, "The 60 experts with the largest value or difference of what is shown above. Press a heading to sort."), list);
  control();
  show();
  again = redrawn(host, redraw);
}
