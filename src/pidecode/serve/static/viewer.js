// SPDX-License-Identifier: Apache-2.0
// Two images over each other with a handle between them; wheel and buttons zoom, dragging moves.

const LARGEST_ZOOM = 16;

export function makeViewer(find) {
  const frame = find("viewer"), canvas = find("canvas"), before = find("before"), after = find("after");
  const handle = find("handle"), shown = find("zoom-value");
  let width = 1, height = 1, zoom = 1, left = 0, top = 0, split = 0.5, fitted = true;

  const fitZoom = () => Math.min(frame.clientWidth / width, frame.clientHeight / height);

  function draw() {
    canvas.style.transform = `translate(${left}px, ${top}px) scale(${zoom})`;
    const edge = (split * frame.clientWidth - left) / zoom;
    const inside = Math.min(width, Math.max(0, edge));
    after.style.clipPath = frame.classList.contains("alone") ? "none" : `inset(0 0 0 ${inside}px)`;
    before.style.clipPath = `inset(0 calc(100% - ${inside - before.offsetLeft}px) 0 0)`;
    canvas.style.backgroundSize = `${16 / zoom}px ${16 / zoom}px`;
    handle.style.left = `${split * 100}%`;
    handle.setAttribute("aria-valuenow", String(Math.round(split * 100)));
    frame.classList.toggle("sharp", zoom * devicePixelRatio >= 3);
    shown.textContent = `${Math.round(zoom * devicePixelRatio * 100)} %`;
  }

  function clamp() {
    const limit = (size, span, value) => (span <= size ? (size - span) / 2 : Math.min(0, Math.max(size - span, value)));
    left = limit(frame.clientWidth, width * zoom, left);
    top = limit(frame.clientHeight, height * zoom, top);
  }

  function zoomTo(target, x = frame.clientWidth / 2, y = frame.clientHeight / 2) {
    const next = Math.min(LARGEST_ZOOM, Math.max(Math.min(fitZoom(), 1), target));
    left = x - ((x - left) * next) / zoom;
    top = y - ((y - top) * next) / zoom;
    zoom = next;
    fitted = Math.abs(zoom - fitZoom()) < 1e-6;
    clamp();
    draw();
  }

  function fit() {
    fitted = true;
    zoom = fitZoom();
    clamp();
    draw();
  }

  function splitAt(clientX) {
    const box = frame.getBoundingClientRect();
    split = Math.min(1, Math.max(0, (clientX - box.left) / box.width));
    draw();
  }

  frame.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    const sliding = handle.contains(event.target);
    let x = event.clientX, y = event.clientY;
    frame.setPointerCapture(event.pointerId);
    frame.classList.toggle("dragging", !sliding);
    const move = (now) => {
      if (sliding) return splitAt(now.clientX);
      left += now.clientX - x;
      top += now.clientY - y;
      x = now.clientX;
      y = now.clientY;
      clamp();
      draw();
    };
    const end = () => {
      frame.classList.remove("dragging");
      frame.removeEventListener("pointermove", move);
    };
    frame.addEventListener("pointermove", move);
    frame.addEventListener("pointerup", end, { once: true });
    frame.addEventListener("pointercancel", end, { once: true });
  });
  frame.addEventListener("wheel", (event) => {
    event.preventDefault();
    const box = frame.getBoundingClientRect();
    zoomTo(zoom * Math.exp(-event.deltaY * 0.0015), event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });
  frame.addEventListener("dblclick", (event) => {
    if (handle.contains(event.target)) return;
    const box = frame.getBoundingClientRect();
    if (fitted) zoomTo(1 / devicePixelRatio, event.clientX - box.left, event.clientY - box.top);
    else fit();
  });
  handle.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -0.02, ArrowRight: 0.02, PageDown: -0.1, PageUp: 0.1, Home: -1, End: 1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    split = Math.min(1, Math.max(0, split + step));
    draw();
  });
  find("zoom-in").addEventListener("click", () => zoomTo(zoom * 1.5));
  find("zoom-out").addEventListener("click", () => zoomTo(zoom / 1.5));
  find("zoom-fit").addEventListener("click", fit);
  find("before-pixels").addEventListener("change", (event) => frame.classList.toggle("pixels", event.target.checked));
  find("zoom-full").addEventListener("click", () => zoomTo(1 / devicePixelRatio));
  new ResizeObserver(() => (fitted ? fit() : (clamp(), draw()))).observe(frame);

  after.addEventListener("error", () => frame.classList.add("blind"));
  before.addEventListener("error", () => {
    frame.classList.add("alone"); // a kind of image this browser cannot show
    draw();
  });

  return {
    // Both images fill a canvas of `width` x `height` pixels; `beforeSize` is the size of the whole enlarged input,
    // of which `fit=crop` keeps the middle.
    show({ beforeUrl, afterUrl, width: newWidth, height: newHeight, beforeSize, keepView }) {
      const same = keepView && newWidth === width && newHeight === height && !frame.hidden;
      width = newWidth;
      height = newHeight;
      frame.hidden = false;
      frame.classList.toggle("alone", !beforeUrl);
      frame.classList.remove("blind");
      canvas.style.width = after.style.width = `${newWidth}px`;
      canvas.style.height = after.style.height = `${newHeight}px`;
      const [w, h] = beforeSize ?? [newWidth, newHeight];
      before.style.width = `${w}px`;
      before.style.height = `${h}px`;
      before.style.left = `${-(w - newWidth) / 2}px`;
      before.style.top = `${-(h - newHeight) / 2}px`;
      if (beforeUrl) before.src = beforeUrl;
      else before.removeAttribute("src");
      if (afterUrl) after.src = afterUrl;
      else after.removeAttribute("src");
      if (same) draw();
      else fit();
    },
    preview(url) {
      frame.classList.remove("blind");
      after.src = url;
    },
    hide() {
      frame.hidden = true;
    },
    get split() {
      return split;
    },
  };
}
