// Texts with the experts of each token, and the tokens of an expert.
const PALETTE = 6;
const traces = data.traces.map((trace) => {
  const ids = unpack(trace.ids), weights = unpack(trace.weights);
  let start = 0;
  const texts = trace.texts.map((text) => { const from = start; start += text.ids.length; return { ...text, start: from, parts: new Map(text.parts.map(([i, part, of]) => [i, [part, of]])) }; });
  return { ...trace, texts, idCodes: ids.codes, none: ids.missing, weightCodes: weights.codes, weightScale: weights.scale };
});
// the experts of token t (of the whole trace) at a place among the traced layers, the largest weight first
function expertsAt(trace, token, place) {
  const found = [], from = (token * trace.layers.length + place) * trace.slots;
  for (let slot = 0; slot < trace.slots; slot++) if (trace.idCodes[from + slot] !== trace.none) found.push({ expert: trace.idCodes[from + slot], weight: trace.weightCodes[from + slot] * trace.weightScale });
  return found.sort((a, b) => b.weight - a.weight);
}
const sameExperts = (a, b) => a.length === b.length && a.every((x) => b.some((y) => y.expert === x.expert));
const visible = (text) => text.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥");
// the direction in which most letters of a text are written: dir="auto" would go by the first one, which is often that of <s>
const RIGHT_TO_LEFT = /[\p{Script=Arabic}\p{Script=Hebrew}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}\p{Script=Adlam}]/gu;
const direction = (text) => {
  const letters = text.pieces.join("");
  return 2 * (letters.match(RIGHT_TO_LEFT) || []).length > (letters.match(/\p{Letter}/gu) || []).length ? "rtl" : "ltr";
};
const partOf = (text, i) => (text.parts.has(i) ? `, part ${text.parts.get(i).join(" of ")} of these characters` : "");
// the place of a token in its text, where those that were not counted (special tokens) have places, too
const positionOf = (text, i) => (text.positions ? text.positions[i] : i);
// a text whose characters are split over tokens shows them once, with the number of the part
function pieceNodes(text, i) {
  const part = text.parts.get(i), piece = visible(text.pieces[i]);
  if (!part) return [piece];
  return part[0] === 1 ? [piece, el("sub", {}, `1/${part[1]}`)] : [el("sub", {}, `${part[0]}/${part[1]}`)];
}
const twin = (trace, text) => trace.texts.find((other) => other.group === text.group && other.item === text.item);

function tokenSection() {
  if (!traces.length) return;
  const explanation = data.hasTexts ? "A text with the experts that each token chose. Colors show the expert with the largest weight in the chosen layer; point at a token for its experts, choose it for all layers." : "A text with the experts that each token chose. Token ids are shown, because no tokenizer was given: pass --tokenizer to see the text.";
  const node = section("tokens", "Tokens and their experts", explanation);
  const state = { trace: 0, beside: traces.length > 1 && twin(traces[1], traces[0].texts[0]) ? 1 : -1, text: 0, place: Math.floor(traces[0].layers.length / 2), token: 0, lit: null };
  const controls = el("div", { class: "controls" }), legend = el("ul", { class: "swatches", "aria-label": "Experts of this layer; press one to see its tokens" }), summary = el("p", { class: "note" }), panels = el("div", { class: "texts" }), details = el("div", { "aria-live": "polite" }), all = el("div", {});
  node.append(controls, legend, panels, summary, details, el("details", { open: traces[0].layers.length <= 16, ontoggle: (event) => { state.open = event.target.open; grid(); } }, el("summary", {}, "All layers of this text"), all));
  state.open = traces[0].layers.length <= 16;

  function control() {
    const trace = traces[state.trace], byGroup = Object.create(null);
    trace.texts.forEach((text, i) => (byGroup[label(text.group)] = byGroup[label(text.group)] || []).push([i, `${label(text.group)} · ${text.item}`]));
    controls.replaceChildren(
      traces.length > 1 ? select("Trace", traces.map((t, i) => [i, t.name]), state.trace, (v) => { const before = trace.texts[state.text]; state.trace = Number(v); if (state.beside === state.trace) state.beside = -1; state.text = Math.max(0, traces[state.trace].texts.findIndex((t) => t.group === before.group && t.item === before.item)); state.place = Math.min(state.place, traces[state.trace].layers.length - 1); control(); show(); }) : "",
      traces.length > 1 ? select("beside", [[-1, "nothing"], ...traces.map((t, i) => [i, t.name]).filter(([i]) => i !== state.trace)], state.beside, (v) => { state.beside = Number(v); show(); }) : "",
      select("Text", byGroup, state.text, (v) => { state.text = Number(v); state.token = 0; show(); }),
      slider("Layer", trace.layers.length, trace.layers.map(String), state.place, (v) => { state.place = v; state.lit = null; show(); }));
  }
  // the traces shown, each with its text; and the place of the layer in it
  function sides() {
    const trace = traces[state.trace], text = trace.texts[state.text], found = [{ trace, text }];
    const other = state.beside >= 0 ? traces[state.beside] : null, same = other && twin(other, text);
    if (same) found.push({ trace: other, text: same });
    return found.map((side) => ({ ...side, place: side.trace.layers.indexOf(trace.layers[state.place]) })).filter((side) => side.place >= 0);
  }
  // upright where it fits the column: letters of most scripts cannot be read lying on their side
  function heading(text, piece, i) {
    const shown = text.parts.has(i) ? `${piece.trim()} ${text.parts.get(i).join("/")}` : visible(piece).trim() || "␣";
    return el("th", { scope: "col", class: [...shown].length <= 3 ? "short" : null }, el("bdi", {}, shown));
  }
  const chosen = (side, i, place = side.place) => expertsAt(side.trace, side.text.start + i, place);
  // where the same token chose other experts in the other trace
  function changed(list, side, i, layer) {
    const other = list.find((s) => s !== side);
    if (!other || other.text.ids[i] !== side.text.ids[i]) return false;
    const [mine, theirs] = [side, other].map((s) => s.trace.layers.indexOf(layer));
    return theirs >= 0 && !sameExperts(chosen(side, i, mine), chosen(other, i, theirs));
  }
  function show() {
    const list = sides(), counts = new Map();
    for (const side of list) side.text.ids.forEach((_, i) => { const top = chosen(side, i)[0]; if (top) counts.set(top.expert, (counts.get(top.expert) || 0) + 1); });
    const order = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]), colors = new Map(order.slice(0, PALETTE).map(([expert], i) => [expert, `var(--c${i})`]));
    const layer = traces[state.trace].layers[state.place];
    const rest = order.slice(PALETTE).reduce((sum, [, n]) => sum + n, 0);
    legend.replaceChildren(...order.slice(0, PALETTE).map(([expert, n]) => el("li", {}, el("button", { type: "button", "aria-pressed": String(state.lit === expert), onclick: () => { state.lit = state.lit === expert ? null : expert; show(); contexts(layer, expert, false); } }, el("i", { style: { background: colors.get(expert) } }), `expert ${expert} (${n})`))),
      rest ? el("li", {}, el("span", { class: "note" }, `${many(order.length - PALETTE, "other expert")}, gray (${rest})`)) : "");
    panels.replaceChildren(...list.map((side, s) => panel(list, side, s, colors, layer)));
    if (list.length > 1) {
      const [a, b] = list, n = Math.min(a.text.ids.length, b.text.ids.length), same = [...Array(n).keys()].filter((i) => a.text.ids[i] === b.text.ids[i]), moved = same.filter((i) => changed(list, a, i, layer)).length;
      summary.textContent = `Underlined: tokens that choose other experts in layer ${layer} than in the other trace, ${moved} of ${same.length}.`;
    } else summary.textContent = state.beside >= 0 ? "The other trace does not hold this text." : "";
    detail(list);
    grid();
  }
  function panel(list, side, s, colors, layer) {
    const body = el("p", { class: "tokens", dir: direction(side.text), role: "group", "aria-label": `Tokens, ${side.trace.name}. Arrow keys move between tokens.` });
    const spans = side.text.pieces.map((_, i) => {
      const experts = chosen(side, i), top = experts[0], color = top && colors.get(top.expert);
      const classes = ["token", changed(list, side, i, layer) && "changed", i >= side.text.prompt && "generated", i === state.token && "current", state.lit !== null && !experts.some((e) => e.expert === state.lit) && "faded"].filter(Boolean).join(" ");
      return el("span", { class: classes, tabindex: i === state.token ? 0 : -1, role: "button", "data-token": i, style: { background: `color-mix(in srgb, ${color || "var(--quiet)"} ${color ? 34 : 13}%, transparent)` } }, pieceNodes(side.text, i));
    });
    const about = (i) => `${JSON.stringify(side.text.pieces[i])}${partOf(side.text, i)}\ntoken id ${side.text.ids[i]}, position ${positionOf(side.text, i)}\nlayer ${layer}: ${chosen(side, i).map((e) => `expert ${e.expert} (${e.weight.toFixed(2)})`).join(", ") || "no expert"}`;
    const number = (event) => { const span = event.target.closest(".token"); return span ? Number(span.dataset.token) : -1; };
    function move(i, focus) {
      state.token = i;
      panels.querySelectorAll(".token").forEach((span) => { const on = Number(span.dataset.token) === i; span.classList.toggle("current", on); span.tabIndex = on ? 0 : -1; });
      detail(list);
      if (focus) { spans[i].focus(); const box = spans[i].getBoundingClientRect(); showTip(about(i), box.left, box.bottom - 12); }
    }
    body.addEventListener("pointerover", (event) => { const i = number(event); if (i >= 0) showTip(about(i), event.clientX, event.clientY); });
    body.addEventListener("pointerout", hideTip);
    body.addEventListener("click", (event) => { const i = number(event); if (i >= 0) move(i, false); });
    body.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[event.key], i = number(event);
      if (step === undefined || i < 0) return;
      event.preventDefault();
      move(Math.max(0, Math.min(spans.length - 1, i + step * (event.key.match(/Left|Right/) && getComputedStyle(body).direction === "rtl" ? -1 : 1))), true);
    });
    body.addEventListener("focusout", hideTip);
    body.append(...spans);
    return el("div", {}, list.length > 1 ? el("h3", {}, side.trace.name) : "", body);
  }
  function detail(list) {
    const i = state.token, [side] = list;
    if (!side || i >= side.text.ids.length) { details.replaceChildren(); return; }
    const shownSides = list.filter((s) => i < s.text.ids.length), columns = shownSides.map((s) => (list.length > 1 ? s.trace.name : "experts, largest weight first"));
    const layers = side.trace.layers;
    details.replaceChildren(el("h3", {}, `Token ${i}: `, el("bdi", {}, JSON.stringify(side.text.pieces[i])), el("span", { class: "quiet" }, ` id ${side.text.ids[i]}${partOf(side.text, i)}${i >= side.text.prompt ? ", generated" : ""}`)),
      el("div", { class: layers.length > 10 ? "scroll tall" : "scroll", tabindex: 0, role: "region", "aria-label": "experts of this token in all layers" }, el("table", { class: "wrapped" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Layer"), columns.map((c) => el("th", { scope: "col" }, c)))),
        el("tbody", {}, layers.map((layer) => el("tr", {}, el("th", { scope: "row" }, layer), shownSides.map((s) => { const p = s.trace.layers.indexOf(layer); return el("td", {}, p < 0 ? "–" : chosen(s, i, p).map((e) => `${e.expert} (${e.weight.toFixed(2)})`).join(", ") || "–", changed(list, s, i, layer) && s !== side ? " · changed" : ""); })))))));
  }
  function grid() {
    if (!state.open) { all.replaceChildren(); return; }
    const list = sides();
    all.replaceChildren(...list.flatMap((side) => {
      const cells = (place, layer) => side.text.ids.map((_, i) => {
        const top = chosen(side, i, place)[0];
        return el("td", { class: changed(list, side, i, layer) ? "changed" : null, "data-token": i, "data-place": place, style: top ? { background: `color-mix(in srgb, var(--c0) ${Math.round(55 * Math.min(1, top.weight))}%, transparent)` } : {} }, top ? top.expert : "–");
      });
      const body = el("tbody", {}, side.trace.layers.map((layer, place) => el("tr", {}, el("th", { scope: "row" }, layer), cells(place, layer))));
      const about = (event) => { const d = event.target.dataset; if (d.token === undefined) return null; const i = Number(d.token), place = Number(d.place); return `${JSON.stringify(side.text.pieces[i])}\nlayer ${side.trace.layers[place]}: ${chosen(side, i, place).map((e) => `expert ${e.expert} (${e.weight.toFixed(2)})`).join(", ")}`; };
      body.addEventListener("pointerover", (event) => { const text = about(event); if (text) showTip(text, event.clientX, event.clientY); else hideTip(); });
      body.addEventListener("pointerout", hideTip);
      body.addEventListener("click", (event) => { const d = event.target.dataset; if (d.token === undefined) return; const top = chosen(side, Number(d.token), Number(d.place))[0]; if (top) contexts(side.trace.layers[Number(d.place)], top.expert, true); });
      return [list.length > 1 ? el("h3", {}, side.trace.name) : "", el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `experts of all layers, ${side.trace.name}` }, el("table", { class: "grid" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "layer"), side.text.pieces.map((piece, i) => heading(side.text, piece, i)))), body))];
    }), el("p", { class: "note" }, `The expert with the largest weight of each token (column) in each layer (row); the darker, the larger the weight.${list.length > 1 ? " Framed: other experts than in the other trace." : ""} Choose a cell to see that expert's tokens.`));
  }
  const contexts = contextSection();
  control();
  show();
}

function contextSection() {
  const node = section("contexts", "An expert's tokens in context", "Where one expert was chosen, by language, the largest weight first. It is read from the traced texts only, so an expert without entries may still be used elsewhere.");
  const t0 = traces[0], state = { trace: 0, layer: t0.layers[Math.floor(t0.layers.length / 2)], expert: null, strongest: false };
  const controls = el("div", { class: "controls" }), found = el("div", { "aria-live": "polite" });
  node.append(controls, found);
  const expertsOf = () => { const trace = traces[state.trace], place = trace.layers.indexOf(state.layer), counts = new Map(); for (let t = 0; t < trace.tokens; t++) for (const e of expertsAt(trace, t, place)) counts.set(e.expert, (counts.get(e.expert) || 0) + 1); return [...counts].sort((a, b) => a[0] - b[0]); };
  function control() {
    const trace = traces[state.trace];
    if (!trace.layers.includes(state.layer)) state.layer = trace.layers[0];
    const counts = expertsOf();
    if (state.expert === null && counts.length) state.expert = [...counts].sort((a, b) => b[1] - a[1])[0][0];
    if (state.expert !== null && !counts.some(([e]) => e === state.expert)) counts.push([state.expert, 0]);
    controls.replaceChildren(
      traces.length > 1 ? select("Trace", traces.map((t, i) => [i, t.name]), state.trace, (v) => { state.trace = Number(v); control(); show(); }) : "",
      select("Layer", trace.layers.map((l) => [l, l]), state.layer, (v) => { state.layer = Number(v); state.expert = null; control(); show(); }),
      select("Expert", counts.sort((a, b) => a[0] - b[0]).map(([e, n]) => [e, `${e} (${many(n, "token")})`]), state.expert, (v) => { state.expert = Number(v); show(); }),
      select("Count tokens", [["any", "that choose it"], ["top", "that give it the largest weight"]], state.strongest ? "top" : "any", (v) => { state.strongest = v === "top"; show(); }));
  }
  function show() {
    const trace = traces[state.trace], place = trace.layers.indexOf(state.layer), groups = new Map();
    let total = 0;
    for (const text of trace.texts) {
      if (!groups.has(text.group)) groups.set(text.group, { tokens: 0, hits: [] });
      const group = groups.get(text.group);
      text.ids.forEach((_, i) => {
        const experts = expertsAt(trace, text.start + i, place), hit = experts.find((e) => e.expert === state.expert);
        group.tokens += 1;
        if (hit && !(state.strongest && experts[0] !== hit)) { group.hits.push({ text, i, weight: hit.weight }); total += 1; }
      });
    }
    const ordered = [...groups].sort((a, b) => b[1].hits.length / b[1].tokens - a[1].hits.length / a[1].tokens), most = Math.max(...ordered.map(([, g]) => g.hits.length / g.tokens), 1e-9);
    found.replaceChildren(el("p", {}, `Expert ${state.expert} of layer ${state.layer}: ${many(total, "token")} of ${trace.tokens.toLocaleString("en")} traced.`),
      el("div", { class: "bars" }, ordered.flatMap(([group, g]) => [el("span", {}, label(group)), el("i", { style: { width: `${(100 * g.hits.length) / g.tokens / most}%` } }), el("span", {}, `${percent(g.hits.length / g.tokens)} (${g.hits.length})`)])),
      ...ordered.filter(([, g]) => g.hits.length).map(([group, g], n) => {
        const hits = g.hits.sort((a, b) => b.weight - a.weight), limit = 12;
        const items = (list) => list.map(({ text, i, weight }) => el("li", {}, el("span", { class: "weight" }, weight.toFixed(2)), context(text, i)));
        const list = el("ul", { class: "contexts" }, items(hits.slice(0, limit)));
        const more = hits.length > limit ? el("button", { type: "button", onclick: () => { list.append(...items(hits.slice(limit))); more.remove(); } }, `Show ${hits.length - limit} more`) : "";
        return el("details", { open: n < 2 }, el("summary", {}, `${label(group)}: ${many(hits.length, "token")}`), list, more);
      }));
  }
  // some tokens before and after; parts of one character are joined
  function context(text, i) {
    const around = 9, runStart = (k) => (text.parts.has(k) ? k - text.parts.get(k)[0] + 1 : k), runEnd = (k) => (text.parts.has(k) ? runStart(k) + text.parts.get(k)[1] : k + 1);
    const [a, b] = [runStart(i), runEnd(i)];
    const join = (from, to) => { let out = ""; for (let k = Math.max(0, from); k < Math.min(to, text.pieces.length); k++) if (!text.parts.has(k) || text.parts.get(k)[0] === 1) out += visible(text.pieces[k]); return out; };
    const combines = (k) => /^\p{Mark}/u.test(text.pieces[k] || ""); // an excerpt neither begins nor ends inside a letter
    let from = runStart(Math.max(0, a - around)), to = Math.min(text.pieces.length, b + around);
    while (from > 0 && combines(from)) from = runStart(from - 1);
    while (to < text.pieces.length && combines(to)) to += 1;
    return el("q", { dir: direction(text) }, from > 0 ? "…" : "", join(from, a), el("mark", {}, join(a, b), text.parts.has(i) ? el("sub", {}, text.parts.get(i).join("/")) : ""), join(b, to), to < text.pieces.length ? "…" : "");
  }
  showTokensOf = (layer, expert) => { state.layer = layer; state.expert = expert; control(); show(); node.scrollIntoView(); };
  control();
  show();
  return (layer, expert, scroll) => { state.layer = layer; state.expert = expert; control(); show(); if (scroll) node.scrollIntoView(); };
}

function cardSection() {
  const found = data.cards;
  if (!found || !found.cards.length) return;
  const node = section("cards", "What each expert answers to", `The tokens that choose an expert most surely, each behind the token before it, among those that occur twice or more in ${found.trace}. Recall is how well the token's id predicts the expert, and how well it does with the token before: counted in half of the texts (${many(found.tokens[0], "token")}), tried on the other (${many(found.tokens[1], "token")}). An explanation of an expert should do better.`);
  const state = { place: Math.floor(found.layers.length / 2), order: "recall" };
  const controls = el("div", { class: "controls" }), cards = el("div", { class: "cards" });
  node.append(controls, cards);
  const known = (value) => (value === null ? -1 : value);
  const written = (text) => (text === "" ? el("span", { class: "quiet" }, "(start) ") : visible(text));
  function card({ layer, expert, recall, contexts }) {
    const items = contexts.map(([before, token, share, times]) => el("li", {}, el("span", { class: "weight" }, percent(share)), el("q", { dir: direction({ pieces: [before, token] }) }, written(before), el("mark", {}, visible(token)), el("span", { class: "quiet" }, ` ${times}×`))));
    return el("article", { "aria-label": `Layer ${layer}, expert ${expert}` }, el("h3", {}, `Expert ${expert}`), el("p", { class: "note" }, `recall ${shown(recall[0], 2)} by token, ${shown(recall[1], 2)} with the one before`),
      items.length ? el("ul", { class: "contexts" }, items) : el("p", { class: "note" }, "no context occurs twice"),
      showTokensOf ? el("button", { type: "button", onclick: () => showTokensOf(layer, expert) }, `All tokens of expert ${expert}`) : "");
  }
  function show() {
    const layer = found.layers[state.place], here = found.cards.filter((one) => one.layer === layer);
    here.sort((a, b) => (state.order === "id" ? a.expert - b.expert : known(b.recall[1]) - known(a.recall[1]) || a.expert - b.expert));
    cards.replaceChildren(...here.map(card));
  }
  controls.append(slider("Layer", found.layers.length, found.layers.map(String), state.place, (v) => { state.place = v; show(); }),
    select("Order", [["recall", "most predictable first"], ["id", "by id"]], state.order, (v) => { state.order = v; show(); }));
  show();
}
