// What was counted; divergence, correlation, load and results.
const recordings = Object.keys(data.recordings);
const several = recordings.length > 1;

function countedSection() {
  if (!recordings.length && !data.marks.length) return;
  const node = section("counted", "What was counted", "Every figure below rests on these counts. A token is counted once per layer; padding is not counted.");
  if (data.warnings.length) node.append(el("div", { class: "warnings", role: "note" }, el("strong", {}, "To keep in mind"), el("ul", {}, data.warnings.map((text) => el("li", {}, text)))));
  const perName = recordings.map((name) => data.recordings[name].facts);
  const code = (text, length) => el("code", {}, String(text).slice(0, length));
  const kinds = {
    Model: (f) => `${f.model.name || "not named"}${f.model.class ? ` (${f.model.class})` : ""}`,
    Routers: (f) => `${many(f.layers, "MoE layer")} of ${[...new Set(f.experts)].join(" or ")} experts, of which a token uses ${[...new Set(f.topK)].join(" or ")}`,
    Counted: (f) => `${many(f.groups.reduce((sum, g) => sum + g.tokens, 0), "token")} in ${many(f.groups.length, "group")}${f.masked.length ? `; left out: ${f.masked.join(", ")}` : ""}`,
    "Special tokens": (f) => (f.specialTokens ? `${many(f.specialTokens, "id")} left out` : "counted"),
    "Cut texts": (f) => (f.cutTexts ? `${f.cutTexts}, after ${f.cutTo.join(" or ")} tokens` : "none"),
    Steering: (f) => (f.plans.length ? el("span", {}, "under plan ", f.plans.map((p) => [code(p, 12), " "])) : "none: the model's own choice"),
    Check: (f) => (f.conservation === null ? "counts were not recorded" : f.conservation.holds ? `complete: all ${f.conservation.slots.toLocaleString("en")} choices (tokens × layers × experts per token) are accounted for${f.conservation.largestGap ? `, within ${f.conservation.largestGap.toExponential(1)}` : ""}` : `broken: choices are missing or counted twice, by ${f.conservation.largestGap}`),
    Configuration: (f) => (f.model.config_hash ? code(f.model.config_hash, 16) : "unknown"),
    Versions: (f) => Object.entries(f.versions).map(([k, v]) => `${k} ${v}`).join(", ") || "unknown",
    Recorder: (f) => `${f.source}${f.engines.length ? `, engine ${f.engines.join(", ")}` : ""}${f.backends.length ? `, by ${f.backends.join(" and ")}` : ""}`,
  };
  // a fact that all recordings share is written once, over their columns
  const facts = (of) => {
    const cells = perName.map((f) => el("td", { class: several ? "wide" : null }, of(f)));
    if (!several || cells.some((one) => one.textContent !== cells[0].textContent)) return cells;
    cells[0].colSpan = cells.length;
    return [cells[0]];
  };
  if (recordings.length) {
    node.append(el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "what was counted" }, el("table", { class: "facts" },
      several ? el("thead", {}, el("tr", {}, el("td", {}), recordings.map((name) => el("th", { scope: "col" }, `Recording ${name}`)))) : "",
      el("tbody", {}, Object.entries(kinds).map(([key, of]) => el("tr", {}, el("th", { scope: "row" }, key), facts(of)))))));
    const groups = [...new Set(perName.flatMap((f) => f.groups.map((g) => g.name)))];
    const columns = recordings.flatMap((name) => { const of = several ? `, ${name}` : ""; return [{ name: `Tokens${of}`, number: true }, { name: `Sequences${of}`, number: true }, { name: `Tokens per sequence${of}`, number: true }]; });
    const counts = (f, group) => { const g = f.groups.find((one) => one.name === group); return g ? [cell(g.tokens.toLocaleString("en"), g.tokens), cell(g.sequences.toLocaleString("en"), g.sequences), cell(g.sequences ? (g.tokens / g.sequences).toFixed(1) : "–", g.sequences ? g.tokens / g.sequences : NaN)] : [cell("–", NaN), cell("–", NaN), cell("–", NaN)]; };
    node.append(el("details", {}, el("summary", {}, `Tokens of ${many(groups.length, "group")}`), table([{ name: "Group" }, { name: "Code" }, ...columns], groups.map((group) => [cell(label(group)), cell(group), ...perName.flatMap((f) => counts(f, group))]), { caption: "tokens by group", tall: groups.length > 14 })));
  }
  for (const mark of data.marks) node.append(el("details", {}, el("summary", {}, `${titled(mark)}: ${many(mark.experts.length, "expert")}${mark.hash ? `, hash ${mark.hash.slice(0, 12)}` : ""}`), el("p", { style: { whiteSpace: "pre-wrap" } }, mark.description || "It has no description.")));
}
// "plan steer" for a plan named steer, "plan" for one named plan
const titled = (mark) => (mark.name === mark.kind ? mark.kind : `${mark.kind} ${mark.name}`);

// the recording of a section, with a choice where there are several; show(host, name, controls)
function perRecording(node, names, show) {
  const host = el("div", {}), more = el("div", { class: "controls inner" }), bar = el("div", { class: "controls" });
  const of = (name) => { host.replaceChildren(); more.replaceChildren(); show(host, name, more); };
  if (names.length > 1) bar.append(select("Recording", names.map((n) => [n, n]), names[0], of));
  bar.append(more);
  node.append(bar, host);
  of(names[0]);
}

function divergenceSection() {
  const names = recordings.filter((name) => data.recordings[name].divergence);
  if (!names.length) return;
  const node = section("divergence", "Divergence by layer", "How differently each group is routed from the reference: 0 is routed alike. In multilingual models the line often falls in the middle layers and rises at both ends, the shape of a U.");
  perRecording(node, names, (host, name, controls) => {
    const d = data.recordings[name].divergence, state = {};
    const normalized = d.measure === "normalized_jsd";
    const all = d.groups.map((group, g) => ({ name: group, label: label(group), values: d.values[g], low: d.low && d.low[g], high: d.high && d.high[g], floor: d.floor && d.floor[g], ...styleOf(group) }))
      .sort((a, b) => mean(b.values) - mean(a.values));
    const describe = (one, layer) => [one.label, `layer ${layer}: ${shown(one.values[layer])}`, one.low ? `${100 * d.level} % interval ${shown(one.low[layer])} to ${shown(one.high[layer])}` : null, one.floor ? `floor ${shown(one.floor[layer])}` : null].filter(Boolean).join("\n");
    const most = Math.max(...all.flatMap((s) => [...s.values, ...(s.high || [])]).filter((v) => v !== null)) * 1.04 || 1;
    const bounds = [Math.min(0, ...all.flatMap((s) => s.values).filter((v) => v !== null)), most];
    const view = el("div", {});
    const scripts = [...new Set(all.map((s) => language(s.name).script || "Other groups"))].sort();
    function show(mode) {
      view.replaceChildren();
      if (mode === "one") {
        const chart = el("div", {});
        view.append(chart);
        lineChart(chart, { series: all, yLabel: "Routing divergence", describe, state, bounds, hatched: d.even });
        return;
      }
      const grid = el("div", { class: "multiples" });
      for (const script of scripts) {
        const chart = el("div", {}), mine = (s) => (language(s.name).script || "Other groups") === script;
        lineChart(chart, { series: all.map((s) => ({ ...s, faint: !mine(s) })), yLabel: `Routing divergence, ${script}`, heading: "", describe, height: 190, bounds, hatched: d.even });
        grid.append(el("div", {}, el("h3", {}, script), chart));
      }
      view.append(grid);
    }
    const first = all.length > 12 && scripts.length > 1 ? "scripts" : "one";
    if (scripts.length > 1) controls.append(select("View", [["one", "all in one"], ["scripts", "one per script"]], first, show));
    show(first);
    const how = d.pairing === "paired" ? `the mean over ${many(d.pairs, "text")} of the divergence of each text from its translation` : "the divergence of the groups' mean distributions (texts were not paired)";
    host.append(el("figure", {}, view, el("figcaption", {}, `Reference: ${label(d.reference)}. ${normalized ? "Jensen-Shannon divergence of the routers' probabilities, corrected for their entropy, from 0 to 1" : d.measure}: ${how}.`,
      d.low ? ` Bands: ${100 * d.level} % bootstrap intervals over texts.` : "", d.floor ? " Dotted: the floor of each group, the divergence between unrelated texts of one language. Only what lies above it can come from the languages." : "", d.undefined ? ` ${many(d.undefined, "value")} undefined and left out.` : "", d.even.length ? " Hatched: layers whose load is even, where this measure is large however little differs." : "")));
    host.append(valuesTable([...all.map((s) => [s.label, s.values]), ...(d.floor ? all.map((s) => [`floor, ${s.label}`, s.floor]) : [])], d.values[0].length));
  });
}
const mean = (values) => { const seen = values.filter((v) => v !== null); return seen.reduce((a, b) => a + b, 0) / (seen.length || 1); };

function correlationSection() {
  const found = recordings.flatMap((name) => data.recordings[name].correlations.map((c) => [several ? `${c.name} (${name})` : c.name, c]));
  if (!found.length) return;
  const node = section("correlation", "Correlation with performance", "Whether groups that are routed like the reference also score better: a negative r means that they do. It is a correlation over few groups, and says nothing about causes.");
  for (const [name, c] of found) {
    const chart = el("div", {});
    const series = [{ name: "r", label: "Pearson r", values: c.pearson, low: c.low, high: c.high, color: "var(--c0)", dash: null }];
    lineChart(chart, { series, yLabel: "Correlation r", height: 240, bounds: [-1, 1], zeroLine: true, legend: false, dots: (_, layer) => c.pCorrected[layer] !== null && c.pCorrected[layer] < 0.05,
      describe: (one, layer) => [`layer ${layer}: r = ${signed(c.pearson[layer] ?? NaN)}`, c.low ? `${100 * c.level} % interval ${signed(c.low[layer] ?? NaN)} to ${signed(c.high[layer] ?? NaN)}` : null, `p = ${shown(c.p[layer])}, for all layers ${shown(c.pCorrected[layer])}`, `Spearman ${signed(c.spearman[layer] ?? NaN)}`].filter(Boolean).join("\n") });
    node.append(el("h3", {}, name), el("figure", {}, chart, el("figcaption", {}, `Pearson correlation over ${many(c.groups.length, "group")} of the score with the divergence from ${label(c.reference)}. Filled dots: p < 0.05 after correction for all layers, by exchanging scores${c.orders ? ` (${c.orders} orders)` : ""}.`, c.low ? ` Band: ${100 * c.level} % bootstrap interval over groups and texts.` : "")));
    const rows = [["r", c.pearson], ["low", c.low], ["high", c.high], ["p", c.p], ["p, all layers", c.pCorrected], ["Spearman", c.spearman]].filter(([, v]) => v);
    node.append(valuesTable(rows, c.pearson.length));
    node.append(el("details", {}, el("summary", {}, "Scores"), table([{ name: "Group" }, { name: "Score", number: true }], c.groups.map((g, i) => [cell(label(g)), cell(shown(c.scores[i], 4), c.scores[i])]), { caption: "scores", sort: 1 })));
  }
}

function balanceSection() {
  const names = recordings.filter((name) => data.recordings[name].balance && Object.keys(data.recordings[name].balance.measures).length);
  if (!names.length) return;
  const node = section("balance", "Load and entropy by layer", "How evenly the choices are spread over the experts of a layer, and how decided the router is. An entropy of 1 is even, 0 is a single expert.");
  perRecording(node, names, (host, name, controls) => {
    const { groups, measures } = data.recordings[name].balance, state = {}, view = el("div", {}), keys = Object.keys(measures);
    function show(measure) {
      const chart = el("div", {});
      const series = groups.map((group, g) => ({ name: group, label: label(group), values: measures[measure].values[g], ...styleOf(group) })).sort((a, b) => mean(b.values) - mean(a.values));
      lineChart(chart, { series, yLabel: measure, height: 280, state, describe: (one, layer) => `${one.label}\nlayer ${layer}: ${shown(one.values[layer])}` });
      view.replaceChildren(el("figure", {}, chart, el("figcaption", {}, `${measure}, by MoE layer, over all counted tokens of each group.`)), valuesTable(series.map((s) => [s.label, s.values]), series[0].values.length));
    }
    controls.append(select("Measure", keys.map((k) => [k, k]), keys[0], show));
    host.append(view);
    show(keys[0]);
  });
}

function resultsSection() {
  if (!data.results.length) return;
  const node = section("results", "Results", "Tables that other commands wrote, such as the effect of a plan. A point is an estimate, its line the interval; blue is better, orange is worse, gray has zero inside the interval, so that the sign is not clear.");
  for (const t of data.results) {
    node.append(el("h3", {}, t.title));
    if (t.note) node.append(el("p", { class: "note" }, t.note));
    if (t.effect) {
      const at = (name) => t.columns.indexOf(name), labels = [t.effect.label].flat();
      const number = (row, name) => (name === undefined || row[at(name)] === null ? NaN : Number(row[at(name)]));
      const host = el("div", {});
      intervals(host, t.rows.map((row) => ({ label: labels.map((l) => label(String(row[at(l)]))).join(", "), value: number(row, t.effect.value), low: number(row, t.effect.low), high: number(row, t.effect.high) })), t.effect.value, t.effect.better === "higher" ? 1 : -1);
      node.append(el("figure", {}, host));
    }
    const numeric = t.columns.map((_, i) => t.rows.length > 0 && t.rows.every((row) => row[i] === null || typeof row[i] === "number"));
    const whole = t.columns.map((_, i) => t.rows.every((row) => row[i] === null || Number.isInteger(row[i])));
    const text = (v, i) => (v === null ? "–" : typeof v === "number" ? (whole[i] ? v.toLocaleString("en") : shown(v, 4)) : everyGroup.has(String(v)) ? label(String(v)) : String(v));
    node.append(table(t.columns.map((name, i) => ({ name, number: numeric[i] })), t.rows.map((row) => row.map((v, i) => cell(text(v, i), v))), { caption: t.title, tall: t.rows.length > 14 }));
  }
}
