"use strict";
// A table of any length: only the rows that can be seen exist.
(() => {
  const HEIGHT = 32;
  const data = JSON.parse(document.getElementById("data").textContent);
  const [NAME, DTYPE, SHAPE, BYTES, FILE, HASH, SOURCES, RANKS, SHARDS] = [0, 1, 2, 3, 4, 5, 6, 7, 8];
  const byId = (id) => document.getElementById(id);
  const rows = byId("rows"), space = byId("space"), search = byId("search");
  const sources = (r) => (r[SOURCES] === 0 ? [r[NAME]] : r[SOURCES]);
  const texts = data.rows.map((r) =>
    [r[NAME], data.dtypes[r[DTYPE]], data.files[r[FILE]], r[HASH], "[" + r[SHAPE].join(", ") + "]",
      r[SOURCES] === 0 ? "" : r[SOURCES].join(" ")].join("\n").toLowerCase());
  let shown = data.rows.map((_, i) => i), chosen = -1;
  // What is known of the chosen row opens below it, and moves those that follow.
  const detail = document.createElement("dl");
  detail.className = "detail mono";
  detail.id = "detail";

  function size(n) {
    let unit = 0;
    const units = ["B", "kB", "MB", "GB", "TB"];
    while (n >= 999.5 && unit < 4) { n /= 1000; unit += 1; }
    return (unit === 0 ? n : n.toPrecision(3)) + " " + units[unit];
  }
  function cell(text, css) {
    const span = document.createElement("span");
    span.textContent = text;
    if (css) span.className = css;
    return span;
  }
  function draw(all) {
    const open = chosen < 0 ? -1 : shown.indexOf(chosen);
    const extra = open < 0 ? 0 : detail.offsetHeight || 190;
    space.style.height = shown.length * HEIGHT + extra + "px";
    const first = all === true ? 0 : Math.max(0, Math.floor((rows.scrollTop - extra) / HEIGHT) - 5);
    const last = all === true ? Math.min(shown.length, 2000)
      : Math.min(shown.length, Math.ceil((rows.scrollTop + rows.clientHeight) / HEIGHT) + 10);
    const made = [];
    for (let i = first; i < last; i += 1) {
      const r = data.rows[shown[i]], row = document.createElement("div");
      row.className = shown[i] === chosen ? "row chosen" : "row";
      row.style.top = i * HEIGHT + (open >= 0 && i > open ? extra : 0) + "px";
      row.dataset.at = shown[i];
      row.append(cell(r[NAME], "mono"), cell(data.dtypes[r[DTYPE]], "mono"),
        cell("[" + r[SHAPE].join(", ") + "]", "mono"), cell(size(r[BYTES]), "number"),
        cell(data.files[r[FILE]], "mono soft"), cell(r[HASH].slice(0, 12) + "…", "mono soft"));
      row.firstChild.title = r[NAME];
      made.push(row);
    }
    if (open >= first && open < last) {
      detail.style.top = (open + 1) * HEIGHT + "px";
      made.push(detail);
    }
    space.replaceChildren(...made);
    if (made.includes(detail) && detail.offsetHeight !== extra && all !== true) draw();
    byId("count").textContent = shown.length === data.rows.length
      ? shown.length.toLocaleString("en") + " tensors; choose one to see where it came from"
      : shown.length.toLocaleString("en") + " of " + data.rows.length.toLocaleString("en") + " tensors";
  }
  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    shown = [];
    texts.forEach((text, i) => { if (words.every((w) => text.includes(w))) shown.push(i); });
    rows.scrollTop = 0;
    draw();
  }
  function filesOf(r) {
    if (!r[RANKS]) return "not noted by the release that made it";
    const names = [];
    for (const part of r[RANKS].split(",")) {
      const [a, b] = part.split("-").map(Number);
      for (let k = a; k <= (b === undefined ? a : b); k += 1) names.push(data.source_files[k]);
    }
    const count = r[SHARDS] + (r[SHARDS] === 1 ? " shard in " : " shards in ");
    return count + (names.length > 12 ? names.slice(0, 12).join(", ") + ", … (" + names.length + " files)" : names.join(", "));
  }
  function tell(r) {
    const parts = [];
    for (const [name, value] of [["name", r[NAME]], ["dtype, shape", data.dtypes[r[DTYPE]] + " [" + r[SHAPE].join(", ") + "]"],
      ["bytes", r[BYTES].toLocaleString("en")], ["file", data.files[r[FILE]]], ["xxh3-128", r[HASH]],
      ["made from", sources(r).join(", ")], ["read from", filesOf(r)]]) {
      const term = document.createElement("dt"), text = document.createElement("dd");
      term.textContent = name;
      text.textContent = value;
      parts.push(term, text);
    }
    detail.replaceChildren(...parts);
  }
  search.addEventListener("input", filter);
  rows.addEventListener("scroll", () => requestAnimationFrame(draw));
  space.addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (!row) return;
    const at = Number(row.dataset.at);
    chosen = at === chosen ? -1 : at;
    if (chosen >= 0) tell(data.rows[chosen]);
    draw();
  });
  window.addEventListener("beforeprint", () => draw(true));
  window.addEventListener("afterprint", () => draw());
  // A link to a search: report.html#q=lm_head
  const wanted = new URLSearchParams(location.hash.slice(1)).get("q");
  if (wanted) search.value = wanted;
  filter();
})();
