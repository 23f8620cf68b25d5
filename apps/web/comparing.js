/** `<vidkv-comparing>`: the place of a comparison, and the choice of any two videos for it. */

import { api, button, h, remember } from "/page/kit.js";

export class VidkvComparing extends HTMLElement {
  connectedCallback() {
    if (!this.place) this.build();
    const [a, b] = remember.get(sessionStorage, "compare", []);
    if (a && b) this.show(a, b);
    this.observer = new IntersectionObserver(([entry]) => { if (entry.isIntersecting) this.listVideos(); });
    this.observer.observe(this);
  }

  disconnectedCallback() { this.observer.disconnect(); }

  build() {
    this.selects = ["a", "b"].map((side) => h("select", { id: `vk-compare-${side}`, "aria-label": `Video ${side.toUpperCase()}` }));
    this.fault = h("p", { class: "vk-fault", role: "alert" });
    this.picker = h("form", { class: "vk-row vk-picker", onsubmit: (event) => { event.preventDefault(); this.choose(); } },
      h("span", { class: "vk-small" }, "Or any two that are here:"), this.selects, button("Show", null, null, { type: "submit" }));
    this.place = h("div", {});
    this.empty = h("div", { class: "vk-empty vk-short" }, h("h2", {}, "One seed, two caches"),
      h("p", {}, "Choose two caches and press Compare. Both videos start from the same noise, so whatever differs " +
        "is what the cache does. They play here in step, with their difference and how it grows."));
    this.append(this.picker, this.fault, this.empty, this.place);
  }

  async listVideos() {
    try {
      const { data } = await api("GET", "/v1/videos?limit=100");
      const chosen = this.selects.map((select) => select.value);
      this.selects.forEach((select, side) => {
        select.replaceChildren(...data.filter((video) => video.chunks_done).map((video) =>
          h("option", { value: video.id }, `${video.prompt.slice(0, 48)} · ${video.cache} · ${video.id}`)));
        const shown = this.pair?.[side] ?? chosen[side];
        if (shown) select.value = shown;
      });
      this.picker.hidden = data.length < 2;
      this.fault.textContent = "";
    } catch (error) {
      this.fault.textContent = error.message;
    }
  }

  choose() {
    const [a, b] = this.selects.map((select) => select.value);
    if (!a || !b || a === b) { this.fault.textContent = "Choose two different videos."; return; }
    this.fault.textContent = "";
    this.show(a, b);
  }

  show(a, b) {
    if (this.pair?.[0] === a && this.pair[1] === b) return;
    this.pair = [a, b];
    remember.set(sessionStorage, "compare", this.pair);
    this.empty.hidden = true;
    this.place.replaceChildren(h("vidkv-compare", { a, b }));
  }
}

/** What comes back from Compare. Gradio changes it in place, one attribute after the other. */
class VidkvPaired extends HTMLElement {
  static observedAttributes = ["a", "b"];

  attributeChangedCallback() {
    queueMicrotask(() => {
      document.querySelector("vidkv-comparing")?.show(this.getAttribute("a"), this.getAttribute("b"));
    });
  }
}

customElements.define("vidkv-comparing", VidkvComparing);
customElements.define("vidkv-paired", VidkvPaired);
