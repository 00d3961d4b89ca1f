// SPDX-License-Identifier: Apache-2.0
// The page: an input with its settings, inputs that follow it, one running job and the history. A reload brings all
// of it back.

import { follow, RECONNECT_SECONDS, request } from "./http.js";
import { openSession } from "./session.js";
import { makeViewer } from "./viewer.js";

const find = (id) => document.getElementById(id);
const viewer = makeViewer(find);
const HISTORY_LENGTH = 24;

let server = null; // version, device, limits and models
let session = null; // what a reload brings back
let input = null; // {key, file, info, url}
let following = []; // inputs to be done after it
let opening = Promise.resolve(); // files are looked into one after another
let running = null; // {abort, job, since} of the running job
let history = []; // newest first: {key, input, settings, result, name, thumb}
let current = null;
let planRequests = 0;
let keys = 0; // of the session's entries, made so far
let saving = 0; // timer
let shownShare = 0; // of the progress bar; never falls within a job
let stage = { state: "", since: 0 }; // of the job, and when it began

const size = (bytes) => (bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : bytes >= 1e6 ? `${Math.round(bytes / 1e6)} MB` : `${Math.max(1, Math.round(bytes / 1e3))} kB`);
const model = () => server.models.find((one) => one.id === find("model").value) ?? server.models[0];
const isPrompt = () => input?.info.kind === "prompt";
const isImage = () => input?.info.kind === "image";
const sides = () => [find("to-width").value, find("to-height").value];
// Latents take both sides, images also one: the other follows.
const hasSize = () => !find("to-width").closest(".row").hidden && (isImage() ? sides().some(Boolean) : sides().every(Boolean));

function showError(message) {
  find("error").firstElementChild.textContent = message ?? "";
  find("error").hidden = !message;
  if (message) find("error").scrollIntoView({ block: "nearest" });
}

const announce = (text) => {
  if (find("announcement").textContent !== text) find("announcement").textContent = text;
};
const duration = (seconds) => (seconds < 90 ? `${Math.max(1, Math.round(seconds))} s` : `${Math.round(seconds / 60)} min`);

// ---- what a reload brings back

const newKey = (kind) => `${kind} ${Date.now()} ${++keys}`;
const fields = () => [...find("panel").elements].filter((one) => one.id && !["file", "button", "submit"].includes(one.type));

function fillFields(values) {
  for (const field of fields()) {
    const value = values[field.id];
    if (value === undefined || (field.tagName === "SELECT" && ![...field.options].some((one) => one.value === String(value)))) continue;
    field.value = value;
  }
  fillSettings();
  showSliders();
}

function remember() {
  if (!document.body.dataset.ready) return;
  clearTimeout(saving);
  saving = setTimeout(() => {
    const inputs = [input, ...following, running?.job.input, ...history.map((entry) => entry.input)].filter(Boolean);
    const state = {
      fields: Object.fromEntries(fields().map((one) => [one.id, one.value])), input: input?.key, current: current?.key,
      following: following.map((one) => one.key), history: history.map((entry) => entry.key),
      job: running?.job.id && { id: running.job.id, input: running.job.input.key, settings: running.job.settings },
    };
    session.save({ state }, new Set([...inputs, ...history].map((one) => one.key)));
  }, 100);
}

function newInput(file, info) {
  const made = { key: newKey("input"), file, info };
  session.save({ [made.key]: made });
  return withUrl(made);
}

const withUrl = (one) => ({ ...one, url: one.info.kind === "image" ? URL.createObjectURL(one.file) : null });

// Returns the job that the reload interrupted, if one ran.
async function restoreSession() {
  const saved = await session.load(), { state } = Object.fromEntries(saved);
  if (!state) return null;
  const inputs = new Map();
  const inputOf = (key) => inputs.get(key) ?? (saved.has(key) ? inputs.set(key, withUrl(saved.get(key))).get(key) : null);
  following = state.following.map(inputOf).filter(Boolean);
  history = state.history.map((key) => saved.get(key)).filter(Boolean).map((entry) => ({
    ...entry, input: inputOf(entry.input), result: { ...entry.result, url: URL.createObjectURL(entry.result.blob) },
  }));
  fillFields({ model: state.fields.model });
  fillFields(state.fields);
  const job = state.job && inputOf(state.job.input) ? { ...state.job, input: inputOf(state.job.input) } : null;
  const shown = job?.input ?? inputOf(state.input), entry = history.find((one) => one.key === state.current);
  if (shown) await useInput(shown);
  fillFields(state.fields);
  if (entry && !job) showResult(entry);
  drawFollowing();
  drawHistory();
  return job;
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
    "for-image": !input || isImage(), "for-size": input && (isPrompt() || isImage() || chosen.kind !== "feed-forward"), "for-unknown-space": input && !isImage() && !isPrompt() && !input.info.space,
    "for-text-readers": chosen.reads_text && !isPrompt(), "for-student": student, "for-teacher": chosen.kind === "teacher",
    "for-diffusion": chosen.kind !== "feed-forward", "for-seed": chosen.kind !== "feed-forward" || isPrompt(),
    "for-noise": chosen.max_sigma > 0, "for-quality": find("format").value !== "png",
    "for-fidelity": (!input || isImage()) && holdsDetail(),
  })) for (const element of document.getElementsByClassName(name)) element.hidden = !on;
  fitSides();
}

// A size takes the place of the scale.
function fitSides() {
  for (const id of ["to-width", "to-height"]) find(id).min = find(id).step = input && isImage() ? 1 : 16;
  find("scale").disabled = input !== null && isImage() && hasSize();
}

// Whether the color fix, chosen or the model's default, is back-projection.
function holdsDetail() {
  const chosen = find("color_fix").value;
  return chosen ? chosen === "back-projection" : model().kind === "feed-forward" && !Number(find("sigma").value);
}

function readSettings() {
  const settings = { model: find("model").value, format: find("format").value }, { kind } = model();
  if (kind !== "feed-forward" || isPrompt()) settings.seed = find("seed").value; // the seed of a text-to-image pipeline, too
  if (kind !== "feed-forward") settings.num_steps = find("num_steps").value;
  if (settings.format !== "png" && find("quality").value) settings.quality = find("quality").value;
  if (model().max_sigma > 0 && Number(find("sigma").value)) settings.sigma = find("sigma").value;
  if (kind === "student") settings.sampler = find("sampler").value;
  if (kind === "teacher") settings.guidance_scale = find("guidance_scale").value;
  if (model().reads_text && !isPrompt() && find("prompt").value.trim()) settings.prompt = find("prompt").value.trim();
  if (isImage()) {
    settings.fit = find("fit").value;
    if (!hasSize()) settings.scale = find("scale").value;
    else for (const [index, name] of ["width", "height"].entries()) if (sides()[index]) settings[name] = sides()[index];
    if (find("color_fix").value) settings.color_fix = find("color_fix").value;
    if (holdsDetail() && Number(find("fidelity").value) < 1) settings.fidelity = find("fidelity").value;
  } else {
    if (hasSize()) [settings.width, settings.height] = [find("to-width").value, find("to-height").value];
    if (!input.info.space && !isPrompt()) settings.space = find("space").value;
  }
  return settings;
}

function writeSettings(settings) {
  fillFields({ model: settings.model });
  fillFields({
    ...settings, sigma: settings.sigma ?? 0, color_fix: settings.color_fix ?? "", prompt: settings.prompt ?? "",
    fidelity: settings.fidelity ?? 1,
    "to-width": settings.width ?? "", "to-height": settings.height ?? "",
  });
}

function showSliders() {
  for (const [name, none] of [["sigma", "off"], ["fidelity", "0"]]) {
    const value = Number(find(name).value);
    find(`${name}-value`).textContent = value ? value.toFixed(2) : none;
  }
}

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
  find("choose").firstElementChild.textContent = "Choose others";
  find("from-metadata").hidden = !info.metadata;
  const known = { ...(isImage() || isPrompt() ? {} : { space: info.space ?? "not in the file", cells: `${info.width}×${info.height}`, noise: info.sigma ?? "not in the file" }), ...(info.prompt ? { prompt: info.prompt } : {}), ...info.metadata, ...info.texts };
  find("known").hidden = !Object.keys(known).length;
  find("known").querySelector("dl").replaceChildren(...table(known));
  find("known").open = !isImage();
  find("drop").hidden = true;
  fillSettings();
}

function table(values) {
  return Object.entries(values).flatMap(([key, value]) => [
    Object.assign(document.createElement("dt"), { textContent: key.replaceAll("_", " ") }),
    Object.assign(document.createElement("dd"), { textContent: Array.isArray(value) ? value.join("×") : typeof value === "object" ? Object.entries(value).map((pair) => pair.join(" ")).join(", ") : String(value) }),
  ]);
}

async function inspect(file) {
  if (!file.size) throw new Error("The file is empty.");
  if (/\.(npy|npz|pt|pth|ckpt)$/i.test(file.name)) throw new Error("Latents are taken as .safetensors or ComfyUI's .latent here; `pidecode decode` reads others.");
  await file.slice(0, 1).arrayBuffer().catch(() => {
    throw new Error("It cannot be read: it is a folder, or was moved or changed. Choose files.");
  });
  if (file.size > server.limits.body_bytes) throw new Error(`The file has ${size(file.size)}; at most ${size(server.limits.body_bytes)} can be taken.`);
  return newInput(file, await (await request("v1/inspect", { method: "POST", body: file })).json());
}

// The first file becomes the input, unless a job runs; the others follow it.
function openFiles(files) {
  const list = [...files];
  opening = opening.then(async () => {
    if (list.length) showError();
    const refused = [];
    for (const [index, file] of list.entries()) {
      find("reading").textContent = `Reading ${file.name}…`;
      find("reading").hidden = false;
      try {
        const opened = await inspect(file);
        if (running || (index && input)) following.push(opened);
        else await useInput(opened);
      } catch (error) {
        refused.push(`${file.name}: ${error.message}`);
      }
      find("reading").hidden = true;
      drawFollowing();
    }
    if (refused.length) showError(refused.join(" "));
  });
}

function drawFollowing() {
  remember();
  find("queue").hidden = !following.length;
  find("queue-title").textContent = `${following.length === 1 ? "One more follows" : `${following.length} more follow`}, each with the settings chosen by then:`;
  find("queue").querySelector("ol").replaceChildren(...following.map((one) => {
    const item = document.createElement("li"), name = document.createElement("span"), button = document.createElement("button");
    name.textContent = name.title = one.file.name;
    Object.assign(button, { type: "button", textContent: "×", ariaLabel: `Do not decode ${one.file.name}` });
    button.addEventListener("click", () => {
      following = following.filter((other) => other !== one);
      drawFollowing();
    });
    item.append(name, button);
    return item;
  }));
}

async function useInput(opened) {
  input = opened;
  current = null;
  if (input.info.prompt && !find("prompt").value) find("prompt").value = input.info.prompt;
  find("to-width").value = find("to-height").value = "";
  showInput();
  clearResult();
  showInputAlone();
  drawHistory();
  await plan();
}

const nameSide = (side, text) => (find(`tag-${side}`).textContent = find(side).alt = text);

function showInputAlone() {
  if (!isImage()) return viewer.hide();
  viewer.show({ beforeUrl: null, afterUrl: input.url, width: input.info.width, height: input.info.height });
  nameSide("after", "Input");
}

async function openPrompt() {
  const prompt = find("generate-prompt").value.trim();
  if (!prompt || running) return;
  showError();
  input = newInput({ name: prompt }, { kind: "prompt", width: 1, height: 1 });
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
    if (hasSize() && !isImage()) {
      query.set("output_width", find("to-width").value);
      query.set("output_height", find("to-height").value);
    }
    const estimate = await (await request(`v1/plan?${query}`)).json();
    const factor = isImage() ? Number(find("scale").value) / chosen.scale : 1;
    const [across, down] = isImage() && hasSize() ? sides().map(Number) : [estimate.width * factor, estimate.height * factor];
    const shape = estimate.width / estimate.height; // of the result, where one side is left out
    const result = `${Math.round(across || down * shape)}×${Math.round(down || across / shape)} pixels`;
    tooLarge = !estimate.fits;
    share = estimate.free ? estimate.working / estimate.free : null;
    text = `The result will have ${result}. Memory: about ${size(estimate.working)}${estimate.free ? `, of ${size(estimate.free)} free` : ""}.`
      + (estimate.seconds ? ` Time: about ${duration(estimate.seconds)}.` : "")
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
  const bar = find("bar"), left = status.seconds_left;
  find("progress").hidden = false;
  if (stage.state !== status.state) stage = { state: status.state, since: Date.now() };
  const waiting = status.state !== "running", seconds = waiting ? (Date.now() - stage.since) / 1000 : status.seconds;
  const byTime = left === undefined || left === null ? 0 : status.seconds / (status.seconds + left);
  shownShare = waiting ? 0 : Math.min(0.99, Math.max(shownShare, status.done ?? 0, byTime || 0));
  bar.classList.toggle("waiting", waiting);
  bar.firstElementChild.style.width = waiting ? "" : `${100 * shownShare}%`;
  const text = {
    sending: status.share < 1 ? "Sending" : "Sending…", lost: "The connection is lost. Trying again…",
    waiting: status.position > 1 ? `Waiting: ${status.position - 1} job${status.position > 2 ? "s" : ""} before this one` : "Waiting: next in the queue",
    running: (status.activity || "reading the input").replace(/^./, (letter) => letter.toUpperCase()),
  }[status.state];
  const time = left > 0.5 ? `, about ${duration(left)} left` : seconds >= 2 ? `, ${duration(seconds)} so far` : "";
  const share = status.share < 1 ? `, ${Math.round(100 * status.share)} %` : "";
  find("status").textContent = `${text}${time}${share}${following.length ? `; ${following.length} more to come` : ""}`;
  if (waiting) bar.removeAttribute("aria-valuenow");
  else bar.setAttribute("aria-valuenow", String(Math.round(100 * shownShare)));
  bar.setAttribute("aria-valuetext", find("status").textContent);
  announce(text);
}

// Run the input, or go on with a job that a reload interrupted.
async function run(interrupted) {
  const job = interrupted ?? { input, settings: readSettings() }, kind = { prompt: "generate", image: "upscale", latent: "decode" }[job.input.info.kind];
  job.path = `v1/${kind}?${new URLSearchParams({ ...job.settings, stream: true, reconnect_seconds: RECONNECT_SECONDS })}`;
  job.body = kind === "generate" ? job.input.file.name : job.input.file;
  const { signal } = (running = Object.assign(new AbortController(), { job, since: Date.now() }));
  working(true);
  showError();
  clearResult();
  shownShare = 0;
  showProgress({ state: "sending" });
  find("progress").scrollIntoView({ block: "nearest" });
  const preview = document.createElement("img");
  let last = null;
  try {
    const sent = (share) => showProgress({ state: "sending", share }), lost = () => showProgress({ state: "lost" });
    for await (const event of follow(job, { signal, sent, lost })) {
      if (!last) remember();
      last = event;
      if (event.state === "waiting" || event.state === "running") showProgress(event);
      if (event.preview) {
        preview.src = event.preview;
        await preview.decode();
        if (!find("viewer").hidden && isImage()) viewer.preview(event.preview);
        else viewer.show({ beforeUrl: null, afterUrl: event.preview, width: preview.naturalWidth, height: preview.naturalHeight, keepView: true });
        nameSide("after", "Preview");
      }
    }
    if (last.state !== "done") throw new Error(last.error.message);
    const blob = await (await request(last.result.slice(1), { signal })).blob();
    await addToHistory(job, { ...last, blob });
    announce(`Done: ${last.width}×${last.height} pixels in ${duration(last.seconds)}.`);
    return "done";
  } catch (error) {
    find("progress").hidden = true;
    showInputAlone();
    if (!signal.aborted) showError(`${job.input.file.name}: ${error.message}`);
    else {
      if (job.id) request(`v1/jobs/${job.id}`, { method: "DELETE" }).catch(() => {}); // over already
      find("progress").hidden = false;
      find("bar").firstElementChild.style.width = "0";
      find("bar").classList.remove("waiting");
      find("status").textContent = "Cancelled.";
      announce("Cancelled.");
    }
    return signal.aborted ? "cancelled" : "failed";
  } finally {
    running = null;
    working(false);
    remember();
  }
}

// Run the input and what follows it; a failure does not stop the others, and Cancel leaves them in the list.
async function runAll(interrupted) {
  const failures = [];
  let outcome = await run(interrupted);
  while (outcome !== "cancelled") {
    if (outcome === "failed") failures.push(find("error").firstElementChild.textContent);
    await opening;
    if (!following.length) break;
    const next = following.shift();
    drawFollowing();
    await useInput(next);
    outcome = find("go").disabled ? (showError(`${next.file.name}: ${find("plan").textContent}`), "failed") : await run();
  }
  if (failures.length) showError(failures.join(" "));
  await plan();
  // The button that had the focus, Decode or Cancel, was hidden.
  if ([document.body, find("go"), find("cancel")].includes(document.activeElement)) find(outcome === "done" ? "download" : "go").focus({ preventScroll: true });
}

function working(on) {
  document.body.classList.toggle("working", on);
  find("go").hidden = on;
  find("cancel").hidden = !on;
}

// ---- results and history

function showResult(entry, other = null) {
  current = entry;
  const { result, settings } = entry, image = entry.input.info.kind === "image";
  const info = entry.input.info, factor = settings.scale ? Number(settings.scale) : image ? result.width / info.width : 1;
  const known = server.models.find((one) => one.id === settings.model);
  const fixed = image && Math.abs(info.width * factor - result.width) > 64 * factor; // resized to a fixed input
  viewer.show({
    beforeUrl: other ? other.result.url : image ? entry.input.url : null, afterUrl: result.url, width: result.width, height: result.height,
    beforeSize: !other && image && known && !fixed ? [info.width * factor, info.height * factor] : null, keepView: true,
  });
  nameSide("before", other ? other.name : "Before");
  nameSide("after", other ? entry.name : "After");
  find("progress").hidden = true;
  find("tools").hidden = false;
  find("result-info").textContent = `${result.width}×${result.height}, ${size(result.bytes)}, ${result.seconds} s`;
  const link = find("download");
  link.href = result.url;
  link.download = entry.name;
  find("warnings").hidden = !result.warnings.length;
  find("warnings").replaceChildren(...result.warnings.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
  find("metadata").querySelector("dl").replaceChildren(...table({ ...result.metadata, ...info.texts }));
  find("metadata").hidden = false;
  document.body.classList.add("has-result");
  find("viewer").scrollIntoView({ block: "nearest" });
  drawHistory();
}

async function addToHistory(job, result) {
  const { input: source, settings } = job, ending = settings.format === "jpeg" ? "jpg" : settings.format;
  const stem = source.info.kind === "prompt" ? source.file.name.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) : source.file.name.replace(/\.[^.]*$/, "").slice(0, 100) || "image";
  const entry = { key: newKey("result"), input: source, settings, result, name: `${stem}-pid${settings.seed === undefined ? "" : `-${settings.seed}`}.${ending}`, thumb: await thumbnail(result) };
  session.save({ [entry.key]: { ...entry, input: source.key } });
  entry.result.url = URL.createObjectURL(result.blob);
  history.unshift(entry);
  release(history.splice(HISTORY_LENGTH));
  showResult(entry);
}

function release(entries) {
  const used = new Set([input, ...following, ...history.map((entry) => entry.input)]);
  for (const entry of entries) {
    URL.revokeObjectURL(entry.result.url);
    if (!used.has(entry.input)) URL.revokeObjectURL(entry.input.url);
  }
}

// A small image as a data URL; none where the browser cannot show the file.
async function thumbnail({ blob, width, height }) {
  const scale = 240 / Math.max(width, height), canvas = document.createElement("canvas");
  try {
    const bitmap = await createImageBitmap(blob, { resizeWidth: Math.max(1, Math.round(width * scale)), resizeQuality: "high" });
    [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
    canvas.getContext("2d").drawImage(bitmap, 0, 0);
    bitmap.close();
  } catch {
    [canvas.width, canvas.height] = [4, 3];
  }
  return canvas.toDataURL("image/webp");
}

function drawHistory() {
  remember();
  find("history").hidden = !history.length;
  find("history").querySelector("ol").replaceChildren(...history.map((entry) => {
    const button = document.createElement("button"), label = document.createElement("span"), item = document.createElement("li");
    button.type = "button";
    button.className = "entry";
    button.setAttribute("aria-current", String(entry === current));
    const noise = entry.settings.sigma ? `, noise ${entry.settings.sigma}` : "";
    const seed = entry.settings.seed === undefined ? "" : `, seed ${entry.settings.seed}`;
    label.textContent = `${entry.input.file.name}${seed}${noise}`;
    button.append(Object.assign(document.createElement("img"), { src: entry.thumb, alt: "" }), label);
    button.addEventListener("click", () => restore(entry));
    item.append(button);
    if (current && entry !== current) {
      const compare = Object.assign(document.createElement("button"), { type: "button", className: "link", textContent: "Compare", ariaLabel: `Compare the shown result with ${label.textContent}` });
      compare.addEventListener("click", () => showResult(current, entry));
      item.append(compare);
    }
    return item;
  }));
}

async function copyResult() {
  const { result, settings } = current, button = find("copy");
  const asPng = async () => { // the only kind that every browser's clipboard takes
    if (settings.format === "png") return result.blob;
    const bitmap = await createImageBitmap(result.blob), canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
    canvas.getContext("2d").drawImage(bitmap, 0, 0);
    return canvas.convertToBlob({ type: "image/png" });
  };
  try {
    await navigator.clipboard.write([new ClipboardItem({ "image/png": asPng() })]);
    button.textContent = "Copied";
    announce("The image is in the clipboard.");
    setTimeout(() => (button.textContent = "Copy"), 2000);
  } catch {
    showError("The browser does not allow copying here; use Download.");
  }
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

function forget() {
  release(history.splice(0));
  current = null;
  if (!running) {
    clearResult();
    showInputAlone();
  }
  drawHistory();
  find("go").focus({ preventScroll: true });
}

function useMetadata() {
  const metadata = input.info.metadata, given = {};
  for (const name of ["seed", "num_steps", "sampler", "guidance_scale", "prompt", "model", "color_fix", "fidelity"]) if (metadata[name] !== undefined) given[name] = metadata[name];
  if (metadata.sigma > 0 && metadata.sigma <= 0.8) given.sigma = metadata.sigma;
  writeSettings({ ...readSettings(), ...given });
  find("from-metadata").hidden = true;
  plan();
}

// ---- wiring

find("file").addEventListener("change", (event) => {
  openFiles(event.target.files);
  event.target.value = "";
});
find("source-thumb").addEventListener("error", (event) => (event.target.hidden = true)); // a kind this browser cannot show
find("drop").addEventListener("click", () => find("file").click());
find("panel").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!find("go").disabled && !running) runAll();
});
find("cancel").addEventListener("click", () => {
  if (running && Date.now() - running.since > 500) running.abort(); // not the second click of a double click on Decode, which lay here
});
find("panel").addEventListener("change", remember);
find("forget").addEventListener("click", forget);
find("dice").addEventListener("click", () => (find("seed").value = Math.floor(Math.random() * 2 ** 31)));
for (const id of ["sigma", "fidelity"]) find(id).addEventListener("input", showSliders);
find("model").addEventListener("change", () => (fillSettings(), plan()));
for (const id of ["to-width", "to-height"]) find(id).addEventListener("change", fitSides);
for (const id of ["scale", "to-width", "to-height", "fit"]) find(id).addEventListener("change", plan);
find("error").lastElementChild.addEventListener("click", () => showError());
find("use-prompt").addEventListener("click", openPrompt);
find("use-metadata").addEventListener("click", useMetadata);
for (const id of ["format", "color_fix", "sigma"]) find(id).addEventListener("change", fillSettings);
find("copy").hidden = !navigator.clipboard?.write || !window.ClipboardItem;
find("copy").addEventListener("click", copyResult);
find("reuse").addEventListener("click", () => openFiles([new File([current.result.blob], current.name, { type: current.result.blob.type })]));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});
window.addEventListener("beforeunload", (event) => {
  if (session && !session.works && (running || following.length || history.length)) event.preventDefault(); // the browser asks
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (event.dataTransfer.files.length) openFiles(event.dataTransfer.files);
  else showError("What was dropped holds no file. Save the image first, then drop that file.");
});
document.addEventListener("paste", (event) => openFiles(event.clipboardData.files));

try {
  server = await (await request("v1/server")).json();
  server.models = (await (await request("v1/models")).json()).data;
  find("model").replaceChildren(...server.models.map((one) => option(one.id, `${one.id}, ${one.space} ${one.scale}×`)));
  find("space").replaceChildren(...[...new Set(server.models.map((one) => one.space))].map((one) => option(one, one)));
  find("about").textContent = `version ${server.version}, on ${server.device}`;
  find("text-to-image").hidden = !server.text_to_image;
  fillSettings();
  showSliders();
  session = await openSession();
  const job = await restoreSession().catch(() => null); // another version's entries
  document.body.dataset.ready = "true";
  if (job) runAll(job);
} catch (error) {
  showError(error.message);
}
