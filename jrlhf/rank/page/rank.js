// One task at a time. The list on the page is the ranking: its first `placed` cards have a place, the others none yet,
// and a card in `tied` shares the place of the card above it. The page sends one rank for each answer.
"use strict";

const $ = (id) => document.getElementById(id);
const MARGINS = ["", "slightly", "clearly"];

let rater = new URLSearchParams(location.search).get("rater") || "";
let task = null;
let order = []; // numbers of the answers, in the order of the page
let placed = 0;
let tied = new Set();
let focused = 0; // an answer's number
let moves = []; // earlier states for `u`
let busy = false;
let began = 0;
let seen = 0; // milliseconds, while the page was in view

// ---- talking to the server

async function ask(path, body) {
  const options = body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  const answer = await fetch(path, options || {});
  if (!answer.ok) throw new Error(`${answer.status}: ${await answer.text()}`);
  return answer.json();
}

async function send(path, body, message) {
  if (busy) return;
  busy = true;
  try {
    show(await ask(path, { rater, ...body }));
    say(message);
  } catch (error) {
    const gone = error instanceof TypeError;
    say(gone ? "Not saved: the server cannot be reached. Start it again, then repeat." : `Not saved: ${error.message}`);
  } finally {
    busy = false;
  }
}

const submit = () => {
  const missing = order.length - placed;
  if (missing) return say(`${missing} ${missing === 1 ? "answer has" : "answers have"} no place yet.`);
  const margin = document.querySelector("input[name=margin]:checked").value || null;
  return send("api/decide", { task: task.key, ranks: ranks(), margin, ...extras() }, "Saved.");
};
const skip = () => send("api/decide", { task: task.key, skip: true, ...extras() }, "Skipped.");
const takeBack = () => send("api/undo", {}, "The last decision is undone.");
const extras = () => ({ note: $("note").value, seconds: time() / 1000 });

function ranks() {
  const found = new Array(order.length);
  let rank = -1;
  order.forEach((answer, at) => {
    if (!tied.has(answer)) rank = at;
    found[answer] = rank;
  });
  return found;
}

// ---- time in view

const time = () => seen + (document.hidden ? 0 : performance.now() - began);
document.addEventListener("visibilitychange", () => {
  if (document.hidden) seen += performance.now() - began;
  began = performance.now();
});

// ---- changing the order

function change(act) {
  if (busy) return; // the page is about to show the next task
  const before = { order: [...order], placed, tied: new Set(tied), focused };
  act();
  for (const answer of [...tied]) {
    const at = order.indexOf(answer);
    if (at === 0 || at >= placed) tied.delete(answer);
  }
  const same = before.placed === placed && before.tied.size === tied.size && before.order.every((a, i) => a === order[i]);
  if (!same) moves.push(before);
  draw(true);
}

function pick(answer) {
  if (answer >= order.length) return;
  change(() => {
    const at = order.indexOf(answer);
    order.splice(at, 1);
    tied.delete(answer);
    if (at < placed) {
      placed -= 1;
      order.splice(placed, 0, answer);
    } else {
      order.splice(placed, 0, answer);
      placed += 1;
      if (placed === order.length - 1) placed += 1; // the last one has no other place left
    }
    focused = answer;
  });
}

function shift(answer, by) {
  change(() => {
    const at = order.indexOf(answer);
    focused = answer;
    if (by < 0 && at === placed) placed += 1; // across the line between answers with and without a place
    else if (by > 0 && at === placed - 1 && placed < order.length) placed -= 1;
    else if (order[at + by] !== undefined) {
      order.splice(at, 1);
      order.splice(at + by, 0, answer);
      tied.delete(answer);
    }
  });
}

function drop(answer, before) {
  change(() => {
    const from = order.indexOf(answer);
    let to = before === null ? order.length : order.indexOf(before);
    const gets = to <= placed;
    if (from < placed) placed -= 1;
    order.splice(from, 1);
    if (from < to) to -= 1;
    order.splice(to, 0, answer);
    if (gets) placed += 1;
    tied.delete(answer);
    focused = answer;
  });
}

function tie(answer) {
  change(() => {
    const at = order.indexOf(answer);
    focused = answer;
    if (at < 1 || at > placed) return; // the card above has no place to share
    placed = Math.max(placed, at + 1);
    if (!tied.delete(answer)) tied.add(answer);
  });
}

function undo() {
  if (!moves.length || !task) return takeBack();
  ({ order, placed, tied, focused } = moves.pop());
  draw(true);
  return say("Undone.");
}

// ---- showing

function show(state) {
  task = state.task;
  document.querySelector(".progress").hidden = false;
  $("names").hidden = true;
  $("task").hidden = !task;
  $("done").hidden = !!task;
  $("progress").max = state.total;
  $("progress").value = state.done;
  $("count").textContent = `${state.done} of ${state.total}${state.skipped ? `, ${state.skipped} skipped` : ""}`;
  $("who").textContent = state.rater;
  if (!task) return $("done").focus();
  order = task.answers.map((_, answer) => answer);
  placed = 0;
  tied = new Set();
  if (task.ranks) restore(task.ranks);
  focused = order[0];
  moves = [];
  $("note").value = task.note;
  setMargin(task.margin || "");
  $("prompt").replaceChildren(...turns(task.prompt));
  $("asked").hidden = $("prompt").hidden = !task.prompt.length;
  seen = 0;
  began = performance.now();
  draw(true);
  return window.scrollTo(0, 0);
}

function restore(given) {
  order.sort((a, b) => given[a] - given[b]);
  placed = order.length;
  order.forEach((answer, at) => at && given[answer] === given[order[at - 1]] && tied.add(answer));
}

function turns(content) {
  const markdown = $("markdown").checked;
  return content.map(({ role, text, html }) => {
    const turn = element("div", "turn");
    if (role) turn.append(element("div", "role", role));
    const body = element("div", markdown ? "html" : "text");
    if (markdown) body.innerHTML = html; // from the server, which escapes everything that is not Markdown
    else body.textContent = text;
    turn.append(body);
    return turn;
  });
}

function element(tag, name, text) {
  const made = document.createElement(tag);
  made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function draw(focus) {
  const given = ranks();
  const cards = order.map((answer, at) => card(answer, at, given[answer]));
  $("answers").replaceChildren(...cards);
  if (focus) cards[order.indexOf(focused)].focus();
}

function card(answer, at, rank) {
  const has = at < placed;
  const place = has ? `place ${rank + 1}` : "no place";
  const made = element("li", `answer${has ? " placed" : ""}${tied.has(answer) ? " tied" : ""}`);
  made.tabIndex = answer === focused ? 0 : -1;
  made.draggable = true;
  made.dataset.answer = answer;
  const shared = tied.has(answer) ? ", tied with the one above" : "";
  made.setAttribute("aria-label", `Answer ${answer + 1}, ${place}${shared}: ${task.answers[answer].map((t) => t.text).join(" ")}`);
  const left = element("div", "left");
  left.append(button("pick", String(answer + 1), has ? "Remove its place" : "Next best", () => pick(answer)));
  left.append(element("span", "place", has ? `${tied.has(answer) ? "= " : ""}${rank + 1}.` : "–"));
  const content = element("div", "content");
  content.append(...turns(task.answers[answer]));
  const buttons = element("div", "moves");
  buttons.append(button("", "↑", `Move answer ${answer + 1} up`, () => shift(answer, -1)));
  buttons.append(button("", "↓", `Move answer ${answer + 1} down`, () => shift(answer, 1)));
  buttons.append(button("", "=", `Tie answer ${answer + 1} with the one above, or not`, () => tie(answer)));
  made.append(left, content, buttons);
  made.addEventListener("focus", () => { focused = answer; });
  return made;
}

function button(name, text, label, act) {
  const made = element("button", name, text);
  made.type = "button";
  made.tabIndex = -1; // the keys do the same; the tab key stops at the card
  made.setAttribute("aria-label", label);
  made.title = label;
  made.addEventListener("click", act);
  return made;
}

function setMargin(value) {
  document.querySelector(`input[name=margin][value="${value}"]`).checked = true;
}

function say(text) {
  $("status").textContent = text || "";
}

// ---- keys, drag and buttons

function move(by) {
  const at = order.indexOf(focused) + by;
  if (order[at] === undefined) return;
  focused = order[at];
  draw(true);
}

function nextMargin() {
  const now = document.querySelector("input[name=margin]:checked").value;
  setMargin(MARGINS[(MARGINS.indexOf(now) + 1) % MARGINS.length]);
}

const KEYS = {
  t: () => tie(focused),
  s: skip,
  u: undo,
  m: nextMargin,
  n: () => $("note").focus(),
  d: () => $("markdown").click(),
  Enter: submit,
  ArrowUp: (event) => (event.shiftKey ? shift(focused, -1) : move(-1)),
  ArrowDown: (event) => (event.shiftKey ? shift(focused, 1) : move(1)),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const { target, key } = event;
  if (target.id === "note" || target.id === "name") {
    if (key === "Escape" && task) draw(true);
    return;
  }
  if (key === "Enter" && target.matches("button, a")) return;
  if (key.startsWith("Arrow") && target.matches("input[type=radio]")) return;
  if (!task) {
    if (key === "u" && !$("done").hidden) takeBack();
    return;
  }
  const act = /^[1-9]$/.test(key) ? () => pick(Number(key) - 1) : KEYS[key];
  if (!act || event.repeat && !key.startsWith("Arrow")) return;
  event.preventDefault();
  say("");
  act(event);
});

let dragged = null;
const cardAt = (event) => event.target.closest && event.target.closest(".answer");
const unmark = () => document.querySelectorAll(".over").forEach((over) => over.classList.remove("over"));
$("answers").addEventListener("dragstart", (event) => {
  dragged = Number(cardAt(event).dataset.answer);
  event.dataTransfer.effectAllowed = "move";
  event.dataTransfer.setData("text/plain", String(dragged + 1));
});
$("answers").addEventListener("dragover", (event) => {
  if (dragged === null) return;
  event.preventDefault();
  unmark();
  const over = cardAt(event);
  if (over) over.classList.add("over");
});
$("answers").addEventListener("drop", (event) => {
  event.preventDefault();
  const over = cardAt(event);
  if (dragged === null) return;
  const box = over && over.getBoundingClientRect();
  const at = over ? order.indexOf(Number(over.dataset.answer)) + (event.clientY > box.top + box.height / 2) : order.length;
  const before = order[at] === undefined ? null : order[at];
  if (before !== dragged) drop(dragged, before);
});
$("answers").addEventListener("dragend", () => { dragged = null; unmark(); });

$("submit").addEventListener("click", submit);
$("skip").addEventListener("click", skip);
$("undo").addEventListener("click", undo);
$("reopen").addEventListener("click", takeBack);
$("markdown").addEventListener("change", () => {
  $("prompt").replaceChildren(...turns(task.prompt));
  draw(true);
});
$("names").addEventListener("submit", (event) => {
  event.preventDefault();
  start($("name").value.trim());
});

// ---- beginning

function start(name) {
  rater = name;
  history.replaceState(null, "", `?rater=${encodeURIComponent(name)}`); // the token is in the cookie now
  send("api/next", {}, "");
}

async function names() {
  history.replaceState(null, "", location.pathname);
  $("names").hidden = false;
  const { raters } = await ask("api/raters");
  for (const name of raters) {
    const made = element("button", "", name);
    made.type = "button";
    made.addEventListener("click", () => start(name));
    $("known").append(made);
  }
  $("name").focus();
}

if (rater) start(rater);
else names();
