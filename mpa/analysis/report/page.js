"use strict";
// The gallery. Every text becomes a text node: nothing that a model or a dataset wrote is ever parsed as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const PAGE = 60;
  const FILTERS = ["verdict", "answerType", "questionType"];
  const NAMES = { answer: ["Annotation", "Right answer"], lvlm: ["L-VLM"], svlm: ["S-VLM", "S-VLM before"], after: ["S-VLM after"] };
  let cell = 0, page = 0, found = [], wanted = null, inspecting = false;

  const make = (name, text, parent) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  };
  const number = (n) => n.toLocaleString("en");
  const key = (sample) => encodeURIComponent(String(sample.id).toWellFormed());
  const source = () => at("source").value;
  const samples = () => data.cells[cell].samples;

  function fill(select, values, all) {
    const before = select.value;
    select.replaceChildren(new Option(all, ""));
    for (const [value, count] of values) select.append(new Option(`${value} (${number(count)})`, value));
    select.value = [...select.options].some((option) => option.value === before) ? before : "";
  }

  function choices() {
    const own = samples().filter((sample) => sample.source === source());
    for (const name of FILTERS) {
      const counts = new Map();
      for (const sample of own) counts.set(sample[name], (counts.get(sample[name]) || 0) + 1);
      fill(at(name), [...counts].sort((a, b) => b[1] - a[1]), "all");
    }
    at("inspect").disabled = source() !== "annotated";
  }

  const haystack = (sample) => (sample.text ??= [sample.question, sample.answer, sample.lvlm, sample.svlm, sample.after]
    .filter((part) => part != null).join("\n").toLowerCase());
  // An id and a file's name are found whole: parts of them, such as train in COCO_train2014_000000000009.jpg, are in all.
  const isNamed = (sample, word) => [String(sample.id), data.images[sample.image].name]
    .some((name) => [name, name.split("/").pop(), name.split("/").pop().replace(/\.[^.]*$/, "")].some((part) => part.toLowerCase() === word));

  function filter() {
    const word = at("search").value.trim().toLowerCase();
    const chosen = inspecting ? new Set(data.cells[cell].inspected) : null;
    found = samples().filter((sample, i) => sample.source === source()
      && FILTERS.every((name) => !at(name).value || sample[name] === at(name).value)
      && (!word || haystack(sample).includes(word) || isNamed(sample, word)) && (!chosen || chosen.has(i)));
    const order = at("order").value;
    if (order) {
      const sign = order === "low" ? 1 : -1;
      found.sort((a, b) => (a.logprob == null) - (b.logprob == null) || sign * (a.logprob - b.logprob));
    }
    page = 0;
    draw();
  }

  function card(sample) {
    const item = make("li");
    const link = `s=${cell}/${sample.source}/${key(sample)}`;
    if (link === wanted) item.className = "target";
    const image = data.images[sample.image];
    if (image.src) {
      const picture = make("img", undefined, item);
      picture.loading = "lazy";
      picture.alt = `Image ${image.name}`;
      picture.src = image.src;
    } else {
      const place = make("div", `No image: ${image.why} (${image.path})`, item);
      place.className = "none";
    }
    const question = make("p", sample.question ?? "(no question)", item);
    question.className = "text";
    question.dir = "auto";
    const list = make("dl", undefined, item);
    for (const [key, names] of Object.entries(NAMES)) {
      if (sample[key] === undefined || (key === "after" && sample.source !== "test")) continue;
      const row = make("div", undefined, list);
      make("dt", names[sample.source === "test" && names[1] ? 1 : 0], row);
      const value = make("dd", sample[key] ?? "not asked", row);
      value.className = "text";
      value.dir = "auto";
    }
    const verdict = make("p", sample.verdict, item);
    verdict.className = "verdict";
    if (sample.detail) {
      const detail = make("p", sample.detail, item);
      detail.className = "text note";
      detail.dir = "auto";
    }
    const kinds = `${sample.questionType} question, ${sample.answerType} answer`;
    const chance = sample.logprob == null ? "" : `, log-probability ${sample.logprob.toFixed(2)}`;
    make("p", kinds + chance, item).className = "note";
    const anchor = make("a", `link to sample ${String(sample.id).slice(0, 40)}`, make("p", undefined, item));
    anchor.href = "#" + link;
    return item;
  }

  function draw() {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    at("cards").replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(card));
    // What scrolls must be reachable with the keyboard.
    for (const box of document.querySelectorAll("#cards .text, #cards .none")) if (box.scrollHeight > box.clientHeight) box.tabIndex = 0;
    at("count").textContent = `${number(found.length)} of ${number(samples().filter((s) => s.source === source()).length)} shown`;
    at("place").textContent = `page ${number(page + 1)} of ${number(pages)}`;
    at("previous").disabled = page === 0;
    at("next").disabled = page >= pages - 1;
  }

  function turn(by) {
    page += by;
    draw();
    at("gallery-title").scrollIntoView();
  }

  function show(index) {
    cell = index;
    for (const part of document.querySelectorAll("[data-cell]")) part.hidden = Number(part.dataset.cell) !== index;
    if (at("cell")) at("cell").value = String(index);
    choices();
    filter();
  }

  function inspect(on) {
    inspecting = on;
    at("inspect").setAttribute("aria-pressed", String(on));
  }

  function reset() {
    for (const id of [...FILTERS, "order"]) at(id).value = "";
    at("search").value = "";
    inspect(false);
  }

  // A link to a sample: #s=<cell>/<source>/<id>
  function follow() {
    const match = /^#s=(\d+)\/(annotated|test)\/(.*)$/.exec(location.hash);
    if (!match || !data.cells[match[1]]) return;
    wanted = location.hash.slice(1);
    reset();
    at("source").value = match[2];
    show(Number(match[1]));
    const position = found.findIndex((sample) => key(sample) === match[3]);
    if (position < 0) return;
    page = Math.floor(position / PAGE);
    draw();
    const target = document.querySelector("#cards .target");
    target.scrollIntoView({ block: "center" });
    target.querySelector("a").focus({ preventScroll: true });
  }

  for (const id of [...FILTERS, "order"]) at(id).addEventListener("change", filter);
  at("search").addEventListener("input", filter);
  at("source").addEventListener("change", () => { inspect(false); choices(); filter(); });
  at("inspect").addEventListener("click", () => { inspect(!inspecting); filter(); });
  at("filters").addEventListener("reset", (event) => { event.preventDefault(); reset(); filter(); });
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("previous").addEventListener("click", () => turn(-1));
  at("next").addEventListener("click", () => turn(1));
  if (at("cell")) at("cell").addEventListener("change", () => show(Number(at("cell").value)));
  addEventListener("hashchange", follow);
  for (const part of document.querySelectorAll(".scripted")) part.hidden = false;
  show(0);
  follow();
})();
