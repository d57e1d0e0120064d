// Figures of results: lines by layer, bars before and after with random draws, a matrix. A section each.
const DASHES = [null, "7 3", "2 3", "9 3 2 3"];

function figureSections() {
  for (const f of data.figures) {
    const node = section(f.name, f.title, f.text), figure = el("figure", {});
    node.append(figure);
    ({ lines: linesFigure, bars: barsFigure, matrix: matrixFigure })[f.kind](f, figure);
    figure.append(el("figcaption", {}, f.caption));
  }
}

function linesFigure(f, figure) {
  const chart = el("div", {}), names = Object.keys(f.rows);
  const series = names.map((name, i) => ({ name, label: name, values: f.rows[name], color: `var(--c${i % COLORS.length})`, dash: DASHES[i % DASHES.length] }));
  lineChart(chart, { series, yLabel: f.axis, describe: (one, layer) => `${one.label}\nlayer ${layer}: ${shown(one.values[layer])}` });
  figure.append(chart, valuesTable(names.map((name) => [name, f.rows[name]]), f.rows[names[0]].length));
}

// rows: name -> [before, after, [draws]], from 0 to 1; labels: what the three are
function barsFigure(f, figure) {
  const names = Object.keys(f.rows), [before, after, random] = f.labels, host = el("div", {});
  const several = names.some((name) => f.rows[name][2].length), colors = { before: "var(--bar)", after: "var(--strong)" };
  const key = (mark, text) => el("li", {}, draw("svg", { width: 18, height: 12, "aria-hidden": "true" }, mark), text);
  const bar = (color) => draw("rect", { y: 1, width: 18, height: 10, rx: 2, fill: color });
  const dot = (x, y) => draw("circle", { cx: x, cy: y, r: 2.4, class: "draw" });
  figure.append(el("ul", { class: "key" }, key(bar(colors.before), before), key(bar(colors.after), after), several ? key(dot(9, 6), random) : ""), host);
  redrawn(host, (width) => {
    const left = Math.min(110, width * 0.27), right = 92, line = 30, top = 4, bottom = 38, height = top + names.length * line + bottom;
    const x = (value) => left + value * (width - left - right);
    const svg = draw("svg", { width, height, role: "img", "aria-label": `${f.axis}: ${before}, ${after}${several ? ` and ${random}` : ""}; the values are in the table` });
    for (const value of width < 500 ? [0, 0.5, 1] : [0, 0.2, 0.4, 0.6, 0.8, 1]) svg.append(draw("line", { class: "axis", x1: x(value), x2: x(value), y1: top, y2: height - bottom }), draw("text", { x: x(value), y: height - 22, "text-anchor": "middle" }, value.toFixed(1)));
    svg.append(draw("text", { x: x(0.5), y: height - 6, "text-anchor": "middle" }, f.axis));
    names.forEach((name, i) => {
      const y = top + i * line + line / 2, [was, is, draws] = f.rows[name], far = draws.length ? `\n${random}: ${shown(Math.min(...draws), 2)} to ${shown(Math.max(...draws), 2)}` : "";
      svg.append(draw("g", { onpointermove: (event) => showTip(`${name}\n${before}: ${shown(was, 2)}\n${after}: ${shown(is, 2)}${far}`, event.clientX, event.clientY), onpointerleave: hideTip },
        draw("rect", { x: 0, y: y - line / 2, width, height: line, fill: "transparent" }),
        draw("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, name),
        draw("rect", { x: x(0), y: y - 8, width: x(was) - x(0), height: 16, rx: 2, fill: colors.before }),
        draw("rect", { x: x(0), y: y - 8, width: x(is) - x(0), height: 16, rx: 2, fill: colors.after }),
        // draws of one value lie apart, always in the same way
        draws.map((value, n) => dot(x(Math.max(0, value)), y - 6 + (12 * ((n * 0.618) % 1)))),
        draw("text", { class: "strong", x: width - right + 10, y: y + 4 }, `${shown(was, 2)} → ${shown(is, 2)}`)));
    });
    host.replaceChildren(svg);
  });
  figure.append(el("details", {}, el("summary", {}, "Values as a table"), table([{ name: "" }, { name: before, number: true }, { name: after, number: true }, ...(several ? [{ name: `${random}, least`, number: true }, { name: "most", number: true }] : [])],
    names.map((name) => { const [was, is, draws] = f.rows[name]; return [cell(name), ...[was, is, ...(several ? [Math.min(...draws), Math.max(...draws)] : [])].map((v) => cell(shown(v, 2), v))]; }), { caption: f.title })));
}

// rows: name -> a value per column; orange: above zero, blue: below. The cell of a row's own column is framed.
function matrixFigure(f, figure) {
  const most = Math.max(...Object.values(f.rows).flat().filter((v) => v !== null).map(Math.abs), 1e-9);
  const td = (name, value, column) => el("td", { class: name === f.columns[column] ? "own" : null, title: `${name}, ${f.columns[column]}: ${signed(value ?? NaN, 3)}`,
    style: { background: value === null ? "" : `color-mix(in srgb, var(--${value < 0 ? "positive" : "negative"}) ${Math.round((65 * Math.abs(value)) / most)}%, transparent)` } }, value === null ? "–" : Math.abs(value) < 0.005 ? "0.00" : signed(value, 2));
  figure.append(el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": f.title }, el("table", { class: "grid matrix" },
    el("thead", {}, el("tr", {}, el("th", { class: "short" }, f.axis), f.columns.map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, Object.entries(f.rows).map(([name, values]) => el("tr", {}, el("th", { scope: "row" }, name), values.map((value, column) => td(name, value, column))))))));
}
