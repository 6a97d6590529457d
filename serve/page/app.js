// The page of the text-generation server.
//
//   app.js       puts the parts together: the composer, the conversation, the key
//   settings.js  decoders, their options and pace  ->  parameters of a request
//   turn.js      one prompt: a panel for each decoder, and the timeline that they share
//   panel.js     one answer: reads the stream, keeps the frames, counts
//   frames.js    the canvas after each step
//   canvas.js    draws a frame as cells, and tells of the cell under the pointer or in focus
//   api.js       the server's interface: JSON, streams, the key
//   health.js    says when the server is gone and when it is back
//   gaps.js      gaps in a text
//   dom.js       elements
//
// A request flows down this list and its events flow up. There is no state outside these objects; what was
// typed and what was written become text nodes, never HTML.

import { ServerError, getJSON, hasKey, setKey } from "./api.js";
import { byId, plural } from "./dom.js";
import { countGaps, insertGap } from "./gaps.js";
import { Health } from "./health.js";
import { Settings } from "./settings.js";
import { Turn } from "./turn.js";

const prompt = byId("prompt");
const settings = new Settings();
const health = new Health(loadCatalogue);
let turns = [];
let stopper = null;
let eager = false; // sent before the decoders were there

/** Fetch the decoders and the model's name, once the server is there. */
async function loadCatalogue() {
  try {
    const [catalogue, models] = await Promise.all([getJSON("v1/decoders"), getJSON("v1/models")]);
    settings.load(catalogue);
    byId("model").textContent = models.data[0].id;
    byId("key-form").hidden = true;
    adaptComposer();
    if (eager) send();
  } catch (error) {
    if (error.status === 401) askForKey();
    else byId("hint").textContent = error.message;
  }
}

function askForKey() {
  byId("key-problem").textContent = hasKey() ? "The server refused this key." : "";
  byId("key-form").hidden = false;
  byId("key").focus();
}

/** Answer what is in the composer. */
async function send() {
  const text = prompt.value;
  if (stopper || !text.trim() || !settings.valid()) return;
  eager = !settings.sides.length;
  if (eager) {
    byId("hint").textContent = "It will be sent once the server is there.";
    return;
  }
  const fills = countGaps(text) > 0;
  const seed = settings.seed();
  const sides = settings.active;
  const turn = new Turn(text, seed, sides.map((side) => side.preset.name), fills);
  const shared = { seed, max_tokens: settings.maxTokens, ...subject(text, fills) };
  const bodies = sides.map((side) => ({ ...shared, ...side.parameters() }));
  turns.push(turn);
  byId("turns").append(turn.element);
  byId("welcome").hidden = true;
  prompt.value = "";
  await running(turn, bodies);
}

/** What a request is about: the conversation and its new message, or a text with gaps. */
function subject(text, fills) {
  if (fills) return { text };
  return { messages: [...turns.flatMap((turn) => turn.messages), { role: "user", content: text }] };
}

/** Run a turn to its end, or until it is stopped or fails. */
async function running(turn, bodies) {
  stopper = new AbortController();
  adaptComposer();
  const follower = follow(turn.element);
  try {
    await turn.run(bodies, stopper.signal, settings.inTurn);
    announce(turn);
  } catch (error) {
    report(error);
  } finally {
    stopper = null;
    adaptComposer();
    requestAnimationFrame(() => requestAnimationFrame(() => follower.disconnect()));
  }
}

/** Keep an element in view as it grows, unless the reader has scrolled away from the end. */
function follow(element) {
  const page = document.documentElement;
  const observer = new ResizeObserver(() => {
    if (page.scrollHeight - page.scrollTop - page.clientHeight < 400) element.scrollIntoView({ block: "nearest" });
  });
  observer.observe(element);
  element.scrollIntoView({ block: "nearest" });
  return observer;
}

/** Read the answers out. */
function announce(turn) {
  byId("announcement").textContent = turn.panels.map((panel) => `${panel.name}: ${panel.answer}`).join("\n");
}

/** Act on an error, whose words the turn shows already. */
function report(error) {
  if (error.name === "AbortError") return;
  if (!(error instanceof ServerError)) throw error;
  if (error.status === 401) askForKey();
  if (error.gone || error.status >= 500) health.check();
}

/** Buttons and hint, for what is typed and whether something runs. */
function adaptComposer() {
  const gaps = countGaps(prompt.value);
  const focused = document.activeElement;
  byId("send").textContent = gaps ? "Fill" : "Answer";
  byId("send").hidden = Boolean(stopper);
  byId("stop").hidden = !stopper;
  byId("hint").classList.toggle("gaps", gaps > 0);
  const filled = `${gaps} ${plural(gaps, "gap")} will be filled.`;
  byId("hint").textContent = gaps ? filled : "Enter sends, Shift+Enter starts a line.";
  if (focused === byId("send") && stopper) byId("stop").focus();
  if (focused === byId("stop") && !stopper) prompt.focus();
}

function startAgain() {
  stopper?.abort();
  turns = [];
  byId("turns").replaceChildren();
  byId("welcome").hidden = false;
  prompt.focus();
}

function toggleSettings() {
  const open = document.body.classList.toggle("settings-open");
  byId("settings-toggle").setAttribute("aria-expanded", open);
}

function sendOnEnter(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
}

function listen() {
  prompt.addEventListener("input", () => {
    eager = false;
    adaptComposer();
  });
  prompt.addEventListener("keydown", sendOnEnter);
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("stop").addEventListener("click", () => stopper?.abort());
  document.addEventListener("keydown", (event) => event.key === "Escape" && stopper?.abort());
  byId("gap").addEventListener("click", () => insertGap(prompt));
  byId("new").addEventListener("click", startAgain);
  byId("settings-toggle").addEventListener("click", toggleSettings);
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey(byId("key").value);
    loadCatalogue();
  });
  for (const example of document.querySelectorAll(".examples button")) {
    example.addEventListener("click", () => {
      prompt.value = example.textContent;
      send();
    });
  }
}

listen();
adaptComposer();
health.check();
