"""The page of `view`: what never changes in it, as HTML, style and script."""

from __future__ import annotations

from .lineages import PALETTE

HINT = "point at a particle or a string for its lineage, its text and its weights; a click holds it"

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{style}</style></head><body>
<h1>{title}</h1><dl>{facts}</dl>{flags}
<section class="strings"><input type="checkbox" id="merge" checked><label for="merge">merge equal strings</label>
<input type="checkbox" id="dead"><label for="dead">show the dead</label>{strings}</section>
<div class="scroll">{run}</div>
<div id="panel"><div>{hint}</div></div>
<script type="application/json" id="data">{data}</script><script>{script}</script></body></html>
"""

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1f2933;--soft:#6b7785;--line:#d9dde2;--hi:#eef2f6;--bad:#b00020;
--k0:#0072b2;--k1:#d55e00;--k2:#009e73;--k3:#cc79a7;--k4:#e69f00;--k5:#56b4e9;--k6:#6b7785;--kx:#cfd5db}
@media (prefers-color-scheme:dark){:root{--bg:#15181c;--ink:#e4e8ec;--soft:#9aa5b1;--line:#39414a;--hi:#232930;
--bad:#ff6b81;--k0:#4aa8e0;--k1:#ff8c42;--k2:#2fc89c;--k3:#e39cc6;--k4:#f2b632;--k5:#8fd3f7;--k6:#9aa5b1;--kx:#424b55}}
*{box-sizing:border-box}
body{margin:0;padding:12px 16px;background:var(--bg);color:var(--ink);font:13px/1.4 system-ui,sans-serif}
h1{font-size:16px;margin:0 0 8px}
dl{display:flex;flex-wrap:wrap;gap:4px 22px;margin:0 0 8px}
dt{color:var(--soft);font-size:11px}dd{margin:0}
.flag{color:var(--bad);margin:2px 0;font-weight:600}
.strings{max-height:240px;overflow:auto;margin:6px 0 10px}
label{margin:0 14px 0 4px;color:var(--soft)}
table{border-collapse:collapse;margin-top:6px;width:100%}
th{text-align:left;color:var(--soft);font-weight:400;font-size:11px}
td,th{padding:1px 12px 1px 0;vertical-align:top;white-space:nowrap}
td.text{white-space:pre-wrap;overflow-wrap:anywhere;width:100%}
td b{display:inline-block;height:9px;min-width:2px}
tr.dead,i{color:var(--soft)}tbody tr:hover{background:var(--hi)}
#merge:checked~.single,#merge:not(:checked)~.merged,#dead:not(:checked)~table tr.dead{display:none}
.scroll{overflow-x:auto}
svg{display:block;font:10px system-ui,sans-serif;fill:var(--ink)}
.lines path{fill:none;stroke-linecap:round}
svg.dim .lines path{opacity:.18}svg.dim .lines path.on{opacity:1}.lines .kx.on{stroke:var(--soft)}
svg text{dominant-baseline:central}
.labels text{text-anchor:middle;paint-order:stroke;stroke:var(--bg);stroke-width:3px}
.labels .lost,.tick,.axis{fill:var(--soft)}.labels .end{text-anchor:start;white-space:pre}
.tick{text-anchor:middle}.axis{text-anchor:end}.name{fill:var(--soft)}
.cross{stroke:var(--bad);fill:none}.frame{stroke:var(--line);fill:none}
.curve{stroke:var(--k0);fill:none;stroke-width:1.6}
.resampled{stroke:var(--k4);stroke-dasharray:2 3;fill:none}
#panel{position:sticky;bottom:0;min-height:76px;max-height:190px;overflow:auto;padding:8px 0;background:var(--bg);
border-top:1px solid var(--line)}
#panel div{color:var(--soft);margin-bottom:4px}
#panel span{display:inline-block;vertical-align:top;white-space:pre-wrap;padding:0 2px;
border-left:1px solid var(--line)}
#panel small{display:block;color:var(--soft);font-size:9px}
""" + "".join(
    f".k{k}{{stroke:var(--k{k})}}td b.k{k}{{background:var(--k{k})}}"
    for k in (*range(len(PALETTE) + 1), "x")
)

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const svg = document.getElementById("run"), panel = document.getElementById("panel");
const hint = panel.textContent;
let held = false;
function past(r, i) {                       // the lineage that ends in slot i of round r, oldest first
  const path = [];
  for (; r >= 0; i = data.ancestors[r][i], r--) path.unshift([r, i]);
  return path;
}
function future(r, i) {                     // its descendants
  const found = [];
  let now = new Set([i]);
  for (let s = r + 1; s < data.rounds; s++) {
    const next = new Set();
    data.ancestors[s].forEach((a, j) => { if (now.has(a)) { next.add(j); found.push([s, j]); } });
    now = next;
  }
  return found;
}
function light(nodes) {
  svg.querySelectorAll(".on").forEach(line => line.classList.remove("on"));
  svg.classList.toggle("dim", nodes.length > 0);
  nodes.forEach(([r, i]) => document.getElementById(`p${r}_${i}`).classList.add("on"));
}
function add(parent, tag, text) {
  const node = document.createElement(tag);
  node.textContent = text;
  parent.append(node);
  return node;
}
function say(r, i) {
  const trace = data.trace ? `, ESS ${data.trace[0][r]}, log Z ${data.trace[1][r]}` : "";
  panel.replaceChildren();
  add(panel, "div", `particle ${i} after round ${r + 1}${trace}; below every round its weight`);
  for (const [s, j] of past(r, i)) {
    const weight = data.weights[s][j];
    add(add(panel, "span", data.words[data.said[s][j]] || "\\u00a0"), "small", weight === 0 ? "dead" : weight);
  }
}
function clear() { light([]); panel.replaceChildren(); add(panel, "div", hint); }
function point(event) {
  if (held) return;
  const box = svg.getBoundingClientRect();
  const r = Math.min(Math.floor((event.clientX - box.left - data.left) / data.dx), data.rounds - 1);
  const i = Math.floor((event.clientY - box.top - data.top) / data.dy);
  if (r < 0 || i < 0 || i >= data.particles) return clear();
  light([...past(r, i), ...future(r, i)]);
  say(r, i);
}
if (data.rounds) {
  svg.addEventListener("mousemove", point);
  svg.addEventListener("mouseleave", () => { if (!held) clear(); });
  svg.addEventListener("click", event => { held = false; point(event); held = svg.classList.contains("dim"); });
  document.querySelectorAll("tr[data-slots]").forEach(row => row.addEventListener("mouseenter", () => {
    const slots = row.dataset.slots.split(" ").map(Number);
    held = false;
    light(slots.flatMap(i => past(data.rounds - 1, i)));
    say(data.rounds - 1, slots[0]);
  }));
}
"""
