"use strict";
// Finds and shows the texts of the edits. All that is shown goes through textContent: a model's answer is never markup.
const { texts, rows } = JSON.parse(document.getElementById("edits").textContent);
const STEP = 100;
const text = (i) => (i === null ? null : texts[i]);
const by = (id) => document.getElementById(id);
const body = document.querySelector("#texts tbody");
let shown = STEP;

const searchable = rows.map((r) =>
  [r[0], text(r[3]).replace("{}", text(r[4])), text(r[5]), text(r[6]), text(r[7]), text(r[8])].filter(Boolean).join("\n").toLowerCase());

function cell(row, content, kind) {
  const td = document.createElement("td");
  if (kind) td.className = kind;
  if (content instanceof Node) td.append(content);
  else td.textContent = content === null ? "–" : content;
  row.append(td);
  return td;
}

function span(content, kind) {
  const made = document.createElement("span");
  made.className = kind;
  made.textContent = content;
  return made;
}

function score(row, value) {
  if (value === null) return cell(row, "–", "none");
  if (value === 1) return cell(row, "✓ 1", "yes");
  return cell(row, (value === 0 ? "✗ 0" : value.toFixed(2)), value === 0 ? "no" : "");
}

function prompt(r) {
  const made = document.createElement("span");
  const [before, after] = text(r[3]).split("{}");
  made.append(before, span(text(r[4]), "subject"), after + " → ", span(text(r[5]), "target"));
  return made;
}

function show(r) {
  const tr = document.createElement("tr");
  const open = document.createElement("button");
  open.type = "button";
  open.textContent = r[0];
  open.setAttribute("aria-expanded", "false");
  open.setAttribute("aria-label", `questions of case ${r[0]}`);
  open.addEventListener("click", () => toggle(tr, open, r));
  cell(tr, open);
  cell(tr, `${text(r[1])}, ${text(r[2])}`);
  cell(tr, prompt(r));
  cell(tr, text(r[6]));
  if (r[8] !== null) cell(tr, text(r[8]), "error");
  else cell(tr, text(r[7]));
  for (const value of r[9][0].slice(5)) score(tr, value);
  return tr;
}

function toggle(tr, open, r) {
  const closed = open.getAttribute("aria-expanded") === "false";
  open.setAttribute("aria-expanded", String(closed));
  if (!closed) {
    while (tr.nextSibling && tr.nextSibling.classList.contains("probe")) tr.nextSibling.remove();
    return;
  }
  for (const p of r[9].slice().reverse()) {
    const row = document.createElement("tr");
    row.className = "probe";
    cell(row, "");
    cell(row, text(p[0]));
    cell(row, `${text(p[1])} → ${text(p[2])}`);
    cell(row, text(p[3]));
    cell(row, text(p[4]));
    for (const value of p.slice(5)) score(row, value);
    tr.after(row);
  }
}

function wanted(r, i, words, method, regime, which) {
  if (method && text(r[1]) !== method) return false;
  if (regime && text(r[2]) !== regime) return false;
  if (which === "hit" && r[9][0][7] !== 1) return false;
  if (which === "miss" && r[9][0][7] === 1) return false;
  if (which === "moved" && !r[9].some((p) => text(p[0]).startsWith("neighbourhood") && p[7] === 0)) return false;
  return words.every((word) => searchable[i].includes(word));
}

function find() {
  const words = by("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const [method, regime, which] = ["method", "regime", "which"].map((id) => by(id).value);
  const found = rows.filter((r, i) => wanted(r, i, words, method, regime, which));
  body.replaceChildren(...found.slice(0, shown).map(show));
  by("count").textContent = `${found.length} of ${rows.length} edits`;
  by("more").hidden = found.length <= shown;
}

for (const id of ["find", "method", "regime", "which"]) {
  by(id).addEventListener("input", () => { shown = STEP; find(); });
}
by("more").addEventListener("click", () => { shown += STEP; find(); });
find();
