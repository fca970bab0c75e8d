"use strict";
// One page, no library: images stay in the browser until a question is asked.
const sides = [...document.querySelectorAll(".side")].map(element => ({ element, image: null, talk: [] }));
const find = id => document.getElementById(id);
let model = null;

function headers() {
  const key = find("key").value;
  return Object.assign({ "Content-Type": "application/json" }, key ? { Authorization: "Bearer " + key } : {});
}

async function failed(answer) {
  if (answer.status === 401) find("key").hidden = false;
  try { return (await answer.json()).error.message; } catch { return "the server answered " + answer.status; }
}

function say(text) { find("error").textContent = text; }

async function connect() {
  const answer = await fetch("v1/models", { headers: headers() });
  if (!answer.ok) { say(await failed(answer)); return; }
  model = (await answer.json()).data[0].id;
  find("model").textContent = "Model: " + model;
  say("");
}

function draw(side, sites) {
  const canvas = side.element.querySelector(".map"), pen = canvas.getContext("2d");
  pen.clearRect(0, 0, canvas.width, canvas.height);
  const note = side.element.querySelector(".mapnote");
  if (!sites.length) { note.textContent = "no image"; return; }
  const layers = [...new Set(sites.map(s => s.layer))].sort((a, b) => a - b), types = [...new Set(sites.map(s => s.type))];
  const most = Math.max(...sites.map(s => s.share), 1e-12), left = 44, top = 4;
  const wide = (canvas.width - left - 4) / layers.length, high = (canvas.height - top - 18) / types.length;
  pen.font = "11px sans-serif"; pen.textBaseline = "middle";
  const ink = getComputedStyle(document.body).color;
  for (const site of sites) {
    const x = left + layers.indexOf(site.layer) * wide, y = top + types.indexOf(site.type) * high;
    pen.fillStyle = `hsl(210 70% ${92 - 62 * site.share / most}%)`;
    pen.fillRect(x, y, wide - 1, high - 1);
  }
  pen.fillStyle = ink;
  types.forEach((type, i) => pen.fillText(type, 4, top + (i + .5) * high));
  layers.forEach((layer, i) => pen.fillText(layer, left + (i + .3) * wide, canvas.height - 8));
  note.textContent = `darkest: ${(100 * most).toFixed(2)} % of the matrix's own size`;
}

async function show(side, uri) {
  side.image = uri; side.talk = [];
  side.element.querySelector(".talk").replaceChildren();
  const picture = side.element.querySelector(".drop img");
  picture.hidden = !uri; picture.src = uri || "";
  side.element.querySelector(".drop span").hidden = !!uri;
  if (!uri) { draw(side, []); return; }
  const answer = await fetch("vlora/map", { method: "POST", headers: headers(), body: JSON.stringify({ image: uri }) });
  if (side.image !== uri) return;
  if (answer.ok) { draw(side, (await answer.json()).sites); say(""); }
  else { draw(side, []); const why = await failed(answer); if (answer.status !== 400 || !why.includes("makes no weights")) say(why); }
}

function read(side, file) {
  if (!file) return;
  const reader = new FileReader();
  reader.onload = () => show(side, reader.result);
  reader.readAsDataURL(file);
}

function bubble(side, role, text) {
  const item = document.createElement("li");
  item.className = role; item.textContent = text;
  side.element.querySelector(".talk").append(item);
  return item;
}

async function ask(side, question) {
  bubble(side, "user", question);
  side.talk.push({ role: "user", content: question });
  const messages = side.talk.map(turn => ({ ...turn }));
  if (side.image) messages[0].content = [{ type: "image_url", image_url: { url: side.image } }, { type: "text", text: messages[0].content }];
  const item = bubble(side, "assistant", "");
  const body = JSON.stringify({ model, messages, stream: true, temperature: 0 });
  const answer = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body });
  if (!answer.ok) { side.talk.pop(); item.remove(); say(await failed(answer)); return; }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const choice = JSON.parse(line.slice(6)).choices[0];
      if (choice && choice.delta.content) { text += choice.delta.content; item.textContent = text; }
    }
  }
  side.talk.push({ role: "assistant", content: text });
  item.dataset.done = "true";
}

const EXAMPLES = [["red", "circle"], ["blue", "rectangle"], ["green", "triangle"], ["black", "circle"]];
function example(color, shape) {
  const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
  canvas.width = canvas.height = 64; canvas.title = `${color} ${shape}`;
  pen.fillStyle = "white"; pen.fillRect(0, 0, 64, 64); pen.fillStyle = color; pen.beginPath();
  if (shape === "circle") pen.arc(32, 32, 20, 0, 7);
  else if (shape === "rectangle") pen.rect(12, 18, 40, 28);
  else { pen.moveTo(32, 12); pen.lineTo(54, 52); pen.lineTo(10, 52); }
  pen.fill();
  return canvas;
}

for (const side of sides) {
  const drop = side.element.querySelector(".drop");
  drop.addEventListener("dragover", event => { event.preventDefault(); drop.classList.add("over"); });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", event => { event.preventDefault(); drop.classList.remove("over"); read(side, event.dataTransfer.files[0]); });
  side.element.querySelectorAll(".file").forEach(input => input.addEventListener("change", () => read(side, input.files[0])));
  side.element.querySelector(".none").addEventListener("click", () => show(side, null));
  for (const [color, shape] of EXAMPLES) {
    const canvas = example(color, shape);
    canvas.addEventListener("click", () => show(side, canvas.toDataURL("image/png")));
    side.element.querySelector(".examples").append(canvas);
  }
}

find("two").addEventListener("change", event => { sides[1].element.hidden = !event.target.checked; });
find("clear").addEventListener("click", () => sides.forEach(side => { side.talk = []; side.element.querySelector(".talk").replaceChildren(); }));
find("key").addEventListener("change", connect);
find("ask").addEventListener("submit", async event => {
  event.preventDefault();
  const question = find("question").value.trim();
  if (!question || !model) return;
  find("question").value = ""; find("send").disabled = true; say("");
  try { await Promise.all(sides.filter(side => !side.element.hidden).map(side => ask(side, question))); }
  catch (error) { say(String(error)); }
  find("send").disabled = false;
});
connect();
