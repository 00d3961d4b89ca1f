// SPDX-License-Identifier: Apache-2.0
// The page: one input, its settings, one running job, and what this session has made. All of it lives in this tab.

import { makeViewer } from "./viewer.js";

const find = (id) => document.getElementById(id);
const viewer = makeViewer(find);
const MOST_KEPT = 24;

let about = null; // models and limits
let input = null; // {file, looked, url}
let running = null; // AbortController of the job
let history = []; // newest first: {input, settings, result}
let current = null;
let planned = 0;

const size = (bytes) => (bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : bytes >= 1e6 ? `${Math.round(bytes / 1e6)} MB` : `${Math.max(1, Math.round(bytes / 1e3))} kB`);
const model = () => about.models.find((one) => one.name === find("model").value) ?? about.models[0];
const isPrompt = () => input?.looked.kind === "prompt";
const isImage = () => input?.looked.kind === "image";

function complain(message) {
  find("error").firstElementChild.textContent = message ?? "";
  find("error").hidden = !message;
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is pidecode web still running?");
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new Error(told?.error?.message ?? `The server answered ${answer.status}.`);
}

// ---- settings

function option(value, text) {
  const made = document.createElement("option");
  made.value = value;
  made.textContent = text;
  return made;
}

function fillSettings() {
  const chosen = model(), student = chosen.kind === "student";
  const kept = { scale: find("scale").value, steps: find("steps").value };
  const factors = [chosen.scale, ...[4, 3, 2, 1].filter((one) => one < chosen.scale)];
  find("scale").replaceChildren(...factors.map((one) => option(one, one === chosen.scale ? `${one}×` : `${one}×, reduced from ${chosen.scale}×`)));
  const steps = student ? [4, 3, 2, 1] : [25, 15, 35, 50];
  find("steps").replaceChildren(...steps.map((one, index) => option(one, index ? String(one) : `${one}, as trained`)));
  if (factors.includes(Number(kept.scale))) find("scale").value = kept.scale;
  if (steps.includes(Number(kept.steps))) find("steps").value = kept.steps;
  for (const [name, on] of Object.entries({
    "for-image": !input || isImage(), "for-latent": input && !isImage(), "for-foreign": input && !isImage() && !isPrompt() && !input.looked.space,
    "for-prompts": chosen.reads_text && !isPrompt(), "for-student": student, "for-teacher": !student,
  })) for (const element of document.getElementsByClassName(name)) element.hidden = !on;
}

function readSettings() {
  const settings = {
    model: find("model").value, seed: find("seed").value, steps: find("steps").value, format: find("format").value,
  };
  if (Number(find("sigma").value)) settings.sigma = find("sigma").value;
  if (model().kind === "student") settings.sampler = find("sampler").value;
  else settings.guidance = find("guidance").value;
  if (model().reads_text && !isPrompt() && find("prompt").value.trim()) settings.prompt = find("prompt").value.trim();
  if (isImage()) {
    settings.fit = find("fit").value;
    settings.scale = find("scale").value;
    if (find("color_fix").value) settings.color_fix = find("color_fix").value;
  } else {
    if (find("to-width").value) settings.width = find("to-width").value;
    if (find("to-height").value) settings.height = find("to-height").value;
    if (!input.looked.space && !isPrompt()) settings.space = find("space").value;
  }
  return settings;
}

function writeSettings(settings) {
  if (about.models.some((one) => one.name === settings.model)) find("model").value = settings.model;
  fillSettings();
  for (const name of ["seed", "steps", "sampler", "guidance", "fit", "scale", "format", "space", "prompt"]) {
    const value = settings[name], field = find(name);
    if (value === undefined) continue;
    if (field.tagName === "SELECT" && ![...field.options].some((one) => one.value === String(value))) continue;
    field.value = value;
  }
  find("sigma").value = settings.sigma ?? 0;
  find("color_fix").value = settings.color_fix ?? "";
  find("to-width").value = settings.width ?? "";
  find("to-height").value = settings.height ?? "";
  if (settings.prompt === undefined) find("prompt").value = "";
  showSigma();
}

const showSigma = () => (find("sigma-value").textContent = Number(find("sigma").value) ? Number(find("sigma").value).toFixed(2) : "off");

// ---- input and plan

function showInput() {
  const { file, looked, url } = input;
  find("source").hidden = false;
  find("source-name").textContent = file.name;
  find("source-name").title = file.name;
  const facts = isPrompt() ? "to be painted, " : isImage() ? "image, " : `latent${looked.space ? ` of ${looked.space}` : ""}, `;
  const noise = looked.sigma ? `, noise ${looked.sigma.toFixed(2)}` : "";
  find("source-facts").textContent = `${facts}${isPrompt() ? "by the image model" : `${looked.width}×${looked.height}${isImage() ? "" : " cells"}`}${noise}`;
  find("source-thumb").hidden = !isImage();
  if (isImage()) find("source-thumb").src = url;
  find("choose").firstElementChild.textContent = "Choose another";
  find("from-recipe").hidden = !looked.recipe;
  find("drop").hidden = true;
  fillSettings();
}

async function take(file) {
  if (!file || running) return;
  complain();
  try {
    if (file.size > about.limits.body_bytes) throw new Error(`${file.name} has ${size(file.size)}; at most ${size(about.limits.body_bytes)} can be taken.`);
    const looked = await (await ask("api/look", { method: "POST", body: file })).json();
    input = { file, looked, url: looked.kind === "image" ? URL.createObjectURL(file) : null };
  } catch (error) {
    complain(error.message);
    return;
  }
  current = null;
  if (input.looked.prompt && !find("prompt").value) find("prompt").value = input.looked.prompt;
  find("to-width").value = find("to-height").value = "";
  showInput();
  clearResult();
  if (isImage()) {
    const { width, height } = input.looked;
    viewer.show({ beforeUrl: null, afterUrl: input.url, wide: width, high: height });
    find("tag-after").textContent = "Input";
  } else {
    viewer.hide();
  }
  drawHistory();
  await plan();
}

async function takePrompt() {
  const prompt = find("prompt").value.trim();
  if (!prompt || running) return;
  complain();
  input = { file: { name: prompt }, looked: { kind: "prompt", width: 1, height: 1 }, url: null, prompt };
  current = null;
  if (!find("to-width").value) find("to-width").value = find("to-height").value = 2048;
  showInput();
  clearResult();
  viewer.hide();
  drawHistory();
  await plan();
}

async function plan() {
  const turn = ++planned, card = find("plan-card"), meter = find("plan-meter");
  if (!input) return;
  const chosen = model();
  find("go").disabled = true;
  let words, large = false, share = null;
  const refused = isImage() && !chosen.takes_images
    ? `${chosen.name} has no encoder here, so it takes latents only. \`pidecode pull ${chosen.space}\` fetches one.`
    : input.looked.space && input.looked.space !== chosen.space
      ? `The latent is of space ${input.looked.space}; ${chosen.name} decodes ${chosen.space}.` : null;
  try {
    if (refused) throw new Error(refused);
    const query = new URLSearchParams({ kind: isImage() ? "image" : "latent", width: input.looked.width, height: input.looked.height, model: chosen.name });
    const wide = find("to-width").value, high = find("to-height").value;
    if (!isImage() && wide && high) [["to_width", wide], ["to_height", high]].forEach((pair) => query.set(...pair));
    const told = await (await ask(`api/plan?${query}`)).json();
    const factor = isImage() ? Number(find("scale").value) / chosen.scale : 1;
    const made = `${Math.round(told.width * factor)}×${Math.round(told.height * factor)} pixels`;
    large = !told.fits;
    share = told.free ? told.working / told.free : null;
    words = `The result will have ${made}. Memory: about ${size(told.working)}${told.free ? `, of ${size(told.free)} free` : ""}.`
      + (large ? " That does not fit: use a smaller input." : "");
  } catch (error) {
    words = error.message;
    large = true;
  }
  if (turn !== planned) return;
  find("plan").textContent = words;
  card.classList.toggle("large", large);
  meter.hidden = share === null;
  meter.firstElementChild.style.width = `${Math.min(100, Math.max(1, 100 * (share ?? 0)))}%`;
  find("go").disabled = large || running !== null;
}

// ---- the job

function clearResult() {
  for (const id of ["tools", "warnings", "recipe", "progress"]) find(id).hidden = true;
  document.body.classList.remove("has-result");
}

function showProgress(told) {
  const bar = find("progress").firstElementChild;
  find("progress").hidden = false;
  const waiting = told.state === "waiting" || !told.total;
  bar.classList.toggle("waiting", waiting);
  bar.firstElementChild.style.width = waiting ? "" : `${(100 * told.done) / told.total}%`;
  if (told.state === "waiting") find("status").textContent = told.place > 1 ? `Waiting: ${told.place - 1} before this one.` : "Waiting: next in line.";
  else find("status").textContent = told.total ? `${told.note === "painting" ? "Painting, step" : "Step"} ${told.done} of ${told.total}` : "Preparing…";
}

async function* lines(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

async function run() {
  const settings = readSettings(), job = { ...input }, kind = isPrompt() ? "paint" : isImage() ? "upscale" : "decode";
  running = new AbortController();
  working(true);
  complain();
  clearResult();
  showProgress({ state: "waiting", place: 1 });
  const preview = document.createElement("img");
  let last = null;
  try {
    const answer = await ask(`api/${kind}?${new URLSearchParams(settings)}`, { method: "POST", body: job.prompt ?? job.file, signal: running.signal });
    for await (const told of lines(answer)) {
      last = told;
      if (told.state === "waiting" || told.state === "running") showProgress(told);
      if (told.preview) {
        preview.src = told.preview;
        await preview.decode();
        const [wide, high] = [preview.naturalWidth, preview.naturalHeight];
        const known = !find("viewer").hidden && isImage();
        if (known) viewer.preview(told.preview);
        else viewer.show({ beforeUrl: null, afterUrl: told.preview, wide, high, keepView: true });
        find("tag-after").textContent = "Preview";
      }
    }
    if (last?.state !== "done") throw new Error(last?.message ?? "The server stopped in the middle of the job.");
    const blob = await (await ask(last.finished)).blob();
    remember(job, settings, { ...last, url: URL.createObjectURL(blob), blob });
  } catch (error) {
    const stopped = error.name === "AbortError";
    find("progress").hidden = true;
    if (isImage()) viewer.show({ beforeUrl: null, afterUrl: input.url, wide: input.looked.width, high: input.looked.height });
    else viewer.hide();
    find("tag-after").textContent = "Input";
    if (!stopped) complain(error.message);
    else {
      find("progress").hidden = false;
      find("progress").firstElementChild.firstElementChild.style.width = "0";
      find("progress").firstElementChild.classList.remove("waiting");
      find("status").textContent = "Cancelled.";
    }
  } finally {
    running = null;
    working(false);
    plan();
  }
}

function working(on) {
  document.body.classList.toggle("working", on);
  find("go").hidden = on;
  find("cancel").hidden = !on;
  find("file").disabled = on;
}

// ---- results and history

function showResult(entry) {
  current = entry;
  const { result, settings } = entry, image = entry.input.looked.kind === "image";
  const factor = Number(settings.scale ?? 1), looked = entry.input.looked;
  const whole = about.models.find((one) => one.name === settings.model);
  const fixed = image && Math.abs(looked.width * factor - result.width) > 64 * factor; // resized to a fixed input
  viewer.show({
    beforeUrl: image ? entry.input.url : null, afterUrl: result.url, wide: result.width, high: result.height,
    beforeSize: image && whole && !fixed ? [looked.width * factor, looked.height * factor] : null, keepView: true,
  });
  find("tag-after").textContent = "After";
  find("progress").hidden = true;
  find("tools").hidden = false;
  find("result-facts").textContent = `${result.width}×${result.height}, ${size(result.bytes)}, ${result.seconds} s`;
  const link = find("download");
  link.href = result.url;
  link.download = entry.name;
  find("warnings").hidden = !result.warnings.length;
  find("warnings").replaceChildren(...result.warnings.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
  const rows = Object.entries(result.recipe).flatMap(([key, value]) => [
    Object.assign(document.createElement("dt"), { textContent: key.replaceAll("_", " ") }),
    Object.assign(document.createElement("dd"), { textContent: typeof value === "object" ? Object.entries(value).map((pair) => pair.join(" ")).join(", ") : String(value) }),
  ]);
  find("recipe").querySelector("dl").replaceChildren(...rows);
  find("recipe").hidden = false;
  document.body.classList.add("has-result");
  drawHistory();
}

async function remember(job, settings, result) {
  const stem = job.prompt ? job.prompt.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) : job.file.name.replace(/\.[^.]*$/, "") || "image", ending = settings.format === "jpeg" ? "jpg" : settings.format;
  const entry = { input: job, settings, result, name: `${stem}-pid-${settings.seed}.${ending}`, thumb: document.createElement("canvas") };
  history.unshift(entry);
  for (const old of history.splice(MOST_KEPT)) {
    URL.revokeObjectURL(old.result.url);
    if (old.input.url && !history.some((one) => one.input.url === old.input.url)) URL.revokeObjectURL(old.input.url);
  }
  showResult(entry);
  const scale = 240 / Math.max(result.width, result.height);
  const bitmap = await createImageBitmap(result.blob, { resizeWidth: Math.max(1, Math.round(result.width * scale)), resizeQuality: "high" });
  entry.thumb.width = bitmap.width;
  entry.thumb.height = bitmap.height;
  entry.thumb.getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
}

function drawHistory() {
  find("history").hidden = !history.length;
  find("history").querySelector("ol").replaceChildren(...history.map((entry) => {
    const button = document.createElement("button"), words = document.createElement("span");
    button.type = "button";
    button.setAttribute("aria-current", String(entry === current));
    const strength = entry.settings.sigma ? `, strength ${entry.settings.sigma}` : "";
    words.textContent = `${entry.input.file.name}: seed ${entry.settings.seed}${strength}`;
    entry.thumb.setAttribute("aria-hidden", "true");
    button.append(entry.thumb, words);
    button.addEventListener("click", () => restore(entry));
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
}

function restore(entry) {
  if (running) return;
  complain();
  input = entry.input;
  writeSettings(entry.settings);
  showInput();
  showResult(entry);
  plan();
}

function useRecipe() {
  const recipe = input.looked.recipe, given = {};
  for (const name of ["seed", "steps", "sampler", "guidance", "prompt", "model", "color_fix"]) if (recipe[name] !== undefined) given[name] = recipe[name];
  if (recipe.sigma > 0 && recipe.sigma <= 0.8) given.sigma = recipe.sigma;
  writeSettings({ ...readSettings(), ...given });
  find("from-recipe").hidden = true;
  plan();
}

// ---- wiring

find("file").addEventListener("change", (event) => {
  take(event.target.files[0]);
  event.target.value = "";
});
find("drop").addEventListener("click", () => find("file").click());
find("panel").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!find("go").disabled && !running) run();
});
find("cancel").addEventListener("click", () => running?.abort());
find("dice").addEventListener("click", () => (find("seed").value = Math.floor(Math.random() * 2 ** 31)));
find("sigma").addEventListener("input", showSigma);
find("model").addEventListener("change", () => (fillSettings(), plan()));
for (const id of ["scale", "to-width", "to-height", "fit"]) find(id).addEventListener("change", plan);
find("error").lastElementChild.addEventListener("click", () => complain());
find("use-prompt").addEventListener("click", takePrompt);
find("use-recipe").addEventListener("click", useRecipe);
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  take(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => take(event.clipboardData.files[0]));

try {
  about = await (await ask("api/about")).json();
  find("model").replaceChildren(...about.models.map((one) => option(one.name, `${one.name}, ${one.space} ${one.scale}×`)));
  find("space").replaceChildren(...[...new Set(about.models.map((one) => one.space))].map((one) => option(one, one)));
  find("about").textContent = `version ${about.version}, on ${about.device}`;
  find("words").hidden = !about.paints;
  fillSettings();
  showSigma();
  document.body.dataset.ready = "true";
} catch (error) {
  complain(error.message);
}
