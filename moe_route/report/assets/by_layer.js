// What was counted; divergence, correlation, load and results.
const recordings = Object.keys(data.recordings);
const several = recordings.length > 1;

function countedSection() {
  if (!recordings.length && !data.marks.length) return;
  const node = section("counted", "What was counted", "Every figure below rests on these counts. A token is counted once per layer; padding is not counted.");
  if (data.warnings.length) node.append(el("div", { class: "warnings", role: "note" }, el("strong", {}, "To keep in mind"), el("ul", {}, data.warnings.map((text) => el("li", {}, text)))));
  for (const name of recordings) {
    const { facts } = data.recordings[name], tokens = facts.groups.reduce((sum, g) => sum + g.tokens, 0);
    const layers = [...new Set(facts.experts)], ks = [...new Set(facts.topK)], model = facts.model || {};
    const held = facts.conservation;
    const rows = [
      ["Model", `${model.name || "not named"}${model.class ? ` (${model.class})` : ""}`],
      ["Routers", `${many(facts.layers, "MoE layer")} of ${layers.join(" or ")} experts, of which a token uses ${ks.join(" or ")}`],
      ["Counted", `${many(tokens, "token")} in ${many(facts.groups.length, "group")}${facts.masked.length ? `; left out: ${facts.masked.join(", ")}` : ""}`],
      ["Special tokens", facts.specialTokens ? `${many(facts.specialTokens, "id")} left out` : "counted"],
      ["Cut texts", facts.cutTexts ? `${facts.cutTexts}, after ${facts.cutTo.join(" or ")} tokens` : "none"],
      ["Steering", facts.plans.length ? el("span", {}, "under plan ", facts.plans.map((p) => el("code", {}, String(p).slice(0, 12), " "))) : "none: the model's own choice"],
      ["Check", held === null ? "counts were not recorded" : held.holds ? `conservation holds: every one of the ${held.slots.toLocaleString("en")} slots is a choice or empty${held.largestGap ? ` (within ${held.largestGap.toExponential(1)})` : ""}` : `conservation is broken by ${held.largestGap}`],
      ["Configuration", model.config_hash ? el("code", {}, String(model.config_hash).slice(0, 16)) : "unknown"],
      ["Versions", Object.entries(facts.versions).map(([k, v]) => `${k} ${v}`).join(", ") || "unknown"],
      ["Recorder", `${facts.source}${facts.engines.length ? `, engine ${facts.engines.join(", ")}` : ""}`],
    ];
    node.append(several ? el("h3", {}, `Recording ${name}`) : "", el("div", { class: "scroll" }, el("table", { class: "facts" }, el("tbody", {}, rows.map(([key, value]) => el("tr", {}, el("th", { scope: "row" }, key), el("td", {}, value)))))));
    node.append(el("details", { open: !several && facts.groups.length <= 12 }, el("summary", {}, `Tokens of ${many(facts.groups.length, "group")}`), table(
      [{ name: "Group" }, { name: "Code" }, { name: "Tokens", number: true }, { name: "Sequences", number: true }, { name: "Tokens per sequence", number: true }],
      facts.groups.map((g) => [cell(label(g.name)), cell(g.name), cell(g.tokens.toLocaleString("en"), g.tokens), cell(g.sequences.toLocaleString("en"), g.sequences), cell(g.sequences ? (g.tokens / g.sequences).toFixed(1) : "–", g.sequences ? g.tokens / g.sequences : NaN)]), { caption: "tokens by group" })));
  }
  for (const mark of data.marks) {
    node.append(el("h3", {}, `${mark.kind === "plan" ? "Plan" : "Selection"} ${mark.name}`), el("p", {}, many(mark.experts.length, "expert"), mark.hash ? [", plan ", el("code", {}, mark.hash.slice(0, 16))] : ""));
    if (mark.description) node.append(el("details", {}, el("summary", {}, "Description"), el("p", { style: { whiteSpace: "pre-wrap" } }, mark.description)));
  }
}

// the recording of a section, with a choice where there are several
function perRecording(node, names, show) {
  const host = el("div", {});
  if (names.length > 1) node.append(el("div", { class: "controls" }, select("Recording", names.map((n) => [n, n]), names[0], (name) => { host.replaceChildren(); show(host, name); })));
  node.append(host);
  show(host, names[0]);
}

function divergenceSection() {
  const names = recordings.filter((name) => data.recordings[name].divergence);
  if (!names.length) return;
  const node = section("divergence", "Divergence by layer", "How differently each group is routed from the reference: 0 is routed alike. In multilingual models the line often falls in the middle layers and rises at both ends, the shape of a U.");
  perRecording(node, names, (host, name) => {
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
        lineChart(chart, { series: all, yLabel: "Routing divergence", describe, state, bounds });
        return;
      }
      const grid = el("div", { class: "multiples" });
      for (const script of scripts) {
        const chart = el("div", {}), mine = (s) => (language(s.name).script || "Other groups") === script;
        lineChart(chart, { series: all.map((s) => ({ ...s, faint: !mine(s) })), yLabel: `Routing divergence, ${script}`, describe, height: 190, bounds });
        grid.append(el("div", {}, el("h3", {}, script), chart));
      }
      view.append(grid);
    }
    const first = all.length > 12 && scripts.length > 1 ? "scripts" : "one";
    if (scripts.length > 1) host.append(el("div", { class: "controls" }, select("View", [["one", "all in one"], ["scripts", "one per script"]], first, show)));
    show(first);
    const how = d.pairing === "paired" ? `the mean over ${many(d.pairs, "text")} of the divergence of each text from its translation` : "the divergence of the groups' mean distributions (texts were not paired)";
    host.append(el("figure", {}, view, el("figcaption", {}, `Reference: ${label(d.reference)}. ${normalized ? "Jensen-Shannon divergence of the routers' probabilities, corrected for their entropy, from 0 to 1" : d.measure}: ${how}.`,
      d.low ? ` Bands: ${100 * d.level} % bootstrap intervals over texts.` : "", d.floor ? " Dotted: the floor, what unrelated sentences of one language give in the same measure; it shows the size of the texts, not of the languages." : "", d.undefined ? ` ${many(d.undefined, "value")} undefined and left out.` : "")));
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
  perRecording(node, names, (host, name) => {
    const { groups, measures } = data.recordings[name].balance, state = {}, view = el("div", {}), keys = Object.keys(measures);
    function show(measure) {
      const chart = el("div", {});
      const series = groups.map((group, g) => ({ name: group, label: label(group), values: measures[measure].values[g], ...styleOf(group) })).sort((a, b) => mean(b.values) - mean(a.values));
      lineChart(chart, { series, yLabel: measure, height: 280, state, describe: (one, layer) => `${one.label}\nlayer ${layer}: ${shown(one.values[layer])}` });
      view.replaceChildren(el("figure", {}, chart, el("figcaption", {}, `${measure}, by MoE layer, over all counted tokens of each group.`)), valuesTable(series.map((s) => [s.label, s.values]), series[0].values.length));
    }
    host.append(el("div", { class: "controls" }, select("Measure", keys.map((k) => [k, k]), keys[0], show)), view);
    show(keys[0]);
  });
}

function resultsSection() {
  if (!data.results.length) return;
  const node = section("results", "Results", "Tables that other commands wrote, such as the effect of a plan. A point is an estimate, its line the interval.");
  for (const t of data.results) {
    node.append(el("h3", {}, t.title));
    if (t.note) node.append(el("p", { class: "note" }, t.note));
    if (t.effect) {
      const at = (name) => t.columns.indexOf(name), labels = [t.effect.label].flat();
      const number = (row, name) => (name === undefined || row[at(name)] === null ? NaN : Number(row[at(name)]));
      const host = el("div", {});
      intervals(host, t.rows.map((row) => ({ label: labels.map((l) => label(String(row[at(l)]))).join(", "), value: number(row, t.effect.value), low: number(row, t.effect.low), high: number(row, t.effect.high) })), t.effect.value);
      node.append(el("figure", {}, host));
    }
    const numeric = t.columns.map((_, i) => t.rows.length > 0 && t.rows.every((row) => row[i] === null || typeof row[i] === "number"));
    const text = (v) => (v === null ? "–" : typeof v === "number" ? (Number.isInteger(v) ? v.toLocaleString("en") : shown(v, 4)) : everyGroup.has(String(v)) ? label(String(v)) : String(v));
    node.append(table(t.columns.map((name, i) => ({ name, number: numeric[i] })), t.rows.map((row) => row.map((v) => cell(text(v), v))), { caption: t.title, tall: t.rows.length > 14 }));
  }
}
