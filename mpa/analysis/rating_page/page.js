// One item at a time. What comes from the server is set as text, never as HTML.
"use strict";

const ASPECTS = { answerable: "Answerable?", correct: "Answer correct?", human: "By a person?" };
const $ = (id) => document.getElementById(id);
let rater = "";
let items = 0;
let position = 0;
let values = {}; // of the shown item, by aspect
let active = 0; // index of the aspect that y and n answer
let saving = Promise.resolve(); // clicks are saved one after the other
let busy = false; // while another item is loaded

async function ask(address, body) {
  const sent = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const reply = await fetch(address, sent || {});
  if (!reply.ok) throw new Error(reply.status === 422 ? "the server refused it" : `the server says ${reply.status}`);
  return reply.json();
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function view(name) {
  for (const one of ["name", "item", "end"]) $(`${one}-view`).hidden = one !== name;
}

function progress(left) {
  document.querySelector("header").hidden = false;
  $("who").textContent = rater;
  $("bar").max = items;
  $("bar").value = items - left;
  $("count").textContent = `${items - left} of ${items}`;
}

function draw() {
  Object.keys(ASPECTS).forEach((aspect, i) => {
    const group = $("aspects").children[i];
    group.classList.toggle("active", i === active);
    for (const button of group.querySelectorAll("button"))
      button.setAttribute("aria-pressed", String(values[aspect] === (button.dataset.value === "yes")));
  });
}

async function show(where) {
  busy = true;
  try {
    await saving;
    const item = await ask(`/items/${where}?rater=${encodeURIComponent(rater)}`);
    position = where;
    values = item.values;
    $("question").textContent = item.question;
    $("answer").textContent = item.answer;
    $("image").src = `/images/${position}`;
    $("place").textContent = `${position + 1} / ${items}`;
    $("back").disabled = position === 0;
    $("next").disabled = position === items - 1;
    active = Math.max(0, Object.keys(ASPECTS).findIndex((aspect) => !(aspect in values)));
    draw();
    view("item");
    problem("");
    if (position + 1 < items) new Image().src = `/images/${position + 1}`; // so that it is there at once
  } catch (error) {
    problem(`Item ${where + 1} cannot be shown: ${error.message}. Is the server still running?`);
  } finally {
    busy = false;
  }
}

async function goOn() {
  const state = await ask(`/items?rater=${encodeURIComponent(rater)}`);
  items = state.items;
  progress(state.left);
  if (state.next === null) view("end");
  else await show(state.next);
}

function rate(aspect, value) {
  if (busy) return;
  const where = position;
  values[aspect] = value;
  const names = Object.keys(ASPECTS);
  const open = names.findIndex((name) => !(name in values));
  active = open === -1 ? names.indexOf(aspect) : open;
  const last = open === -1;
  if (last) busy = true;
  draw();
  saving = saving
    .then(() => ask("/ratings", { rater, position: where, aspect, value }))
    .then((state) => {
      problem("");
      progress(state.left);
      if (last) return setTimeout(() => (state.next === null ? end() : show(after(where, state))), 250);
    })
    .catch((error) => {
      busy = false;
      if (where === position) delete values[aspect];
      draw();
      problem(`Not saved: ${error.message}. Is the server still running? Then answer again.`);
    });
}

// After the last answer of an item: the next one, or the first open one after the end.
const after = (where, state) => (where + 1 < items && state.next <= where ? where + 1 : state.next);

function end() {
  busy = false;
  view("end");
}

function makeAspects() {
  Object.entries(ASPECTS).forEach(([aspect, label], i) => {
    const group = document.createElement("div");
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", label);
    const text = document.createElement("span");
    text.textContent = label;
    text.addEventListener("click", () => ((active = i), draw()));
    group.append(text);
    for (const value of ["yes", "no"]) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = value === "yes" ? "Yes" : "No";
      button.dataset.value = value;
      button.addEventListener("click", () => rate(aspect, value === "yes"));
      group.append(button);
    }
    $("aspects").append(group);
  });
}

function key(event) {
  if ($("item-view").hidden || busy || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const names = Object.keys(ASPECTS);
  const move = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === "y" || event.key === "n") rate(names[active], event.key === "y");
  else if (move) (active = Math.min(names.length - 1, Math.max(0, active + move))), draw();
  else if (step && position + step >= 0 && position + step < items) show(position + step);
  else return;
  event.preventDefault();
}

makeAspects();
document.addEventListener("keydown", key);
$("back").addEventListener("click", () => show(position - 1));
$("next").addEventListener("click", () => show(position + 1));
$("review").addEventListener("click", () => show(0));
$("image").addEventListener("error", () => problem("This image cannot be shown."));
$("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  rater = $("name").value.trim();
  if (rater) goOn().catch((error) => problem(`${error.message}. Is the server still running, and the name printable?`));
});
