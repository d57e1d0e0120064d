// Elements, controls, tables and the tip. All text goes in as text nodes, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

// ---- packed arrays

function unpack(packed) {
  const wide = packed.u16 !== undefined;
  const text = atob(wide ? packed.u16 : packed.u8);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  if (!wide) return { codes: bytes, missing: 255, scale: packed.scale };
  const view = new DataView(bytes.buffer), codes = new Uint16Array(bytes.length / 2);
  for (let i = 0; i < codes.length; i++) codes[i] = view.getUint16(2 * i, true);
  return { codes, missing: 65535, scale: packed.scale };
}

// ---- names and numbers

const shown = (value, digits = 3) => (value === null || value === undefined || Number.isNaN(value) ? "–" : value.toFixed(digits));
const signed = (value, digits = 3) => (Number.isNaN(value) ? "–" : (value > 0 ? "+" : "") + value.toFixed(digits));
const many = (count, one, several = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : several}`;
const percent = (value) => `${(100 * value).toFixed(1)} %`;

function named(type, code) {
  try {
    const name = new Intl.DisplayNames("en", { type, fallback: "none" }).of(code);
    return name && name.toLowerCase() !== code.toLowerCase() ? name : null;
  } catch (error) {
    if (error instanceof RangeError) return null; // not a code
    throw error;
  }
}
const groupNames = new Map();
// "deu_Latn" -> {name: "German", script: "Latin"}; a group that is no language keeps its name
function language(group) {
  if (!groupNames.has(group)) {
    const [code, script] = group.split(/[_-]/);
    const isCode = /^[a-z]{2,3}$/.test(code) && (script === undefined || /^[A-Z][a-z]{3}$/.test(script));
    const name = isCode ? named("language", code) : null;
    const written = isCode && script ? (named("script", script) || script).replace(/^(Simplified|Traditional)$/, "$1 Han") : null;
    groupNames.set(group, { name: name ? name.replace("Standard Arabic", "Arabic").replace(/^Mandarin /, "") : null, script: written, code: group });
  }
  return groupNames.get(group);
}
// the name alone where it is unique among the groups of this report, else with its code
const everyGroup = new Set([...Object.values(data.recordings).flatMap((r) => r.facts.groups.map((g) => g.name)), ...data.traces.flatMap((t) => t.texts.map((x) => x.group))]);
function label(group) {
  const { name } = language(group);
  if (name === null) return group;
  const same = [...everyGroup].filter((other) => language(other).name === name);
  return same.length > 1 ? `${name} (${group})` : name;
}

// ---- the tip

const tip = document.getElementById("tip");
function showTip(text, x, y) {
  if (tip.textContent !== text) tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 4))}px`;
  tip.style.top = `${y + 18 + height > innerHeight ? Math.max(4, y - height - 12) : y + 18}px`;
}
const hideTip = () => { tip.hidden = true; };
addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
addEventListener("scroll", hideTip, { passive: true });

// ---- sections and controls

const sections = [];
function section(id, title, explanation) {
  const node = el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), el("p", { class: "quiet" }, explanation));
  document.getElementById("main").append(node);
  sections.push([id, title]);
  return node;
}

// options: [[value, text], ...] or {group: [[value, text], ...]}
function select(text, options, value, change) {
  const of = (entries) => entries.map(([key, name]) => el("option", { value: key, selected: String(key) === String(value) }, name));
  const body = Array.isArray(options) ? of(options) : Object.entries(options).map(([name, entries]) => (entries.length ? el("optgroup", { label: name }, of(entries)) : null));
  const node = el("select", { onchange: () => change(node.value) }, body);
  return el("label", {}, text, node);
}

function slider(text, count, names, value, change) {
  const output = el("span", {}, names[value]); // <output> would take the label from the slider
  const input = el("input", {
    type: "range", min: 0, max: count - 1, step: 1, value, "aria-valuetext": names[value],
    oninput: () => { output.textContent = names[input.value]; input.setAttribute("aria-valuetext", names[input.value]); change(Number(input.value)); },
  });
  return el("label", {}, el("span", {}, `${text} `, output), input);
}

// columns: [{name, number, sort}]; rows: arrays of cells, each {text, key} or a node with its key
function table(columns, rows, { sort = null, down = true, caption = null, tall = false } = {}) {
  let by = sort, falling = down;
  const body = el("tbody");
  const heads = columns.map((column, index) => (column.name === null ? el("td", {}) : el("th", { scope: "col", class: column.number ? "number" : null, "aria-sort": "none" },
    el("button", { type: "button", onclick: () => { falling = by === index ? !falling : Boolean(column.number); by = index; show(); } }, column.name))));
  function show() {
    heads.forEach((head, index) => columns[index].name !== null && head.setAttribute("aria-sort", index === by ? (falling ? "descending" : "ascending") : "none"));
    const order = by === null ? rows : [...rows].sort((a, b) => {
      const [x, y] = [a[by].key, b[by].key];
      const missing = (v) => v === null || v === undefined || Number.isNaN(v);
      if (missing(x) || missing(y)) return missing(x) - missing(y);
      const compared = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
      return falling ? -compared : compared;
    });
    body.replaceChildren(...order.map((row) => el("tr", {}, row.map((cell, index) => el("td", { class: columns[index].number ? "number" : null }, cell.node || cell.text)))));
  }
  show();
  return el("div", { class: tall ? "scroll tall" : "scroll", tabindex: 0, role: "region", "aria-label": caption || "table" },
    el("table", {}, el("thead", {}, el("tr", {}, heads)), body));
}
const cell = (text, key = text) => ({ text: String(text), key });

// draws again whenever the width of the node changes
function redrawn(node, redraw) {
  let width = 0;
  new ResizeObserver(() => {
    const now = Math.floor(node.clientWidth);
    if (now && now !== width) { width = now; redraw(now); }
  }).observe(node);
  return { again: () => width && redraw(width) };
}
