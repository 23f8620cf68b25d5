/** The page around the form: what the form says is weighed, and its elements are brought together. */

import { api, h, remember, toast, videoPath } from "/page/kit.js";
import "/page/stage.js";
import "/page/gallery.js";
import "/page/schedule.js";
import "/page/compare.js";
import "/page/comparing.js";

const HEALTH_MS = 15000;
const stage = () => document.querySelector("vidkv-stage");

/** Go to a tab by what stands on it. */
export function goTo(name) {
  for (const tab of document.querySelectorAll('#vk-tabs [role="tab"], #vk-tabs .overflow-dropdown button')) {
    if (tab.textContent.trim().startsWith(name)) { tab.click(); return; }
  }
}

function open(id) {
  goTo("Create");
  stage()?.setAttribute("job", id);
  stage()?.open(id);
  if (matchMedia("(max-width: 900px)").matches) {
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    requestAnimationFrame(() => stage()?.scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "start" }));
  }
}

async function reuse(id) {
  try {
    const { request, python } = await api("GET", videoPath(id, "/settings"));
    goTo("Create");
    globalThis.vidkvApply(JSON.stringify(request));
    const started = /^ {4}(image|video)=\.\.\.,/m.test(python);
    toast(started ? "The form has its settings; choose again the file that it started from"
      : "The form has the settings of that video");
  } catch (error) {
    toast(error.message, "error");
  }
}

document.addEventListener("vidkv-open", ({ detail }) => open(detail));
document.addEventListener("vidkv-reuse", ({ detail }) => reuse(detail));
document.addEventListener("vidkv-deleted", ({ detail }) => { if (stage()?.video?.id === detail) stage().close(); });

/** What the form asks for now, for a reload and for the schedule. Gradio changes it in place. */
class VidkvDraft extends HTMLElement {
  static observedAttributes = ["values"];

  attributeChangedCallback() {
    const values = JSON.parse(this.getAttribute("values"));
    remember.set(sessionStorage, "draft", values);
    document.dispatchEvent(new CustomEvent("vidkv-draft", { detail: values }));
  }
}

/** What comes back from Generate: its video goes on the stage, once. */
class VidkvCreated extends HTMLElement {
  static observedAttributes = ["job"];

  static last = null;

  attributeChangedCallback() {
    const id = this.getAttribute("job");
    if (VidkvCreated.last === id) return;
    VidkvCreated.last = id;
    open(id);
  }
}

/** Whether the server works, in the corner of the page. */
class VidkvHealth extends HTMLElement {
  connectedCallback() {
    this.setAttribute("role", "status");
    this.look();
    this.timer = setInterval(() => { if (!document.hidden) this.look(); }, HEALTH_MS);
  }

  disconnectedCallback() { clearInterval(this.timer); }

  async look() {
    try {
      const { version } = await api("GET", "/health");
      this.show("good", `Ready · ${version}`);
    } catch (error) {
      this.show("bad", error.status ? error.message : "Server not reached");
    }
  }

  show(state, text) {
    if (this.textContent === text) return;
    this.dataset.state = state;
    this.replaceChildren(h("i", { "aria-hidden": "true" }), h("span", {}, text));
  }
}

const KEYS = [
  ["Ctrl + Enter", "Generate, from anywhere in the form"],
  ["S", "Stop and keep"], ["P", "Pause or resume"], ["E", "Extend"], ["B", "Branch"],
  [", and .", "Look at the chunk before or after"], ["Esc", "Back to the newest frames"],
  ["C, G, D", "The tabs Create, Gallery & queue, Compare"], ["?", "This list"],
];

function help() {
  const dialog = h("dialog", { class: "vk-dialog", "aria-label": "Keyboard shortcuts" },
    h("h2", {}, "Keyboard"), h("dl", { class: "vk-keys" }, KEYS.map(([keys, what]) => h("div", {}, h("dt", {}, h("kbd", {}, keys)), h("dd", {}, what)))),
    h("form", { method: "dialog", class: "vk-row vk-end" }, h("button", { class: "vk-button primary" }, "Close")));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

/** Press a button of the stage if it is there. */
function press(...acts) {
  // of a stage behind another tab nothing is pressed by accident
  if (!stage()?.checkVisibility()) return;
  for (const act of acts) {
    const found = stage()?.querySelector(`.vk-buttons [data-act="${act}"]`);
    if (found) { found.click(); return; }
  }
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input, textarea, select, [contenteditable], dialog");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.closest?.("#vk-form")) {
    document.querySelector("#vk-generate")?.click();
    return;
  }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.repeat && !",.".includes(event.key)) return;
  const now = stage()?.preview ?? (stage()?.video?.chunks_done ?? 1) - 1;
  const run = {
    s: () => press("finish"), p: () => press("pause", "resume"), e: () => press("extend"), b: () => press("branch"),
    ",": () => stage()?.lookAt(now - 1), ".": () => stage()?.lookAt(now + 1), Escape: () => stage()?.preview !== null && stage()?.lookAway(),
    c: () => goTo("Create"), g: () => goTo("Gallery"), d: () => goTo("Compare"), "?": help,
  }[event.key];
  if (run && stage()) { run(); if (event.key !== "Escape") event.preventDefault(); }
});

document.addEventListener("click", (event) => {
  const example = event.target.closest?.("[data-prompt]");
  if (example) {
    const area = document.querySelector("#vk-prompt textarea");
    area.value = example.dataset.prompt;
    area.dispatchEvent(new Event("input", { bubbles: true }));
    area.focus();
  }
  if (event.target.closest?.("#vk-help")) help();
  const menu = event.target.closest?.(".vk-menu");
  for (const other of document.querySelectorAll(".vk-menu[open]")) if (other !== menu) other.open = false;
});

customElements.define("vidkv-draft", VidkvDraft);
customElements.define("vidkv-created", VidkvCreated);
customElements.define("vidkv-health", VidkvHealth);

/** For the form's own events. */
globalThis.vidkv = {
  seed: () => stage()?.video?.seed ?? null,
  dice: () => Math.floor(Math.random() * 2 ** 31),
  draft: () => { const draft = remember.get(sessionStorage, "draft", null); return draft ? JSON.stringify(draft) : ""; },
};
