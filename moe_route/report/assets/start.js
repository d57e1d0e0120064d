figureSections();
countedSection();
tokenSection();
cardSection();
divergenceSection();
correlationSection();
expertsSection();
balanceSection();
resultsSection();
document.getElementById("contents").append(el("ul", {}, sections.map(([id, title]) => el("li", {}, el("a", { href: `#${id}` }, title)))));
document.getElementById("lead").textContent = data.lead || [
  recordings.length ? many(recordings.length, "recording") : null,
  traces.length ? `${many(traces.reduce((sum, t) => sum + t.texts.length, 0), "traced text")}` : null,
  `made ${data.made} with moe-route ${data.version}`,
].filter(Boolean).join(" · ");
const hidden = traces.filter((t) => t.tokens < t.allTokens);
document.getElementById("footer").append(el("p", {}, `This file holds its data and its script, and loads nothing from elsewhere. ${recordings.length ? "Frequencies are rounded to 1/65534 of the largest one. " : ""}${traces.length ? "Weights of tokens are rounded to 1/255." : ""}`,
  hidden.map((t) => ` Of the trace ${t.name}, ${t.tokens.toLocaleString("en")} of ${t.allTokens.toLocaleString("en")} tokens are shown, the first texts of every group.`).join("")));
