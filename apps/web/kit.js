/** What the elements of the page share: building DOM, talking to the server, writing numbers for people. */

/**
 * An element; children are nodes or texts, never markup.
 * Attributes named `on…` are listeners, `null` and `false` leave an attribute out.
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** The same for drawings. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const ICONS = {
  stop: "M6 6h12v12H6z",
  pause: "M7 5h4v14H7zM13 5h4v14h-4z",
  play: "M8 5v14l11-7z",
  extend: "M4 7h8v10H4zM15 11h-1v2h2v2h2v-2h2v-2h-2V9h-2v2z",
  branch: "M7 4a2.5 2.5 0 0 1 1 4.8V11h5a3 3 0 0 0 3-2.6 2.5 2.5 0 1 1 2 .1A5 5 0 0 1 13 13H8v2.2A2.5 2.5 0 1 1 6 15V8.8A2.5 2.5 0 0 1 7 4z",
  download: "M11 4h2v8h3l-4 5-4-5h3zM5 18h14v2H5z",
  copy: "M8 4h11v13h-2V6H8zM5 8h9v12H5z",
  trash: "M9 4h6v2h5v2H4V6h5zM6 9h12l-1 11H7z",
  retry: "M12 5a7 7 0 1 1-6.9 8.2l2-.4A5 5 0 1 0 12 7v3L7.5 6 12 2z",
  open: "M5 5h6v2H7v10h10v-4h2v6H5zM13 5h6v6h-2V8.4l-5.3 5.3-1.4-1.4L15.6 7H13z",
  close: "M6.4 5 12 10.6 17.6 5 19 6.4 13.4 12l5.6 5.6-1.4 1.4L12 13.4 6.4 19 5 17.6 10.6 12 5 6.4z",
  reuse: "M4 12a8 8 0 0 1 13.7-5.6L20 4v6h-6l2.3-2.2A6 6 0 0 0 6 12zM20 12a8 8 0 0 1-13.7 5.6L4 20v-6h6l-2.3 2.2A6 6 0 0 0 18 12z",
  chip: "M8 3h2v3h4V3h2v3h2v2h3v2h-3v4h3v2h-3v2h-2v3h-2v-3h-4v3H8v-3H6v-2H3v-2h3v-4H3V8h3V6h2zM8 8v8h8V8z",
};

/** A symbol that says nothing to a screen reader; the button's text does. */
export function icon(name) {
  const drawing = svg("svg", { viewBox: "0 0 24 24", class: "vk-icon", "aria-hidden": "true" });
  drawing.append(svg("path", { d: ICONS[name] }));
  return drawing;
}

/** A button with a symbol and a text. */
export function button(label, symbol, onclick, attributes = {}) {
  const kind = attributes.class ?? "";
  return h("button", { type: "button", ...attributes, class: `vk-button ${kind}`, onclick },
    symbol ? icon(symbol) : null, h("span", {}, label));
}

/** What the server refused, with its own words. */
export class Refusal extends Error {
  constructor(status, fault) {
    super(fault?.message ?? `the server answered ${status}`);
    Object.assign(this, { status, code: fault?.code ?? "", param: fault?.param ?? null });
  }
}

/** Ask the server; the answer's JSON, or a `Refusal`. */
export async function api(method, path, body, signal) {
  const options = { method, signal, headers: { Accept: "application/json" }, credentials: "same-origin" };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, { message: "The server cannot be reached. Is vidkv serve still running?" });
  }
  // the session has ended
  if (response.status === 401) location.assign("/login");
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refusal(response.status, answer.error);
  return answer;
}

export const videoPath = (id, rest = "") => `/v1/videos/${encodeURIComponent(id)}${rest}`;

export function bytes(count) {
  if (count === null || count === undefined) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 1000 && unit < units.length - 1) { count /= 1000; unit += 1; }
  return `${count >= 100 || unit === 0 ? Math.round(count) : count.toPrecision(3)} ${units[unit]}`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const whole = Math.round(seconds);
  const [large, small, first, second] = whole < 3600 ? [60, 1, "min", "s"] : [3600, 60, "h", "min"];
  const rest = Math.floor((whole % large) / small);
  return `${Math.floor(whole / large)} ${first}${rest ? ` ${rest} ${second}` : ""}`;
}

export function ago(time) {
  const seconds = Date.now() / 1000 - time;
  if (seconds < 60) return "just now";
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return new Date(time * 1000).toLocaleDateString();
}

export const ENDED = new Set(["completed", "failed", "cancelled"]);
export const STATUS = {
  queued: "In the queue", in_progress: "Generating", paused: "Paused",
  completed: "Finished", failed: "Failed", cancelled: "Stopped",
};

/** A coloured word for a state. */
export function chip(status) {
  return h("span", { class: "vk-chip", "data-status": status }, STATUS[status] ?? status);
}

/** The last frame of a video, or a quiet box while there is none. */
export function thumbnail(video) {
  const box = h("div", { class: "vk-thumb" });
  if (!video.chunks_done) return box;
  const picture = h("img", { alt: "", loading: "lazy", src: videoPath(video.id, `/frame?v=${video.chunks_done}`) });
  picture.addEventListener("error", () => picture.remove());
  box.append(picture);
  return box;
}

/** Say something in a corner of the page, and to screen readers. */
export function toast(message, kind = "info") {
  let tray = document.querySelector(".vk-tray");
  if (!tray) {
    tray = h("div", { class: "vk-tray", role: "status", "aria-live": "polite" });
    document.body.append(tray);
  }
  const note = h("div", { class: "vk-toast", "data-kind": kind }, h("span", {}, message));
  note.append(h("button", { type: "button", "aria-label": "Dismiss", onclick: () => note.remove() }, icon("close")));
  tray.append(note);
  while (tray.children.length > 4) tray.firstChild.remove();
  setTimeout(() => note.remove(), kind === "error" ? 12000 : 5000);
}

export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // without a secure origin there is no clipboard
    const area = h("textarea", { readonly: true, "aria-hidden": "true", class: "vk-offscreen" }, text);
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast(`${what} copied`);
}

/** Values that outlive a reload: of this tab, or of this browser. Broken or forbidden storage is an empty one. */
export const remember = {
  get(area, key, fallback) {
    try { return JSON.parse(area.getItem(`vidkv.${key}`)) ?? fallback; } catch { return fallback; }
  },
  set(area, key, value) {
    try { area.setItem(`vidkv.${key}`, JSON.stringify(value)); } catch { /* private windows may refuse */ }
  },
};

const RECENT = 50;
export function recentVideos() { return remember.get(localStorage, "recent", []); }
export function noteRecent(id) {
  remember.set(localStorage, "recent", [id, ...recentVideos().filter((other) => other !== id)].slice(0, RECENT));
}
export function forgetRecent(id) {
  remember.set(localStorage, "recent", recentVideos().filter((other) => other !== id));
}

/** At most `most` of many points, first and last included. */
export function thinned(points, most) {
  if (points.length <= most) return points;
  const step = (points.length - 1) / (most - 1);
  return Array.from({ length: most }, (_, i) => points[Math.round(i * step)]);
}

/** Ask before something that cannot be undone. Resolves to whether it was confirmed. */
export function confirmed(question, action) {
  return asked(question, action, [], "danger").then((answer) => answer !== null);
}

/**
 * A dialog with fields; resolves to their values by name, or null.
 * A field is {name, label, type, value, help, options, min, step}.
 */
export function asked(title, action, fields, kind = "primary") {
  return new Promise((resolve) => {
    const inputs = new Map();
    const rows = fields.map((field) => {
      const shared = { name: field.name, id: `vk-ask-${field.name}` };
      let input;
      if (field.options) {
        input = h("select", shared, field.options.map(([value, text]) =>
          h("option", { value, selected: value === field.value }, text)));
      } else if (field.type === "textarea") {
        input = h("textarea", { ...shared, rows: 3 }, field.value ?? "");
      } else {
        input = h("input", { ...shared, type: field.type, value: field.value, min: field.min, max: field.max,
          step: field.step, required: field.required });
      }
      inputs.set(field.name, input);
      return h("label", { class: "vk-field", for: shared.id }, h("span", {}, field.label), input,
        field.help ? h("small", {}, field.help) : null);
    });
    const form = h("form", { method: "dialog", class: "vk-form" }, h("h2", {}, title), rows,
      h("div", { class: "vk-row vk-end" },
        h("button", { type: "button", class: "vk-button", onclick: () => dialog.close() }, "Keep as it is"),
        h("button", { type: "submit", class: `vk-button ${kind}` }, action)));
    const dialog = h("dialog", { class: "vk-dialog", "aria-label": title }, form);
    let answer = null;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      answer = Object.fromEntries([...inputs].map(([name, input]) => [name, input.value]));
      dialog.close();
    });
    dialog.addEventListener("close", () => { dialog.remove(); resolve(answer); });
    document.body.append(dialog);
    dialog.showModal();
    (inputs.values().next().value ?? form.querySelector("[type=submit]")).focus();
  });
}
