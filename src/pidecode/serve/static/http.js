// SPDX-License-Identifier: Apache-2.0
// Requests to the server, and the progress of a job, which is followed again where the connection breaks.

export const RECONNECT_SECONDS = 30; // for which the server lets a job go on without this page, which tries each second

class Refusal extends Error {} // the server's own answer

function refusal(status, text) {
  try {
    return new Refusal(JSON.parse(text).error.message);
  } catch {
    return new Refusal(status === 413 ? "The file is longer than the server, or a proxy before it, takes." : `The server, or a proxy before it, answered with status ${status}.`);
  }
}

const silence = () => new Error("The server does not answer. Is pidecode still running?");

export async function request(path, options) {
  const response = await fetch(path, options).catch(() => {
    throw silence();
  });
  if (!response.ok) throw refusal(response.status, await response.text());
  return response;
}

// Lines of JSON of a response while it arrives; `sent` is told the share of the body that has gone out, which only this
// kind of request tells.
async function* lines(method, path, { body, signal, sent }) {
  const call = new XMLHttpRequest();
  let wake = () => {}, news = false, read = 0;
  call.open(method, path);
  call.upload.onprogress = (event) => sent(event.loaded / event.total);
  call.onprogress = call.onloadend = () => wake(news = true);
  signal.addEventListener("abort", () => call.abort());
  call.send(body);
  try {
    for (let over = false; !over;) {
      if (!news) await new Promise((resolve) => (wake = resolve));
      news = false;
      over = call.readyState === XMLHttpRequest.DONE || signal.aborted;
      signal.throwIfAborted();
      if (over && !call.status) throw silence();
      if (call.status < 400) for (let end; (end = call.responseText.indexOf("\n", read)) >= 0; read = end + 1) yield JSON.parse(call.responseText.slice(read, end));
      else if (over) throw refusal(call.status, call.responseText);
    }
  } finally {
    call.abort();
  }
}

// The events of a job up to its last. A job without `id` is begun with its `path` and `body`, and given its id.
export async function* follow(job, { signal, sent, lost }) {
  for (let broken = 0; ;) {
    try {
      const events = job.id ? lines("GET", `v1/jobs/${job.id}`, { signal }) : lines("POST", job.path, { body: job.body, signal, sent });
      for await (const event of events) {
        job.id = event.id;
        broken = 0;
        yield event;
        if (event.state !== "waiting" && event.state !== "running") return;
      }
    } catch (error) {
      if (error instanceof Refusal || signal.aborted || !job.id || broken === RECONNECT_SECONDS) throw error;
    }
    if (++broken > RECONNECT_SECONDS) throw new Error("The connection to the server was lost.");
    lost();
    await new Promise((resolve) => setTimeout(resolve, 1000));
    signal.throwIfAborted();
  }
}
