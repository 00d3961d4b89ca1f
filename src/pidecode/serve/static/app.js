// SPDX-License-Identifier: Apache-2.0
// The page: one input, its settings, one running job and the session's history. All state is in this tab.

import { makeViewer } from "./viewer.js";

const find = (id) => document.getElementById(id);
const viewer = makeViewer(find);
const HISTORY_LENGTH = 24;

let server = null; // version, device, limits and models
let input = null; // {file, info, url}
let running = null; // AbortController of the job
let history = []; // newest first: {input, settings, result}
let current = null;
let planRequests = 0;

const size = (bytes) => (bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : bytes >= 1e6 ? `${Math.round(bytes / 1e6)} MB` : `${Math.max(1, Math.round(bytes / 1e3))} kB`);
const model = () => server.models.find((one) => one.id === find("model").value) ?? server.models[0];
const isPrompt = () => input?.info.kind === "prompt";
const isImage = () => input?.info.kind === "image";
const hasSize = () => !find("to-width").closest(".row").hidden && find("to-width").value && find("to-height").value;

function showError(message) {
  find("error").firstElementChild.textContent = message ?? "";
  find("error").hidden = !message;
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is pidecode still running?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `The server answered ${response.status}.`);
}

// ---- settings

function option(value, text) {
  return Object.assign(document.createElement("option"), { value, textContent: text });
}

function fillSettings() {
  const chosen = model(), student = chosen.kind === "student";
  const kept = { scale: find("scale").value, num_steps: find("num_steps").value };
  const factors = [chosen.scale, ...[4, 3, 2, 1].filter((one) => one < chosen.scale)];
  find("scale").replaceChildren(...factors.map((one) => option(one, one === chosen.scale ? `${one}×` : `${one}×, downsampled from ${chosen.scale}×`)));
  const steps = student ? [4, 3, 2, 1] : [25, 15, 35, 50];
  find("num_steps").replaceChildren(...steps.map((one, index) => option(one, index ? String(one) : `${one}, as trained`)));
  if (factors.includes(Number(kept.scale))) find("scale").value = kept.scale;
  if (steps.includes(Number(kept.num_steps))) find("num_steps").value = kept.num_steps;
  find("sigma").max = chosen.max_sigma;
  for (const [name, on] of Object.entries({
    "for-image": !input || isImage(), "for-size": input && (isPrompt() || (!isImage() && chosen.kind !== "feed-forward")), "for-unknown-space": input && !isImage() && !isPrompt() && !input.info.space,
    "for-text-readers": chosen.reads_text && !isPrompt(), "for-student": student, "for-teacher": chosen.kind === "teacher",
    "for-diffusion": chosen.kind !== "feed-forward", "for-seed": chosen.kind !== "feed-forward" || isPrompt(),
  })) for (const element of document.getElementsByClassName(name)) element.hidden = !on;
}

function readSettings() {
  const settings = { model: find("model").value, format: find("format").value }, { kind } = model();
  if (kind !== "feed-forward" || isPrompt()) settings.seed = find("seed").value; // the seed of a text-to-image pipeline, too
  if (kind !== "feed-forward") settings.num_steps = find("num_steps").value;
  if (Number(find("sigma").value)) settings.sigma = find("sigma").value;
  if (kind === "student") settings.sampler = find("sampler").value;
  if (kind === "teacher") settings.guidance_scale = find("guidance_scale").value;
  if (model().reads_text && !isPrompt() && find("prompt").value.trim()) settings.prompt = find("prompt").value.trim();
  if (isImage()) {
    settings.fit = find("fit").value;
    settings.scale = find("scale").value;
    if (find("color_fix").value) settings.color_fix = find("color_fix").value;
  } else {
    if (hasSize()) [settings.width, settings.height] = [find("to-width").value, find("to-height").value];
    if (!input.info.space && !isPrompt()) settings.space = find("space").value;
  }
  return settings;
}

function writeSettings(settings) {
  if (server.models.some((one) => one.id === settings.model)) find("model").value = settings.model;
  fillSettings();
  for (const name of ["seed", "num_steps", "sampler", "guidance_scale", "fit", "scale", "format", "space", "prompt"]) {
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
  const { file, info, url } = input;
  find("source").hidden = false;
  find("source-name").textContent = file.name;
  find("source-name").title = file.name;
  const kind = isPrompt() ? "prompt, " : isImage() ? "image, " : `latent${info.space ? ` of ${info.space}` : ""}, `;
  const noise = info.sigma ? `, noise ${info.sigma.toFixed(2)}` : "";
  find("source-info").textContent = `${kind}${isPrompt() ? "to be generated" : `${info.width}×${info.height}${isImage() ? "" : " cells"}`}${noise}`;
  find("source-thumb").hidden = !isImage();
  if (isImage()) find("source-thumb").src = url;
  find("choose").firstElementChild.textContent = "Choose another";
  find("from-metadata").hidden = !info.metadata;
  find("drop").hidden = true;
  fillSettings();
}

async function openFile(file) {
  if (!file || running) return;
  showError();
  try {
    if (file.size > server.limits.body_bytes) throw new Error(`${file.name} has ${size(file.size)}; at most ${size(server.limits.body_bytes)} can be taken.`);
    const info = await (await request("v1/inspect", { method: "POST", body: file })).json();
    input = { file, info, url: info.kind === "image" ? URL.createObjectURL(file) : null };
  } catch (error) {
    showError(error.message);
    return;
  }
  current = null;
  if (input.info.prompt && !find("prompt").value) find("prompt").value = input.info.prompt;
  find("to-width").value = find("to-height").value = "";
  showInput();
  clearResult();
  if (isImage()) {
    const { width, height } = input.info;
    viewer.show({ beforeUrl: null, afterUrl: input.url, width, height });
    find("tag-after").textContent = "Input";
  } else {
    viewer.hide();
  }
  drawHistory();
  await plan();
}

async function openPrompt() {
  const prompt = find("generate-prompt").value.trim();
  if (!prompt || running) return;
  showError();
  input = { file: { name: prompt }, info: { kind: "prompt", width: 1, height: 1 }, url: null, prompt };
  current = null;
  if (!find("to-width").value) find("to-width").value = find("to-height").value = 2048;
  showInput();
  clearResult();
  viewer.hide();
  drawHistory();
  await plan();
}

async function plan() {
  const turn = ++planRequests, card = find("plan-card"), bar = find("plan-bar");
  if (!input) return;
  const chosen = model();
  find("go").disabled = true;
  let text, tooLarge = false, share = null;
  const refused = isImage() && !chosen.takes_images
    ? `${chosen.id} has no encoder here, so it takes latents only. \`pidecode pull ${chosen.space}\` fetches one.`
    : input.info.space && input.info.space !== chosen.space
      ? `The latent is of space ${input.info.space}; ${chosen.id} decodes ${chosen.space}.` : null;
  try {
    if (refused) throw new Error(refused);
    const query = new URLSearchParams({ kind: isImage() ? "image" : "latent", width: input.info.width, height: input.info.height, model: chosen.id });
    if (hasSize()) {
      query.set("output_width", find("to-width").value);
      query.set("output_height", find("to-height").value);
    }
    const estimate = await (await request(`v1/plan?${query}`)).json();
    const factor = isImage() ? Number(find("scale").value) / chosen.scale : 1;
    const result = `${Math.round(estimate.width * factor)}×${Math.round(estimate.height * factor)} pixels`;
    tooLarge = !estimate.fits;
    share = estimate.free ? estimate.working / estimate.free : null;
    text = `The result will have ${result}. Memory: about ${size(estimate.working)}${estimate.free ? `, of ${size(estimate.free)} free` : ""}.`
      + (tooLarge ? " That does not fit: use a smaller input." : "");
  } catch (error) {
    text = error.message;
    tooLarge = true;
  }
  if (turn !== planRequests) return;
  find("plan").textContent = text;
  card.classList.toggle("large", tooLarge);
  bar.hidden = share === null;
  bar.firstElementChild.style.width = `${Math.min(100, Math.max(1, 100 * (share ?? 0)))}%`;
  find("go").disabled = tooLarge || running !== null;
}

// ---- the job

function clearResult() {
  for (const id of ["tools", "warnings", "metadata", "progress"]) find(id).hidden = true;
  document.body.classList.remove("has-result");
}

function showProgress(status) {
  const bar = find("progress").firstElementChild;
  find("progress").hidden = false;
  const waiting = status.state === "waiting" || !status.num_steps;
  bar.classList.toggle("waiting", waiting);
  bar.firstElementChild.style.width = waiting ? "" : `${(100 * status.step) / status.num_steps}%`;
  if (status.state === "waiting") find("status").textContent = status.position > 1 ? `Waiting: ${status.position - 1} jobs before this one.` : "Waiting: next in the queue.";
  else find("status").textContent = status.num_steps ? `${status.phase === "text-to-latent" ? "Generating, step" : "Step"} ${status.step} of ${status.num_steps}` : "Preparing…";
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
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
  const settings = readSettings(), job = { ...input }, kind = isPrompt() ? "generate" : isImage() ? "upscale" : "decode";
  running = new AbortController();
  working(true);
  showError();
  clearResult();
  showProgress({ state: "waiting", position: 1 });
  const preview = document.createElement("img");
  let last = null;
  try {
    const response = await request(`v1/${kind}?${new URLSearchParams({ ...settings, stream: true })}`, { method: "POST", body: job.prompt ?? job.file, signal: running.signal });
    for await (const event of lines(response)) {
      last = event;
      if (event.state === "waiting" || event.state === "running") showProgress(event);
      if (event.preview) {
        preview.src = event.preview;
        await preview.decode();
        const [width, height] = [preview.naturalWidth, preview.naturalHeight];
        const known = !find("viewer").hidden && isImage();
        if (known) viewer.preview(event.preview);
        else viewer.show({ beforeUrl: null, afterUrl: event.preview, width, height, keepView: true });
        find("tag-after").textContent = "Preview";
      }
    }
    if (last?.state !== "done") throw new Error(last?.error?.message ?? "The server stopped in the middle of the job.");
    const blob = await (await request(last.result.slice(1))).blob();
    addToHistory(job, settings, { ...last, url: URL.createObjectURL(blob), blob });
  } catch (error) {
    const stopped = error.name === "AbortError";
    find("progress").hidden = true;
    if (isImage()) viewer.show({ beforeUrl: null, afterUrl: input.url, width: input.info.width, height: input.info.height });
    else viewer.hide();
    find("tag-after").textContent = "Input";
    if (!stopped) showError(error.message);
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
  const { result, settings } = entry, image = entry.input.info.kind === "image";
  const factor = Number(settings.scale ?? 1), info = entry.input.info;
  const known = server.models.find((one) => one.id === settings.model);
  const fixed = image && Math.abs(info.width * factor - result.width) > 64 * factor; // resized to a fixed input
  viewer.show({
    beforeUrl: image ? entry.input.url : null, afterUrl: result.url, width: result.width, height: result.height,
    beforeSize: image && known && !fixed ? [info.width * factor, info.height * factor] : null, keepView: true,
  });
  find("tag-after").textContent = "After";
  find("progress").hidden = true;
  find("tools").hidden = false;
  find("result-info").textContent = `${result.width}×${result.height}, ${size(result.bytes)}, ${result.seconds} s`;
  const link = find("download");
  link.href = result.url;
  link.download = entry.name;
  find("warnings").hidden = !result.warnings.length;
  find("warnings").replaceChildren(...result.warnings.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
  const rows = Object.entries(result.metadata).flatMap(([key, value]) => [
    Object.assign(document.createElement("dt"), { textContent: key.replaceAll("_", " ") }),
    Object.assign(document.createElement("dd"), { textContent: typeof value === "object" ? Object.entries(value).map((pair) => pair.join(" ")).join(", ") : String(value) }),
  ]);
  find("metadata").querySelector("dl").replaceChildren(...rows);
  find("metadata").hidden = false;
  document.body.classList.add("has-result");
  drawHistory();
}

async function addToHistory(job, settings, result) {
  const stem = job.prompt ? job.prompt.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) : job.file.name.replace(/\.[^.]*$/, "") || "image", ending = settings.format === "jpeg" ? "jpg" : settings.format;
  const entry = { input: job, settings, result, name: `${stem}-pid${settings.seed === undefined ? "" : `-${settings.seed}`}.${ending}`, thumb: document.createElement("canvas") };
  history.unshift(entry);
  for (const old of history.splice(HISTORY_LENGTH)) {
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
    const button = document.createElement("button"), label = document.createElement("span");
    button.type = "button";
    button.setAttribute("aria-current", String(entry === current));
    const noise = entry.settings.sigma ? `, noise ${entry.settings.sigma}` : "";
    const seed = entry.settings.seed === undefined ? "" : `, seed ${entry.settings.seed}`;
    label.textContent = `${entry.input.file.name}${seed}${noise}`;
    entry.thumb.setAttribute("aria-hidden", "true");
    button.append(entry.thumb, label);
    button.addEventListener("click", () => restore(entry));
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
}

function restore(entry) {
  if (running) return;
  showError();
  input = entry.input;
  writeSettings(entry.settings);
  showInput();
  showResult(entry);
  plan();
}

function useMetadata() {
  const metadata = input.info.metadata, given = {};
  for (const name of ["seed", "num_steps", "sampler", "guidance_scale", "prompt", "model", "color_fix"]) if (metadata[name] !== undefined) given[name] = metadata[name];
  if (metadata.sigma > 0 && metadata.sigma <= 0.8) given.sigma = metadata.sigma;
  writeSettings({ ...readSettings(), ...given });
  find("from-metadata").hidden = true;
  plan();
}

// ---- wiring

find("file").addEventListener("change", (event) => {
  openFile(event.target.files[0]);
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
find("error").lastElementChild.addEventListener("click", () => showError());
find("use-prompt").addEventListener("click", openPrompt);
find("use-metadata").addEventListener("click", useMetadata);
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  openFile(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => openFile(event.clipboardData.files[0]));

try {
  server = await (await request("v1/server")).json();
  server.models = (await (await request("v1/models")).json()).data;
  find("model").replaceChildren(...server.models.map((one) => option(one.id, `${one.id}, ${one.space} ${one.scale}×`)));
  find("space").replaceChildren(...[...new Set(server.models.map((one) => one.space))].map((one) => option(one, one)));
  find("about").textContent = `version ${server.version}, on ${server.device}`;
  find("text-to-image").hidden = !server.text_to_image;
  fillSettings();
  showSigma();
  document.body.dataset.ready = "true";
} catch (error) {
  showError(error.message);
}
