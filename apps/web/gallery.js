/** `<vidkv-gallery>`: what waits, what runs, what is finished; found again by words or state. */

import {
  ENDED, STATUS, ago, api, button, chip, confirmed, copy, duration, forgetRecent, h, icon, thumbnail, toast, videoPath,
} from "/page/kit.js";

const PAGE = 24;
const REFRESH_MS = 3000;

export class VidkvGallery extends HTMLElement {
  connectedCallback() {
    if (!this.list) this.build();
    // only while somebody looks
    this.observer = new IntersectionObserver(([entry]) => (entry.isIntersecting ? this.start() : this.stop()));
    this.observer.observe(this);
    this.visibility = () => { if (document.hidden) this.stop(); else if (this.offsetParent) this.start(); };
    document.addEventListener("visibilitychange", this.visibility);
  }

  disconnectedCallback() {
    this.observer.disconnect();
    document.removeEventListener("visibilitychange", this.visibility);
    this.stop();
  }

  build() {
    this.cards = new Map();
    this.videos = [];
    this.more = false;
    this.search = h("input", { type: "search", id: "vk-search", placeholder: "Search prompts, names, settings",
      oninput: () => this.render() });
    this.states = h("div", { class: "vk-filter", role: "group", "aria-label": "Which videos" },
      [["all", "All"], ["open", "Queue"], ["completed", "Finished"], ["stopped", "Stopped"]].map(([name, text]) =>
        h("button", { type: "button", "data-filter": name, "aria-pressed": String(name === "all"), onclick: () => this.choose(name) }, text)));
    this.filter = "all";
    this.summary = h("p", { class: "vk-small", role: "status", "aria-live": "polite" });
    this.fault = h("p", { class: "vk-fault", role: "alert" });
    this.list = h("div", { class: "vk-cards" });
    this.empty = h("div", { class: "vk-nothing", hidden: true }, h("h2", {}), h("p", {}));
    this.moreButton = button("Show older ones", null, () => this.load(true), { class: "ghost" });
    this.moreButton.hidden = true;
    this.append(
      h("div", { class: "vk-toolbar" }, h("label", { for: "vk-search", class: "vk-offscreen" }, "Search"), this.search, this.states, this.summary),
      this.fault, this.list, this.empty, h("div", { class: "vk-row vk-center" }, this.moreButton));
  }

  start() {
    if (this.timer) return;
    const turn = async () => {
      await this.load(false);
      if (this.timer) this.timer = setTimeout(turn, REFRESH_MS);
    };
    this.timer = setTimeout(turn, 0);
  }

  stop() {
    clearTimeout(this.timer);
    this.timer = null;
  }

  choose(name) {
    this.filter = name;
    for (const item of this.states.children) item.setAttribute("aria-pressed", String(item.dataset.filter === name));
    this.render();
  }

  async load(older) {
    try {
      const last = this.videos.at(-1)?.id;
      const most = older ? PAGE : Math.min(100, Math.max(PAGE, this.videos.length));
      const after = older && last ? `&after=${encodeURIComponent(last)}` : "";
      const page = await api("GET", `/v1/videos?limit=${most}${after}`);
      if (older) {
        this.videos = [...this.videos, ...page.data];
        this.more = page.has_more;
      } else {
        const fresh = new Set(page.data.map((video) => video.id));
        // what is older than the page stays as it was; what is in it and gone has been deleted
        const end = this.videos.findIndex((video) => video.id === page.last_id);
        const tail = end >= 0 ? this.videos.slice(end + 1).filter((video) => !fresh.has(video.id)) : [];
        if (!tail.length) this.more = page.has_more;
        this.videos = [...page.data, ...tail];
      }
      this.fault.textContent = "";
    } catch (error) {
      this.fault.textContent = error.message;
    }
    this.render();
  }

  matches(video) {
    const state = { all: true, open: !ENDED.has(video.status), completed: video.status === "completed",
      stopped: ["failed", "cancelled"].includes(video.status) }[this.filter];
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = [video.id, video.prompt, video.model, video.cache, video.size, `seed ${video.seed}`, STATUS[video.status],
      ...(video.schedule ?? []).map(([, prompt]) => prompt)].join(" ").toLowerCase();
    return state && words.every((word) => text.includes(word));
  }

  render() {
    const shown = this.videos.filter((video) => this.matches(video));
    const kept = new Set(shown.map((video) => video.id));
    for (const [id, card] of this.cards) if (!kept.has(id)) { card.element.remove(); this.cards.delete(id); }
    shown.forEach((video, place) => {
      const card = this.cards.get(video.id) ?? new Card(video.id, this);
      this.cards.set(video.id, card);
      card.take(video);
      if (this.list.children[place] !== card.element) this.list.insertBefore(card.element, this.list.children[place] ?? null);
    });
    const open = this.videos.filter((video) => !ENDED.has(video.status));
    this.summary.textContent = !this.videos.length ? "" : `${shown.length} shown` + (open.length ? ` · ${open.length} in the queue or running` : "");
    this.moreButton.hidden = !this.more;
    this.empty.hidden = shown.length > 0;
    const [title, text] = this.videos.length
      ? ["Nothing fits", "Try fewer words, or another filter above."]
      : ["No videos yet", "Describe a scene in the tab Create and press Generate; it stays here until you delete it."];
    this.empty.firstChild.textContent = title;
    this.empty.lastChild.textContent = text;
  }
}

class Card {
  constructor(id, gallery) {
    this.id = id;
    this.gallery = gallery;
    this.picture = h("button", { type: "button", class: "vk-open", onclick: () => this.open() });
    this.title = h("h3", {});
    this.state = h("div", { class: "vk-row" });
    this.facts = h("p", { class: "vk-small" });
    this.fault = h("p", { class: "vk-fault" });
    this.bar = h("div", { class: "vk-bar", "aria-hidden": "true" }, h("i", {}));
    this.settings = h("details", { class: "vk-settings", ontoggle: () => this.readSettings() },
      h("summary", {}, "Settings"), h("dl", {}));
    this.actions = h("div", { class: "vk-row" });
    this.element = h("article", { class: "vk-item" }, this.picture,
      h("div", { class: "vk-item-body" }, this.state, this.title, this.facts, this.bar, this.fault,
        this.settings, this.actions));
  }

  take(video) {
    const before = this.video;
    if (before && JSON.stringify(before) === JSON.stringify(video)) return;
    this.video = video;
    this.element.dataset.status = video.status;
    if (!before || before.chunks_done !== video.chunks_done || before.status !== video.status) {
      const next = thumbnail(video);
      const image = next.querySelector("img");
      // the old picture stays until the new one is there
      const swap = () => this.picture.replaceChildren(next);
      if (image && this.picture.querySelector("img")) { image.loading = "eager"; image.addEventListener("load", swap); } else swap();
    }
    this.picture.setAttribute("aria-label", `Open ${video.prompt}`);
    this.title.textContent = video.prompt;
    this.title.title = video.prompt;
    this.state.replaceChildren(chip(video.status),
      video.status === "queued" && video.place ? h("span", { class: "vk-place" }, `place ${video.place} in line`) : "");
    const made = video.frame_rate ? duration(video.frames / video.frame_rate) : `${video.frames} frames`;
    const length = video.until_stopped && !ENDED.has(video.status) ? `${made}, until stopped`
      : video.status === "completed" ? made : `${made} of ${duration(Number(video.seconds))}`;
    this.facts.textContent = [length, video.size, video.model, video.cache, ago(video.completed_at ?? video.created_at)]
      .filter(Boolean).join(" · ");
    this.fault.textContent = video.error?.message ?? "";
    this.bar.hidden = ENDED.has(video.status);
    this.bar.firstChild.style.inlineSize = `${video.progress}%`;
    if (!before || before.status !== video.status) this.renderActions();
  }

  renderActions() {
    const { video } = this;
    const ended = ENDED.has(video.status);
    this.actions.replaceChildren(
      button("Open", "open", () => this.open(), { class: "small", "data-act": "open" }),
      button("Reuse", null, () => document.dispatchEvent(new CustomEvent("vidkv-reuse", { detail: video.id })),
        { class: "small ghost", "data-act": "reuse", title: "Fill the form with its settings" }),
      ended ? h("button", { type: "button", class: "vk-button ghost icon vk-last", "data-act": "delete", title: "Delete",
        "aria-label": `Delete ${video.prompt}`, onclick: () => this.remove() }, icon("trash"))
        : button(video.status === "queued" ? "Take out" : "Stop", null, () => this.stop(), { class: "small ghost", "data-act": "stop" }));
  }

  open() {
    document.dispatchEvent(new CustomEvent("vidkv-open", { detail: this.id }));
  }

  async stop() {
    try {
      const path = this.video.status === "queued" || !this.video.chunks_done ? "/cancel" : "/finish";
      this.take(await api("POST", videoPath(this.id, path)));
    } catch (error) {
      toast(error.message, "error");
    }
  }

  async remove() {
    if (!(await confirmed(`Delete “${this.video.prompt.slice(0, 80)}” with its file?`, "Delete"))) return;
    try {
      await api("DELETE", videoPath(this.id));
      forgetRecent(this.id);
      document.dispatchEvent(new CustomEvent("vidkv-deleted", { detail: this.id }));
      toast("Deleted");
      this.gallery.videos = this.gallery.videos.filter((video) => video.id !== this.id);
      this.gallery.render();
    } catch (error) {
      toast(error.message, "error");
    }
  }

  /** As the file itself tells them, where there is one. */
  async readSettings() {
    if (!this.settings.open || this.read) return;
    this.read = true;
    const list = this.settings.querySelector("dl");
    try {
      const answer = await api("GET", videoPath(this.id, "/settings"));
      list.replaceChildren(...Object.entries(answer.settings).map(([name, value]) =>
        h("div", {}, h("dt", {}, name), h("dd", {}, typeof value === "object" ? JSON.stringify(value) : String(value)))));
      this.settings.append(h("div", { class: "vk-row" },
        button("Python", "copy", () => copy(answer.python, "Python"), { class: "small ghost" }),
        button("Command", "copy", () => copy(answer.cli, "The command"), { class: "small ghost" })));
    } catch (error) {
      this.read = false;
      list.replaceChildren(h("div", {}, h("dd", { class: "vk-fault" }, error.message)));
    }
  }
}

customElements.define("vidkv-gallery", VidkvGallery);
