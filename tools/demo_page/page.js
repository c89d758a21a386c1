"use strict";
// The page of tools/demo.py. What comes from a model or a user becomes text nodes only, never markup.

const part = (id) => document.getElementById(id);
const MASK = "[MASK]";
const ENDS = { eos: "ended by the model", length: "up to the limit" };
const SPACES = { " ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥" };

let about; // what GET model says
let running = null; // the AbortController of the answer under way
let pinned = null; // the token whose probabilities stay, once it was clicked

function element(tag, text = "", classes = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = classes;
  return made;
}

// --- numbers and names ------------------------------------------------------------------------------------------

const visible = (text) => text.replace(/[ \n\r\t]/g, (space) => SPACES[space]);

function percent(p) {
  if (p < 0.0005) return p === 0 ? "0" : p.toExponential(0);
  return `${(100 * p).toFixed(p < 0.1 ? 2 : 1)}%`;
}

// From 0.1% (0) to 100% (1) by the logarithm: the lower half goes towards one colour, the upper towards the other.
function paint(token, p) {
  const height = Math.min(1, Math.max(0, 1 + Math.log10(p) / 3));
  token.style.setProperty("--low", `${Math.max(0, 100 - 200 * height)}%`);
  token.style.setProperty("--high", `${Math.max(0, 200 * height - 100)}%`);
}

// --- the output: tokens, and the probabilities of one beside them -------------------------------------------------

// choices: for each list that is shown for this token {title, said, candidates: [[text, probability], …], and which of
// them it is: place; -1 if none, then it is [text, probability] itself: taken}.
function addToken(text, p, choices, classes = "") {
  const token = element("span", text, `token ${classes}`);
  token.setAttribute("role", "button");
  token.setAttribute("aria-pressed", "false");
  token.setAttribute("aria-label", `${visible(text) || "no text"}, ${percent(p)}`);
  token.tabIndex = part("output").querySelector(".token") ? -1 : 0;
  token.choices = choices;
  paint(token, p);
  part("output").append(token);
  return token;
}

function candidateRow([text, p], classes) {
  const row = element("li", "", classes);
  const name = element("code", visible(text));
  const bar = element("div", "", "bar");
  name.title = visible(text);
  bar.style.setProperty("--width", `${100 * p}%`);
  row.append(name, bar, element("span", percent(p)));
  return row;
}

function showChoices(token) {
  part("detail").replaceChildren(
    ...token.choices.flatMap(({ title, said, candidates, place, taken }) => {
      const list = element("ol");
      candidates.forEach((candidate, i) =>
        list.append(candidateRow(candidate, i === place ? "taken" : "")));
      if (place < 0) list.append(candidateRow(taken, "taken further"));
      return [element("h3", title), element("p", said), list];
    }),
  );
}

function pin(token) {
  pinned?.setAttribute("aria-pressed", "false");
  pinned = token === pinned ? null : token;
  pinned?.setAttribute("aria-pressed", "true");
  if (pinned) showChoices(pinned);
}

function clearOutput() {
  pinned = null;
  part("output").replaceChildren();
  part("detail").replaceChildren();
  part("error").textContent = "";
}

// --- what the server answers --------------------------------------------------------------------------------------

// A decoder's lines. Tokens without text (half a character) wait for the one that completes it.
function makeContinuation(prompt) {
  const began = performance.now();
  let waiting = [];
  let count = 0;
  part("output").append(element("span", prompt, "given"));
  return ({ text, tokens, finish }) => {
    waiting.push(...tokens);
    count += tokens.length;
    if (waiting.length && (text || finish)) {
      const choices = waiting.map(({ token, alternatives, place }) => ({
        title: visible(token[0]),
        said: `${percent(token[1])}, ${(-Math.log2(token[1])).toFixed(1)} bits of surprise`,
        candidates: alternatives,
        place,
        taken: token,
      }));
      const p = waiting.reduce((product, { token }) => product * token[1], 1);
      const classes = !text ? "nothing" : /^\s*\n\s*$/.test(text) ? "line-end" : "";
      const token = addToken(text, p, choices, classes);
      if (!pinned) showChoices(token);
      waiting = [];
    } else if (text) {
      part("output").append(document.createTextNode(text));
    }
    const seconds = (performance.now() - began) / 1000;
    if (finish) say(`${count} tokens in ${seconds.toFixed(1)} s, ${ENDS[finish]}.`);
  };
}

// An encoder's one line: the text with the likeliest token at each mask.
function showFilled({ parts, masks }) {
  parts.forEach((text, i) => {
    part("output").append(element("span", text, "given"));
    if (i >= masks.length) return;
    const best = masks[i][0];
    const title = masks.length > 1 ? `Mask ${i + 1} of ${masks.length}` : "The masked word";
    const choices = [{ title, said: "the likeliest tokens", candidates: masks[i], place: 0 }];
    const token = addToken(best[0], best[1], choices, "place");
    if (i === 0) showChoices(token);
  });
  say(`${masks.length} ${masks.length > 1 ? "masks" : "mask"} filled; each shows its likeliest token.`);
}

async function* readLines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

async function ask(wanted, signal) {
  const response = await fetch(about.path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(wanted),
    signal,
  });
  if (response.ok) return response;
  const said = await response.text();
  let problem = said;
  try {
    problem = JSON.parse(said).error;
  } catch {} // not of this server's making: shown as it is
  throw new Refusal(problem || response.statusText);
}

class Refusal extends Error {}

// --- what one does ------------------------------------------------------------------------------------------------

const say = (text) => (part("status").textContent = text);

function setRunning(controller) {
  running = controller;
  part("go").disabled = controller !== null;
  part("stop").disabled = controller === null;
}

async function run() {
  if (running || !about) return;
  clearOutput();
  setRunning(new AbortController());
  say("Working …");
  const patience = setTimeout(
    () => say("Still working: a length of text that is new is compiled first, and others may be before you …"), 3000);
  const wanted = { text: part("text").value };
  for (const { name } of about.options) wanted[name] = part(`option-${name}`).valueAsNumber;
  try {
    const show = about.family === "gpt" ? makeContinuation(wanted.text) : showFilled;
    for await (const line of readLines(await ask(wanted, running.signal))) {
      clearTimeout(patience);
      if (part("status").textContent.endsWith("…") || line.tokens) say("Writing …");
      show(line);
    }
  } catch (problem) {
    say(problem.name === "AbortError" ? "Stopped." : "");
    if (problem instanceof Refusal) part("error").textContent = problem.message;
    else if (problem.name !== "AbortError")
      part("error").textContent = "The server broke off: its terminal may say why.";
  } finally {
    clearTimeout(patience);
    setRunning(null);
  }
}

function stop() {
  running?.abort();
}

// The selected text, or the word at the cursor, becomes a mask.
function maskWord() {
  const field = part("text");
  let { selectionStart: start, selectionEnd: end } = field;
  const isWord = (character) => character !== undefined && /[\p{L}\p{N}_'’]/u.test(character);
  if (start === end) {
    while (isWord(field.value[start - 1])) start--;
    while (isWord(field.value[end])) end++;
  }
  field.focus();
  if (start === end) return say("Put the cursor into a word, or select some text.");
  if (field.value.slice(start - 1, end + 1) === MASK) return;
  field.setRangeText(MASK, start, end, "end");
}

function changeTheme() {
  const root = document.documentElement;
  const isDark = getComputedStyle(root).colorScheme === "dark" ||
    (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  root.dataset.theme = isDark ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
}

const tokenAt = (event) => event.target.closest?.(".token");

function moveAmongTokens(event) {
  const tokens = [...part("output").querySelectorAll(".token")];
  const at = tokens.indexOf(tokenAt(event));
  if (at < 0) return;
  if (event.key === "Enter" || event.key === " ") pin(tokens[at]);
  else {
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (to === undefined) return;
    const next = tokens[Math.min(tokens.length - 1, Math.max(0, to))];
    tokens[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
  event.preventDefault();
}

function listen() {
  part("form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  part("stop").addEventListener("click", stop);
  part("mask").addEventListener("click", maskWord);
  part("theme").addEventListener("click", changeTheme);
  const output = part("output");
  output.addEventListener("keydown", moveAmongTokens);
  output.addEventListener("click", (event) => tokenAt(event) && pin(tokenAt(event)));
  for (const kind of ["mouseover", "focusin"])
    output.addEventListener(kind, (event) => tokenAt(event) && showChoices(tokenAt(event)));
  output.addEventListener("mouseleave", () => pinned && showChoices(pinned));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
    else if (event.code === "KeyM" && event.altKey && !part("mask").hidden) maskWord();
    else return;
    event.preventDefault();
  });
}

function makeField({ name, label, least, most, step, default: value }) {
  const field = element("div");
  const title = element("label", label);
  title.htmlFor = `option-${name}`;
  const input = element("input");
  Object.assign(input, { id: `option-${name}`, type: "number", min: least, max: most, step, value });
  field.append(title, input);
  return field;
}

async function begin() {
  const theme = localStorage.getItem("theme");
  if (theme) document.documentElement.dataset.theme = theme;
  listen();
  about = await (await fetch("model")).json();
  const isDecoder = about.family === "gpt";
  part("about").textContent =
    `${about.checkpoint} · ${isDecoder ? "decoder" : "encoder"}, context of ${about.max_len} tokens`;
  part("text-label").textContent = isDecoder ? "Prompt" : `Text with ${MASK}`;
  part("text").placeholder = isDecoder ? "The beginning of a text" : `The capital of France is ${MASK}.`;
  part("go-label").textContent = isDecoder ? "Generate" : "Fill the masks";
  part("stop").hidden = !isDecoder;
  part("mask").hidden = isDecoder;
  part("options").replaceChildren(...about.options.map(makeField));
  part("go").disabled = false;
}

begin().catch(() => (part("error").textContent = "The server does not answer: is it still running?"));
