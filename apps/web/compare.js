/**
 * Two videos side by side: `<vidkv-compare a="ID" b="ID">`.
 *
 * Both play in step under one control, with their difference drawn beside them, the curves by chunk under a
 * playhead, and a table that fills while they are being made. The element works in the light DOM, keeps what it
 * opened in one AbortController and gives all of it back when it leaves the page.
 */

import { api, bytes, h, icon, svg, videoPath } from "/page/kit.js";

const POLL_MS = 1500;
const CATCH_UP_MS = 100;
const RETRY_MS = [2000, 5000, 15000];
const MAX_SIDE = 480;
const RING = 4;
const POINTS = 600;
const PEAK_DB = 60;
/** Seconds apart from which the second video jumps instead of hurrying. */
const JUMP_S = 0.3;
const ENDED = new Set(["completed", "failed", "cancelled"]);

const CURVES = [
  ["psnr", "PSNR", "dB", (row) => [row.psnr ?? PEAK_DB], { low: 0, high: PEAK_DB, digits: 1 }],
  ["ssim", "SSIM", "", (row) => [row.ssim], { low: 0, high: 1, digits: 3 }],
  ["largest", "Largest difference", "of 255", (row) => [row.max_difference], { low: 0, high: 255, digits: 0 }],
  ["luma", "Luminance drift", "%", (row) => row.luma, { digits: 2 }],
  ["saturation", "Saturation drift", "%", (row) => row.saturation, { digits: 2 }],
];
const WORLD = {
  identity: ["Identity", "share right", { low: 0, high: 1, digits: 3 }],
  count_error: ["Objects too many or few", "a frame", { low: 0, digits: 2 }],
  colour_delta_e: ["Colour error", "ΔE2000", { low: 0, digits: 2 }],
  trajectory_rmse: ["Trajectory error", "px", { low: 0, digits: 2 }],
  speed_error: ["Speed error", "relative", { low: 0, digits: 3 }],
  teleports: ["Jumps", "an object and frame", { low: 0, digits: 3 }],
};

const STYLE = `
vidkv-compare { display: block; container-type: inline-size; --vkc-a: #3f83e6; --vkc-b: #d9731c; --vkc-d: #8f78d8;
  --vkc-line: var(--vk-line, color-mix(in srgb, currentColor 20%, transparent));
  --vkc-quiet: var(--vk-quiet, color-mix(in srgb, currentColor 72%, transparent));
  --vkc-card: var(--vk-card, color-mix(in srgb, currentColor 5%, transparent));
  --vkc-accent: var(--vk-accent, #3f83e6); font-variant-numeric: tabular-nums; }
/* an id that is nowhere lifts these above the rules that Gradio has for plain elements */
:is(vidkv-compare, #vk-nowhere) {
  .vkc { display: grid; gap: 1rem; }
  .vkc [hidden] { display: none !important; }
  .vkc p, .vkc figure, .vkc dl, .vkc dd { margin: 0; }
  .vkc-quiet { color: var(--vkc-quiet); font-size: .875rem; }
  .vkc-stage { display: grid; gap: .75rem; grid-template-columns: 1fr 1fr; grid-template-areas: "a b" "d i"; }
  .vkc-stage:focus-visible, .vkc :focus-visible { outline: 3px solid var(--vkc-accent); outline-offset: 2px; }
  .vkc-panel { min-width: 0; display: grid; gap: .35rem; align-content: start; }
  .vkc-panel.a { grid-area: a; }
  .vkc-panel.b { grid-area: b; }
  .vkc-panel.d { grid-area: d; }
  .vkc-panel figcaption { display: flex; align-items: baseline; gap: .5rem; min-width: 0; font-size: .875rem; }
  .vkc-panel figcaption span:last-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
  .vkc-key { flex: none; padding: 0 .45rem; border-radius: 5px; background: var(--vkc-d); color: #101216;
    font-weight: 700; }
  .vkc-key.a { background: var(--vkc-a); }
  .vkc-key.b { background: var(--vkc-b); }
  .vkc-box { position: relative; overflow: hidden; aspect-ratio: var(--vkc-ratio, 1); border-radius: 10px;
    background: #0b0c0e; color: #c9ccd3; }
  .vkc-box > * { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; }
  .vkc-small .vkc-box > * { image-rendering: pixelated; }
  .vkc-box > .vkc-empty { display: grid; place-items: center; padding: .75rem; text-align: center;
    font-size: .8125rem; }
  .vkc-info { grid-area: i; display: grid; gap: .5rem; align-content: center; font-size: .875rem; }
  .vkc-info label { display: grid; gap: .15rem; }
  .vkc-controls { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem .75rem; }
  .vkc-controls input[type=range] { flex: 1 1 9rem; min-width: 0; }
  .vkc input[type=range] { width: 100%; height: 2rem; margin: 0; accent-color: var(--vkc-accent); }
  .vkc-button { display: inline-grid; place-items: center; min-width: 2.75rem; min-height: 2.75rem; padding: 0 .75rem;
    border: 1px solid var(--vkc-line); border-radius: 10px; background: var(--vkc-card); color: inherit;
    font: inherit; font-size: .9375rem; line-height: 1; text-decoration: none; cursor: pointer; }
  .vkc-button:hover:not(:disabled) { border-color: currentColor; }
  .vkc-button:disabled { opacity: .45; cursor: default; }
  .vkc-button svg { width: 1.25rem; height: 1.25rem; fill: currentColor; }
  .vkc-time { min-width: 8.5rem; margin-left: auto; font-size: .875rem; text-align: right; }
  .vkc-heard { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
    white-space: nowrap; }
  .vkc-figures { display: flex; flex-wrap: wrap; gap: .5rem 1.75rem; }
  .vkc-figures div { display: flex; flex-direction: column-reverse; }
  .vkc-figures dt { color: var(--vkc-quiet); font-size: .8125rem; }
  .vkc-figures dd { font-size: 1.25rem; font-weight: 600; line-height: 1.3; }
  .vkc-chart { display: grid; gap: .35rem; min-width: 0; }
  .vkc-chart > div:first-child { display: flex; flex-wrap: wrap; align-items: center; gap: .35rem .9rem; }
  .vkc select { flex: 0 1 17rem; width: auto; min-height: 2.5rem; padding: 0 .5rem; border: 1px solid var(--vkc-line); border-radius: 8px;
    background: var(--vkc-field, Field); color: FieldText; font: inherit; }
  .vkc-legend { display: flex; gap: .9rem; font-size: .8125rem; }
  .vkc-legend i { display: inline-block; width: 1.1rem; margin-right: .3rem; vertical-align: middle;
    border-top: 3px solid var(--vkc-d); }
  .vkc-legend i.a { border-color: var(--vkc-a); }
  .vkc-legend i.b { border-color: var(--vkc-b); border-top-style: dashed; }
  .vkc-plot { position: relative; height: 9.5rem; margin: .5rem 0 0 2.75rem; cursor: pointer; touch-action: pan-y; }
  .vkc-ends { display: flex; justify-content: space-between; margin-left: 2.75rem; color: var(--vkc-quiet);
    font-size: .75rem; }
  .vkc-plot svg { width: 100%; height: 100%; overflow: visible; display: block; }
  .vkc-plot line { stroke: var(--vkc-line); vector-effect: non-scaling-stroke; }
  .vkc-plot line.limit { stroke: currentColor; stroke-dasharray: 5 4; opacity: .6; }
  .vkc-plot path { fill: none; stroke: var(--vkc-d); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round;
    vector-effect: non-scaling-stroke; }
  .vkc-plot path.a { stroke: var(--vkc-a); }
  .vkc-plot path.b { stroke: var(--vkc-b); stroke-dasharray: 7 5; }
  .vkc-plot span { position: absolute; right: calc(100% + .4rem); transform: translateY(-50%); font-size: .75rem;
    color: var(--vkc-quiet); white-space: nowrap; }
  .vkc-head { position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px; background: currentColor;
    pointer-events: none; }
  .vkc-scroll { overflow-x: auto; }
  .vkc table { width: 100%; border-collapse: collapse; font-size: .875rem; }
  .vkc th, .vkc td { padding: .4rem .75rem .4rem 0; border: 0; border-bottom: 1px solid var(--vkc-line);
    background: none; text-align: right; }
  .vkc th[scope=row] { text-align: left; font-weight: 400; color: var(--vkc-quiet); }
  .vkc td { white-space: nowrap; }
  .vkc-note { padding: .6rem .8rem; border: 1px solid var(--vkc-line); border-radius: 10px; background: var(--vkc-card);
    font-size: .9375rem; overflow-wrap: anywhere; }
  .vkc-note.bad { border-left: 4px solid #d64545; }
  .vkc-notes { display: grid; gap: .5rem; }
  @container (min-width: 46rem) {
    .vkc-stage { grid-template-columns: 1fr 1fr 1fr; grid-template-areas: "a b d" "i i i"; }
    .vkc-info { grid-template-columns: 1fr minmax(14rem, 1fr); align-items: center; }
  }
}
`;

const sheet = new CSSStyleSheet();
sheet.replaceSync(STYLE);

const spoken = (seconds) => seconds.toFixed(1);
const number = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));

class VidkvCompare extends HTMLElement {
  static observedAttributes = ["a", "b"];

  connectedCallback() {
    if (!document.adoptedStyleSheets.includes(sheet)) document.adoptedStyleSheets.push(sheet);
    this.start();
  }

  disconnectedCallback() { this.stop(); }

  attributeChangedCallback(name, before, now) {
    if (this.isConnected && before !== now) { this.stop(); this.start(); }
  }

  start() {
    this.stop();
    this.ids = [this.getAttribute("a"), this.getAttribute("b")];
    if (!this.ids[0] || !this.ids[1]) {
      this.replaceChildren(h("p", { class: "vkc-quiet" },
        "Choose two videos of one size, or generate one prompt with two caches, and they appear here side by side."));
      return;
    }
    this.life = new AbortController();
    Object.assign(this, { rows: [], world: null, told: null, player: null, curve: "psnr", tries: 0, known: 0 });
    this.build();
    this.watch(this.life.signal);
  }

  stop() {
    this.life?.abort();
    this.life = null;
    this.player?.close();
    this.player = null;
    this.resize?.disconnect();
    this.replaceChildren();
    Object.assign(this, { rows: [], world: null, told: null });
  }

  // ---------------------------------------------------------------- what there is

  async watch(signal) {
    while (!signal.aborted) {
      let wait = POLL_MS;
      try {
        if (document.hidden) await seen(signal);
        const [a, b] = this.ids.map(encodeURIComponent);
        const query = `after=${this.rows.length}&world=${this.known}`;
        const told = await api("GET", `/v1/compare/${a}/${b}?${query}`, undefined, signal);
        if (signal.aborted) return;
        this.tries = 0;
        if (told.measured < this.rows.length) {
          // one of them is made anew
          this.rows = [];
          this.known = 0;
          continue;
        }
        this.take(told);
        if (told.complete && told.next >= told.measured) return;
        if (told.next < told.measured || told.measured < told.available) wait = CATCH_UP_MS;
      } catch (error) {
        if (signal.aborted) return;
        const passing = !(error.status >= 400) || error.status >= 500 || error.status === 429;
        this.complain(error.message, passing);
        if (!passing) return;
        wait = RETRY_MS[Math.min(this.tries, RETRY_MS.length - 1)];
        this.tries += 1;
      }
      await pause(wait, signal);
    }
  }

  take(told) {
    const first = !this.told;
    this.told = told;
    this.rows.push(...told.chunks);
    if (told.world) {
      const curves = told.world.a.curves
        ? { a: told.world.a.curves, b: told.world.b.curves }
        : this.world?.curves;
      this.world = { ...told.world, curves };
      this.known = told.world.chunks;
    }
    this.parts.error.hidden = true;
    this.fill(first);
    this.play();
  }

  complain(message, passing) {
    const { error } = this.parts;
    error.hidden = false;
    error.replaceChildren(h("span", {}, message + (passing ? " Trying again by itself." : "")));
    if (!this.told) this.parts.body.hidden = true;
  }

  // ---------------------------------------------------------------- the page

  build() {
    const { signal } = this.life;
    const parts = this.parts = {};
    const panel = (side, label) => {
      parts[side] = h("div", { class: "vkc-box" }, h("div", { class: "vkc-empty" }, "No picture yet"));
      parts[`${side}Name`] = h("span", {}, label);
      const key = side === "d" ? "A − B" : side.toUpperCase();
      return h("figure", { class: `vkc-panel ${side}` }, parts[side],
        h("figcaption", {}, h("span", { class: `vkc-key ${side}` }, key), parts[`${side}Name`]));
    };
    parts.gain = h("input", { type: "range", min: 1, max: 32, step: 1, value: 4,
      "aria-label": "Amplification of the difference" });
    parts.gainSaid = h("span", {}, "Difference × 4");
    parts.gain.addEventListener("input", () => {
      parts.gainSaid.textContent = `Difference × ${parts.gain.value}`;
      this.player?.redraw();
    }, { signal });
    parts.now = h("p", { class: "vkc-now" }, "");
    const info = h("div", { class: "vkc-info" }, parts.now, h("label", {}, parts.gainSaid, parts.gain));
    parts.stage = h("div", { class: "vkc-stage", tabindex: 0, role: "group",
      "aria-label": "Both videos and their difference. Space plays and pauses, left and right arrows step." },
      panel("a", ""), panel("b", ""), panel("d", "amplified"), info);

    const control = (label, content, act) =>
      h("button", { type: "button", class: "vkc-button", "aria-label": label, title: label, onclick: act }, content);
    parts.toggle = control("Play both", icon("play"), () => this.player?.toggle());
    parts.back = control("One step back", "‹", () => this.player?.step(-1));
    parts.on = control("One step on", "›", () => this.player?.step(1));
    parts.scrub = h("input", { type: "range", min: 0, max: 0, step: 1, value: 0, "aria-label": "Position in both" });
    parts.scrub.addEventListener("input", () => this.player?.seek(Number(parts.scrub.value)), { signal });
    parts.time = h("span", { class: "vkc-time" }, "");
    const controls = h("div", { class: "vkc-controls", role: "group", "aria-label": "Play both videos" },
      parts.back, parts.toggle, parts.on, parts.scrub, parts.time);

    parts.select = h("select", { "aria-label": "Curve" });
    parts.select.addEventListener("change", () => { this.curve = parts.select.value; this.draw(); }, { signal });
    parts.legend = h("div", { class: "vkc-legend" });
    parts.plot = h("div", { class: "vkc-plot" });
    parts.head = h("div", { class: "vkc-head", hidden: true });
    const pick = (event) => this.pick(event);
    parts.plot.addEventListener("pointerdown", (event) => {
      parts.plot.setPointerCapture(event.pointerId);
      pick(event);
    }, { signal });
    parts.plot.addEventListener("pointermove", (event) => { if (event.buttons) pick(event); }, { signal });
    parts.ends = h("div", { class: "vkc-ends" }, h("span", {}, "chunk 0"), h("span", {}, ""));
    const chart = h("div", { class: "vkc-chart" }, h("div", {}, parts.select, parts.legend), parts.plot, parts.ends);

    parts.figures = h("dl", { class: "vkc-figures" });
    parts.notes = h("div", { class: "vkc-notes" });
    parts.upTo = h("p", { class: "vkc-quiet" }, "Comparing…");
    parts.said = h("p", { class: "vkc-heard", role: "status" });
    parts.table = h("tbody");
    const heads = ["", "A", "B", "B : A"].map((text) => h("th", { scope: "col" }, text));
    const table = h("div", { class: "vkc-scroll" }, h("table", { "aria-label": "Both videos in numbers" },
      h("thead", {}, h("tr", {}, heads)), parts.table));
    const [a, b] = this.ids.map(encodeURIComponent);
    parts.report = h("a", { class: "vkc-button", href: `/v1/compare/${a}/${b}/report`, download: "" },
      "Download report");
    parts.error = h("div", { class: "vkc-note bad", role: "alert", hidden: true });
    parts.body = h("div", { class: "vkc" }, parts.stage, controls, parts.figures, parts.notes, chart, table,
      h("div", { class: "vkc-controls" }, parts.report, parts.upTo, parts.said));
    this.replaceChildren(h("div", { class: "vkc" }, parts.error, parts.body));
    parts.body.addEventListener("keydown", (event) => this.key(event), { signal });
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.player) return;
    const { target } = event;
    const range = target === this.parts.scrub;
    if (!range && target.closest("input, select, button, a, textarea")) return;
    const act = {
      " ": () => this.player.toggle(), k: () => this.player.toggle(), Home: () => this.player.seek(0),
      End: () => this.player.seek(this.player.last), ArrowLeft: () => this.player.step(-1),
      ArrowRight: () => this.player.step(1),
    }[event.key];
    // a slider moves by arrows itself
    if (!act || (range && event.key !== " " && event.key !== "k")) return;
    event.preventDefault();
    act();
  }

  fill(first) {
    const { parts, told } = this;
    parts.body.hidden = false;
    this.style.setProperty("--vkc-ratio", `${told.width} / ${told.height}`);
    parts.stage.classList.toggle("vkc-small", Math.max(told.width, told.height) <= 256);
    for (const side of ["a", "b"]) {
      parts[`${side}Name`].textContent = told[side].cache;
      parts[`${side}Name`].title = `${told[side].cache}, video ${told[side].video.id}`;
    }
    parts.upTo.textContent = told.up_to;
    if (told.complete && parts.said.dataset.done !== "yes") {
      parts.said.dataset.done = "yes";
      parts.said.textContent = "The comparison is complete.";
    }
    const close = told.fidelity;
    const parted = !told.measured ? "–" : close.identical ? "every pixel is equal"
      : close.diverged_at === null ? "not so far" : `chunk ${close.diverged_at}`;
    set(parts.figures, [
      ["PSNR of all frames", close.identical ? "equal" : close.psnr === null ? "–" : `${close.psnr.toFixed(1)} dB`],
      ["SSIM", number(close.ssim, 3)],
      [`parted (below ${close.threshold_db} dB)`, parted],
      ["bytes a latent frame, B : A", number(told.ratio.bytes_per_frame, 3)],
    ].map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
    set(parts.notes, told.notes.map((text) => h("p", { class: "vkc-note" }, text)));
    this.tabulate();
    this.offer(first);
    this.draw();
  }

  tabulate() {
    const { a, b, ratio } = this.told;
    const last = this.rows.at(-1);
    const rows = [
      ["state", status(a.video), status(b.video), ""],
      ["bytes a latent frame", bytes(a.bytes_per_frame), bytes(b.bytes_per_frame), number(ratio.bytes_per_frame, 3)],
      ["KV cache", bytes(a.kv_bytes), bytes(b.kv_bytes), number(ratio.kv_bytes, 3)],
      ["frames per second, end to end", number(a.fps, 1), number(b.fps, 1), number(ratio.fps, 2)],
    ];
    if (last) {
      rows.push(["luminance drift, %", ...last.luma.map((value) => number(value, 2)), ""]);
      rows.push(["saturation drift, %", ...last.saturation.map((value) => number(value, 2)), ""]);
    }
    if (this.world) {
      for (const [name, [title, unit, { digits }]] of Object.entries(WORLD)) {
        const pair = [this.world.a, this.world.b].map((side) => number(side.means[name], digits));
        rows.push([`${title.toLowerCase()} (${unit})`, ...pair, ""]);
      }
      if (this.world.a.returned || this.world.b.returned) {
        const back = [this.world.a, this.world.b].map((side) => `${side.right} of ${side.returned}`);
        rows.push(["came back as they were", ...back, ""]);
      }
    }
    set(this.parts.table, rows.map(([name, ...cells]) =>
      h("tr", {}, h("th", { scope: "row" }, name), cells.map((cell) => h("td", {}, cell)))));
  }

  // ---------------------------------------------------------------- curves

  curves() {
    const found = CURVES.map(([name, title, unit, values, options]) => ({ name, title, unit, options,
      values: () => columns(this.rows.map(values)) }));
    if (this.world?.curves) {
      for (const [name, [title, unit, options]] of Object.entries(WORLD)) {
        found.push({ name, title, unit, options,
          values: () => [this.world.curves.a[name], this.world.curves.b[name]] });
      }
    }
    return found;
  }

  offer(first) {
    const names = this.curves().map(({ name }) => name).join();
    if (!first && this.offered === names) return;
    this.offered = names;
    this.parts.select.replaceChildren(...this.curves().map(({ name, title, unit }) =>
      h("option", { value: name, selected: name === this.curve }, unit ? `${title}, ${unit}` : title)));
  }

  draw() {
    const { plot, legend, head } = this.parts;
    const curve = this.curves().find(({ name }) => name === this.curve) ?? this.curves()[0];
    const values = curve.values();
    const known = values.flat().filter((value) => value !== null && value !== undefined);
    if (!known.length) {
      plot.replaceChildren(h("p", { class: "vkc-quiet" }, "Nothing is compared yet."), head);
      legend.replaceChildren();
      return;
    }
    let low = Math.min(...extent(known), curve.options.low ?? Infinity);
    let high = Math.max(...extent(known), curve.options.high ?? -Infinity);
    if (high - low < 1e-9) { high += 1; if (curve.options.low === undefined) low -= 1; }
    const wide = Math.max(1, this.rows.length - 1);
    const y = (value) => 100 * (high - value) / (high - low);
    const marks = [low, (low + high) / 2, high];
    const lines = marks.map((value) => svg("line", { x1: 0, x2: 100, y1: y(value), y2: y(value) }));
    if (curve.name === "psnr") {
      const limit = y(this.told.fidelity.threshold_db);
      lines.push(svg("line", { class: "limit", x1: 0, x2: 100, y1: limit, y2: limit }));
    }
    const kinds = values.length === 1 ? ["d"] : ["a", "b"];
    const paths = values.map((side, i) => svg("path", { class: kinds[i], d: path(side, wide, y) }));
    const said = `${curve.title} from ${number(low, curve.options.digits)} to ${number(high, curve.options.digits)} `
      + `${curve.unit} over ${this.rows.length} chunks`;
    const ticks = marks.map((value) =>
      h("span", { style: `top: ${y(value)}%` }, number(value, Math.min(curve.options.digits, 2))));
    plot.replaceChildren(
      svg("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img", "aria-label": said },
        ...lines, ...paths), ...ticks, head);
    this.parts.ends.lastChild.textContent = this.rows.length > 1 ? String(this.rows.length - 1) : "";
    legend.replaceChildren(...kinds.map((kind) => h("span", {}, h("i", { class: kind }),
      kind === "d" ? "A against B" : kind.toUpperCase())));
    this.point(this.player?.chunk ?? 0);
  }

  /** Go to the chunk under the pointer. */
  pick(event) {
    if (!this.player || !this.rows.length) return;
    const box = this.parts.plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    this.player.toChunk(Math.round(share * (this.rows.length - 1)));
  }

  /** The playhead and the numbers of the chunk that is shown. */
  point(chunk) {
    const { head, now } = this.parts;
    const row = this.rows[chunk];
    head.hidden = !row;
    if (!row) { now.textContent = ""; return; }
    head.style.left = `${100 * chunk / Math.max(1, this.rows.length - 1)}%`;
    const psnr = row.psnr === null ? "equal" : `PSNR ${row.psnr.toFixed(1)} dB`;
    now.textContent = `Chunk ${chunk}: ${psnr}, SSIM ${row.ssim.toFixed(3)}`;
  }

  /** The chunk of a frame. */
  chunkAt(frame) {
    let [low, high] = [0, this.rows.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.rows[middle].first_frame <= frame) low = middle; else high = middle - 1;
    }
    return low;
  }

  // ---------------------------------------------------------------- pictures

  /** Open the player that fits: videos once both have ended, until then the last picture of every chunk. */
  play() {
    const { told } = this;
    const whole = [told.a, told.b].every(({ video }) =>
      video.status === "completed" || (ENDED.has(video.status) && video.has_partial && video.frames > 0));
    const kind = whole ? VideoPair : PicturePair;
    if (!(this.player instanceof kind)) {
      const chunk = this.player?.chunk ?? null;
      this.player?.close();
      this.player = new kind(this, chunk);
    }
    this.player.grown();
  }

  show({ position, last, playing, text, chunk }) {
    const { scrub, time, toggle } = this.parts;
    scrub.max = last;
    scrub.value = position;
    scrub.setAttribute("aria-valuetext", text);
    time.textContent = text;
    const label = playing ? "Pause both" : "Play both";
    if (toggle.getAttribute("aria-label") !== label) {
      toggle.setAttribute("aria-label", label);
      toggle.title = label;
      toggle.replaceChildren(icon(playing ? "pause" : "play"));
    }
    this.point(chunk);
  }
}

/** Draws |A − B| of two sources of one size. */
class Difference {
  constructor(page) {
    this.page = page;
    const { width, height } = page.told;
    const scale = Math.min(1, MAX_SIDE / Math.max(width, height));
    this.width = Math.max(1, Math.round(width * scale));
    this.height = Math.max(1, Math.round(height * scale));
    this.canvas = h("canvas", { role: "img", "aria-label": "Amplified difference of both pictures" });
    this.canvas.width = this.width;
    this.canvas.height = this.height;
    this.out = this.canvas.getContext("2d");
    this.image = this.out.createImageData(this.width, this.height);
    this.scratch = document.createElement("canvas");
    this.scratch.width = this.width;
    this.scratch.height = this.height;
    this.context = this.scratch.getContext("2d", { willReadFrequently: true });
    this.pair = null;
    page.parts.d.replaceChildren(this.canvas);
  }

  /** Pixels of a video or picture as it stands. */
  grab(source) {
    this.context.drawImage(source, 0, 0, this.width, this.height);
    return this.context.getImageData(0, 0, this.width, this.height).data;
  }

  draw(a, b) {
    this.pair = [a, b];
    const gain = Number(this.page.parts.gain.value);
    const { data } = this.image;
    for (let i = 0; i < data.length; i += 4) {
      data[i] = gain * Math.abs(a[i] - b[i]);
      data[i + 1] = gain * Math.abs(a[i + 1] - b[i + 1]);
      data[i + 2] = gain * Math.abs(a[i + 2] - b[i + 2]);
      data[i + 3] = 255;
    }
    this.out.putImageData(this.image, 0, 0);
  }

  redraw() { if (this.pair) this.draw(...this.pair); }

  close() {
    // browsers keep the pixels of a canvas for long after it is gone
    for (const canvas of [this.canvas, this.scratch]) canvas.width = canvas.height = 0;
    this.canvas.remove();
    this.pair = this.image = null;
  }
}

/** Both videos in step, frame by frame. */
class VideoPair {
  constructor(page, chunk) {
    this.page = page;
    this.rate = page.told.frame_rate;
    this.life = new AbortController();
    this.difference = new Difference(page);
    this.rings = [new Map(), new Map()];
    this.frame = 0;
    this.wanted = null;
    const { signal } = this.life;
    this.videos = ["a", "b"].map((side, i) => {
      const { video } = page.told[side];
      const rest = video.status === "completed" ? "/content" : "/content?variant=partial";
      const element = h("video", { playsinline: true, preload: "auto", "aria-label": `Video ${side.toUpperCase()}`,
        tabindex: -1 });
      element.muted = true;
      element.addEventListener("seeked", () => { this.settle(); this.take(i, element.currentTime); }, { signal });
      element.addEventListener("loadeddata", () => this.take(i, element.currentTime), { signal });
      element.addEventListener("ended", () => this.pause(), { signal });
      element.addEventListener("play", () => this.tell(), { signal });
      element.addEventListener("pause", () => this.tell(), { signal });
      element.addEventListener("error", () => page.parts[side].replaceChildren(
        h("div", { class: "vkc-empty", role: "alert" }, "This browser cannot play the file; download it instead.")),
      { signal });
      element.src = videoPath(video.id, rest);
      page.parts[side].replaceChildren(element);
      return element;
    });
    this.handles = [0, 0];
    this.videos.forEach((element, i) => this.listen(element, i));
    if (chunk) this.toChunk(chunk);
    this.tell();
  }

  get last() {
    return Math.max(0, Math.min(this.page.told.a.video.frames, this.page.told.b.video.frames) - 1);
  }

  get chunk() { return this.page.chunkAt(this.frame); }

  get playing() { return !this.videos[0].paused; }

  grown() { this.tell(); }

  /** Be told of every frame that is shown. */
  listen(element, i) {
    if ("requestVideoFrameCallback" in element) {
      const shown = (now, { mediaTime }) => {
        if (this.life.signal.aborted) return;
        this.take(i, mediaTime);
        this.handles[i] = element.requestVideoFrameCallback(shown);
      };
      this.handles[i] = element.requestVideoFrameCallback(shown);
      return;
    }
    let before = -1;
    const look = () => {
      if (this.life.signal.aborted) return;
      if (element.currentTime !== before && !element.seeking && element.readyState >= 2) {
        before = element.currentTime;
        this.take(i, before);
      }
      this.handles[i] = requestAnimationFrame(look);
    };
    this.handles[i] = requestAnimationFrame(look);
  }

  /** A frame of one video stands there: draw the difference as soon as the other shows the same one. */
  take(i, second) {
    const element = this.videos?.[i];
    if (!element || element.readyState < 2) return;
    const frame = Math.min(this.last, Math.floor(second * this.rate + 1e-3));
    const ring = this.rings[i];
    ring.set(frame, this.difference.grab(element));
    while (ring.size > RING) ring.delete(ring.keys().next().value);
    const other = this.rings[1 - i].get(frame);
    if (other) this.difference.draw(...(i === 0 ? [ring.get(frame), other] : [other, ring.get(frame)]));
    if (i === 0) {
      this.frame = frame;
      if (frame >= this.last && this.playing) this.pause();
      this.tell();
    } else {
      this.keepStep();
    }
  }

  /** Let the second video hurry or wait until it shows what the first one does. */
  keepStep() {
    const [a, b] = this.videos;
    if (a.paused || a.seeking || b.seeking) { b.playbackRate = 1; return; }
    const behind = a.currentTime - b.currentTime;
    if (Math.abs(behind) > JUMP_S) b.currentTime = a.currentTime;
    else b.playbackRate = Math.abs(behind) > 0.25 / this.rate ? 1 + Math.max(-0.15, Math.min(0.15, 3 * behind)) : 1;
  }

  async toggle() {
    if (this.playing) { this.pause(); return; }
    if (this.frame >= this.last) this.seek(0);
    const [a, b] = this.videos;
    if (!a.seeking && !b.seeking) b.currentTime = a.currentTime;
    // an element that is being removed refuses to play
    await Promise.allSettled([a.play(), b.play()]);
  }

  pause() {
    for (const element of this.videos) element.pause();
    const [a, b] = this.videos;
    b.playbackRate = 1;
    const frame = Math.min(this.last, Math.floor(a.currentTime * this.rate + 1e-3));
    if (frame !== Math.floor(b.currentTime * this.rate + 1e-3)) this.seek(frame);
    this.tell();
  }

  seek(frame) {
    this.wanted = Math.max(0, Math.min(this.last, frame));
    this.frame = this.wanted;
    for (const ring of this.rings) ring.clear();
    this.settle();
    this.tell();
  }

  /** Go where the slider is by now, once both have come to where it was before. */
  settle() {
    if (this.wanted === null || this.videos.some((element) => element.seeking)) return;
    const second = (this.wanted + 0.5) / this.rate;
    this.wanted = null;
    for (const element of this.videos) element.currentTime = second;
  }

  step(frames) {
    if (this.playing) this.pause();
    this.seek(this.frame + frames);
  }

  toChunk(chunk) { this.seek(this.page.rows[chunk]?.first_frame ?? 0); }

  redraw() { this.difference.redraw(); }

  tell() {
    this.page.show({ position: this.frame, last: this.last, playing: this.playing, chunk: this.chunk,
      text: `${spoken(this.frame / this.rate)} of ${spoken((this.last + 1) / this.rate)} s` });
  }

  close() {
    this.life.abort();
    this.videos.forEach((element, i) => {
      if ("cancelVideoFrameCallback" in element) element.cancelVideoFrameCallback(this.handles[i]);
      else cancelAnimationFrame(this.handles[i]);
      element.pause();
      // without a source the decoder and its buffers are let go at once
      element.removeAttribute("src");
      element.load();
      element.remove();
    });
    for (const ring of this.rings) ring.clear();
    this.difference.close();
  }
}

/** The last picture of every chunk of both, while they are being made. */
class PicturePair {
  constructor(page) {
    this.page = page;
    this.life = new AbortController();
    this.difference = new Difference(page);
    this.position = 0;
    this.shown = null;
    this.follows = true;
    this.timer = null;
    this.pictures = ["a", "b"].map((side) =>
      h("img", { alt: `Video ${side.toUpperCase()}, last picture of a chunk`, hidden: true }));
    ["a", "b"].forEach((side, i) => {
      const empty = h("div", { class: "vkc-empty" }, hint(page.told[side].video));
      page.parts[side].replaceChildren(empty, this.pictures[i]);
    });
  }

  get last() { return Math.max(0, this.page.told.available - 1); }

  get chunk() { return this.position; }

  grown() {
    ["a", "b"].forEach((side) => {
      const empty = this.page.parts[side].querySelector(".vkc-empty");
      if (empty) empty.textContent = hint(this.page.told[side].video);
    });
    if (this.follows && !this.timer) this.position = this.last;
    this.load();
    this.tell();
  }

  /** The chunk of either side to show: until both have one, the newest there is. */
  wanted() {
    const { a, b, available } = this.page.told;
    return [a, b].map(({ video }) => (available ? this.position : video.chunks_done - 1));
  }

  async load() {
    const wanted = this.wanted();
    if (this.loading || this.shown === wanted.join()) return;
    this.loading = true;
    try {
      const loaded = await Promise.all(["a", "b"].map(async (side, i) => {
        if (wanted[i] < 0) return null;
        const picture = new Image();
        picture.src = videoPath(this.page.told[side].video.id, `/frame?chunk=${wanted[i]}`);
        await picture.decode();
        return picture;
      }));
      if (this.life.signal.aborted) return;
      loaded.forEach((picture, i) => {
        if (!picture) return;
        this.pictures[i].src = picture.src;
        this.pictures[i].hidden = false;
      });
      if (wanted[0] === wanted[1] && loaded[0]) this.difference.draw(...loaded.map((picture) => this.difference.grab(picture)));
    } catch {
      // a picture that has gone: the next one is tried when there is one
    } finally {
      this.loading = false;
      this.shown = wanted.join();
    }
    if (!this.life.signal.aborted && this.shown !== this.wanted().join()) this.load();
  }

  toggle() {
    if (this.timer) { this.halt(); return; }
    if (this.position >= this.last) this.position = 0;
    const row = this.page.rows[1] ?? this.page.rows[0];
    const every = 1000 * (row?.frames ?? this.page.told.frame_rate) / this.page.told.frame_rate;
    this.timer = setInterval(() => {
      if (this.position >= this.last) { this.halt(); return; }
      this.go(this.position + 1);
    }, every);
    this.go(this.position);
  }

  halt() {
    clearInterval(this.timer);
    this.timer = null;
    this.follows = this.position >= this.last;
    this.tell();
  }

  go(chunk) {
    this.position = Math.max(0, Math.min(this.last, chunk));
    this.load();
    this.tell();
  }

  seek(chunk) { this.go(chunk); this.follows = this.position >= this.last; }

  step(chunks) {
    if (this.timer) this.halt();
    this.seek(this.position + chunks);
  }

  toChunk(chunk) { this.seek(chunk); }

  redraw() { this.difference.redraw(); }

  tell() {
    const count = this.page.told.available;
    this.page.show({ position: this.position, last: this.last, playing: this.timer !== null, chunk: this.position,
      text: count ? `chunk ${this.position + 1} of ${count}` : "no chunk yet" });
  }

  close() {
    this.life.abort();
    clearInterval(this.timer);
    for (const picture of this.pictures) { picture.removeAttribute("src"); picture.remove(); }
    this.difference.close();
  }
}

function hint(video) {
  if (video.status === "queued") return video.place ? `In the queue, place ${video.place}` : "In the queue";
  if (video.status === "failed") return video.error?.message ?? "Failed";
  if (video.status === "cancelled") return "Stopped before its first chunk";
  return video.chunks_done ? "" : "The first chunk is being made";
}

function status(video) {
  const words = { queued: "in the queue", in_progress: `${video.chunks_done} of ${video.chunks}`, paused: "paused",
    completed: "finished", failed: "failed", cancelled: "stopped" };
  return words[video.status] ?? video.status;
}

/** Replace children only where they say something else: what is selected or read aloud stays. */
function set(parent, children) {
  const now = [...parent.children].map((child) => child.outerHTML).join("");
  if (now !== children.map((child) => child.outerHTML).join("")) parent.replaceChildren(...children);
}

function columns(rows) {
  const count = rows[0]?.length ?? 0;
  return Array.from({ length: count }, (_, i) => rows.map((row) => row[i]));
}

function extent(values) {
  return [values.reduce((x, y) => Math.min(x, y)), values.reduce((x, y) => Math.max(x, y))];
}

/** A line over chunks, with gaps where nothing is known; of many chunks the lowest of each few. */
function path(values, wide, y) {
  const step = Math.max(1, Math.ceil(values.length / POINTS));
  let drawn = "";
  let open = false;
  for (let i = 0; i < values.length; i += step) {
    const some = values.slice(i, i + step).filter((value) => value !== null && value !== undefined);
    if (!some.length) { open = false; continue; }
    const place = `${(100 * i / wide).toFixed(2)} ${y(Math.min(...some)).toFixed(2)}`;
    // of no length at first, so that a single point is a dot
    drawn += open ? `L${place}` : `M${place}h0`;
    open = true;
  }
  return drawn;
}

function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const done = () => { clearTimeout(timer); signal.removeEventListener("abort", done); resolve(); };
    const timer = setTimeout(done, milliseconds);
    signal.addEventListener("abort", done);
  });
}

/** Resolves once the page can be seen. */
function seen(signal) {
  return new Promise((resolve) => {
    const look = () => {
      if (document.hidden && !signal.aborted) return;
      document.removeEventListener("visibilitychange", look);
      signal.removeEventListener("abort", look);
      resolve();
    };
    document.addEventListener("visibilitychange", look);
    signal.addEventListener("abort", look);
    look();
  });
}

customElements.define("vidkv-compare", VidkvCompare);
