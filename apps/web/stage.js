/** `<vidkv-stage job="ID">`: one video while it is made and afterwards. It only shows and asks; the job is the server's. */

import {
  ENDED, STATUS, api, asked, bytes, button, chip, copy, duration, forgetRecent, h, icon, noteRecent, recentVideos,
  remember, svg, thinned, thumbnail, toast, videoPath,
} from "/page/kit.js";

const MOST_POINTS = 200;
const MOST_CELLS = 96;
const MOST_PAGES = 64;
const PLACES = { device: "on the device", host: "on the host", disk: "on disk" };
const POLL_MS = 1500;
/** Failed connections to the event stream before the page asks by itself. */
const PATIENCE = 3;
export const SWITCHES = [
  ["", "as the model does"],
  ["keep", "keep – flow on from what was seen"],
  ["recache", "recache – remember it under the new prompt"],
  ["lerp", "lerp – blend over a few chunks"],
  ["flush", "flush – forget and start a new scene"],
];

/** What chunks were like: at most `MOST_POINTS` of them are kept. */
export class Series {
  constructor() { this.points = []; this.known = 0; this.last = null; }

  add(entries, next) {
    for (const entry of entries) {
      const { chunk, second, fps, kv_bytes: kv, drift } = entry;
      this.points.push({ chunk, second, fps, kv, ...drift });
      this.last = entry;
    }
    this.known = next;
    if (this.points.length > MOST_POINTS) this.points = thinned(this.points, MOST_POINTS / 2);
  }
}

export class VidkvStage extends HTMLElement {
  static observedAttributes = ["job"];

  connectedCallback() {
    if (!this.parts) this.build();
    this.visibility = () => (document.hidden ? this.unfollow() : this.follow());
    document.addEventListener("visibilitychange", this.visibility);
    const id = this.getAttribute("job") || remember.get(sessionStorage, "job", null);
    if (id) this.open(id);
    else this.showEmpty();
  }

  disconnectedCallback() {
    document.removeEventListener("visibilitychange", this.visibility);
    this.leave();
  }

  attributeChangedCallback(name, old, id) {
    if (this.parts && id && id !== this.id_) this.open(id);
  }

  /** The video on the stage as the server last told it. */
  get video() { return this.video_ ?? null; }

  /** Put a video on the stage. */
  async open(id) {
    this.leave();
    Object.assign(this, { id_: id, video_: null, series: new Series(), preview: null, predicted: null, told: -1 });
    this.shown = { frame: -1, view: "live", announced: -1 };
    remember.set(sessionStorage, "job", id);
    this.dataset.state = "loading";
    this.parts.frame.removeAttribute("src");
    this.parts.timeline.replaceChildren();
    this.predict(id);
    try {
      this.take(await api("GET", videoPath(id)));
    } catch (error) {
      if (this.id_ !== id) return;
      if (error.status === 404) { forgetRecent(id); this.close(); return; }
      this.complain(error);
    }
    if (this.id_ === id) this.follow();
  }

  /** Nothing on the stage. The job goes on. */
  close() {
    this.leave();
    this.id_ = this.video_ = null;
    remember.set(sessionStorage, "job", null);
    this.showEmpty();
  }

  showEmpty() {
    this.dataset.state = "empty";
    this.showRecent();
    this.dispatchEvent(new CustomEvent("vidkv-video", { bubbles: true, detail: null }));
  }

  /** Videos that were opened in this browser, as long as the server has them. */
  async showRecent() {
    const place = this.querySelector(".vk-recent");
    place.replaceChildren();
    const mine = recentVideos();
    if (!mine.length) return;
    const { data } = await api("GET", "/v1/videos?limit=100").catch(() => ({ data: [] }));
    const videos = data.filter((video) => mine.includes(video.id)).slice(0, 4);
    if (!videos.length || this.dataset.state !== "empty") return;
    place.replaceChildren(h("h3", {}, "Go on where you were"), ...videos.map((video) =>
      h("button", { type: "button", class: "vk-recent-item", onclick: () => this.open(video.id) },
        thumbnail(video), h("span", {}, video.prompt), chip(video.status))));
  }

  leave() {
    this.unfollow();
    this.player?.detach();
    this.player = null;
    this.fetching?.abort();
    this.fetching = null;
    if (this.parts) {
      const { screen } = this.parts;
      screen.pause();
      screen.removeAttribute("src");
      screen.load();
      delete screen.dataset.ready;
    }
  }

  // ---------------------------------------------------------------- what the server tells

  follow() {
    if (!this.id_ || this.source || this.timer || document.hidden) return;
    if (this.video_ && ENDED.has(this.video_.status)) return;
    const id = this.id_;
    let failures = 0;
    const source = new EventSource(videoPath(id, "/events"));
    this.source = source;
    source.onmessage = (event) => { failures = 0; this.take(JSON.parse(event.data)); };
    source.addEventListener("deleted", () => this.close());
    source.onerror = () => {
      failures += 1;
      if (source.readyState === EventSource.CLOSED || failures >= PATIENCE) {
        source.close();
        if (this.source === source) { this.source = null; this.poll(); }
      }
    };
  }

  unfollow() {
    this.source?.close();
    clearTimeout(this.timer);
    this.source = this.timer = null;
  }

  /** The way without a stream: through proxies that hold it back, or when the server has too many. */
  poll() {
    const id = this.id_;
    if (!id || document.hidden || (this.video_ && ENDED.has(this.video_.status))) return;
    this.timer = setTimeout(async () => {
      try {
        const video = await api("GET", videoPath(id));
        if (this.id_ === id) this.take(video);
        this.complain(null);
      } catch (error) {
        if (this.id_ !== id) return;
        if (error.status === 404) { this.close(); return; }
        this.complain(error);
      }
      if (this.timer) this.poll();
    }, POLL_MS);
  }

  take(video) {
    if (video.id !== this.id_) return;
    const before = this.video_;
    this.video_ = video;
    this.dataset.state = video.status;
    if (!before) noteRecent(video.id);
    this.render();
    if (!before || before.chunks_done !== video.chunks_done || before.status !== video.status) {
      this.readLog();
      this.refreshPicture();
    }
    if (ENDED.has(video.status)) this.unfollow();
    else if (before && ENDED.has(before.status)) this.follow();
    this.dispatchEvent(new CustomEvent("vidkv-video", { bubbles: true, detail: video }));
  }

  async readLog() {
    if (this.fetching) { this.again = true; return; }
    const id = this.id_;
    const asking = (this.fetching = new AbortController());
    try {
      let answer;
      do {
        // a long log comes in pieces
        answer = await api("GET", videoPath(id, `/log?after=${this.series.known}`), undefined, asking.signal);
        if (this.fetching !== asking) return;
        this.series.add(answer.entries, answer.next);
      } while (answer.entries.length && this.series.last.chunk < this.video_.chunks_done - 1);
      this.renderLog();
    } catch { /* the next chunk asks again */ }
    if (this.fetching !== asking) return;
    this.fetching = null;
    if (this.again) { this.again = false; this.readLog(); }
  }

  /** What the KV cache was planned to take. */
  async predict(id) {
    try {
      const { request } = await api("GET", videoPath(id, "/settings"));
      const { id: _, ...rest } = request;
      const estimate = await api("POST", "/v1/estimate", rest);
      if (this.id_ === id) { this.predicted = estimate; this.renderLog(); }
    } catch { /* the panel shows what is used alone */ }
  }

  // ---------------------------------------------------------------- picture

  refreshPicture() {
    const { video_: video, parts } = this;
    if (!video.chunks_done && !ENDED.has(video.status)) return;
    if (this.preview === null && this.shown.frame !== video.chunks_done) {
      this.shown.frame = video.chunks_done;
      this.loadFrame(videoPath(video.id, `/frame?v=${video.chunks_done}`));
    }
    const finished = video.status === "completed";
    if (finished || (ENDED.has(video.status) && video.has_partial)) {
      const wanted = videoPath(video.id, finished ? "/content" : "/content?variant=partial");
      if (!this.player && parts.screen.getAttribute("src") !== wanted) this.showFile(wanted);
      else if (this.player) this.endLive(wanted);
    } else if (video.status !== "failed") {
      this.playLive();
    }
  }

  /** The next picture replaces the last when it has arrived, so that nothing flickers. */
  loadFrame(url) {
    const { frame } = this.parts;
    if (this.loading) { this.waiting = url; return; }
    const picture = new Image();
    this.loading = picture;
    const id = this.id_;
    picture.onload = picture.onerror = (event) => {
      this.loading = null;
      if (event.type === "load" && this.id_ === id) {
        frame.src = picture.src;
        frame.hidden = false;
      }
      const { waiting } = this;
      this.waiting = null;
      if (waiting) this.loadFrame(waiting);
    };
    picture.src = url;
  }

  async playLive() {
    const { video_: video, parts } = this;
    if (!this.player) {
      const id = video.id;
      this.player = { update() {}, detach() {} };
      const module = await import("/page/player.js").catch(() => null);
      if (!module || this.id_ !== id || !this.player) return;
      parts.screen.controls = true;
      this.player = new module.LivePlayer(parts.screen, { id, onState: ({ name }) => { this.dataset.player = name; } });
      await this.player.attach();
      if (this.id_ !== id) return;
      parts.screen.play().catch(() => { /* the picture stays */ });
    }
    this.player.update(this.video_.chunks_done, ENDED.has(this.video_.status));
  }

  /** The file takes over where the live stream was. */
  endLive(wanted) {
    const { screen } = this.parts;
    const at = screen.currentTime;
    this.player.update(this.video_.chunks_done, true);
    this.player.detach();
    this.player = null;
    this.showFile(wanted, at);
  }

  showFile(url, at = 0) {
    const { screen } = this.parts;
    delete screen.dataset.ready;
    screen.controls = true;
    screen.loop = true;
    screen.src = url;
    if (at > 0) screen.currentTime = at;
    screen.play().catch(() => { /* the button is there */ });
  }

  lookAt(chunk) {
    const most = (this.video_?.chunks_done ?? 0) - 1;
    if (most < 0) return;
    this.preview = Math.max(0, Math.min(most, chunk));
    this.loadFrame(videoPath(this.id_, `/frame?chunk=${this.preview}`));
    this.renderPreview();
  }

  lookAway() {
    this.preview = null;
    this.shown.frame = -1;
    this.renderPreview();
    this.refreshPicture();
  }

  // ---------------------------------------------------------------- what a person asks for

  async ask(path, body, done) {
    this.setAttribute("aria-busy", "true");
    try {
      const video = await api("POST", videoPath(this.id_, path), body);
      if (done) toast(done);
      return video;
    } catch (error) {
      toast(error.message, "error");
      return null;
    } finally {
      this.removeAttribute("aria-busy");
    }
  }

  async act(path, done, body) {
    const video = await this.ask(path, body, done);
    if (video) { this.take(video); this.follow(); }
  }

  stopAndKeep() { return this.act("/finish", "Stopping after this chunk; what is finished is kept"); }
  pause() { return this.act("/pause", "Pausing after this chunk"); }
  resume() { return this.act("/resume", "Going on"); }
  cancel() { return this.act("/cancel", "Stopped"); }
  retry() { return this.act("/retry", "Back in the queue"); }

  async extend() {
    const answer = await asked("Extend this video", "Extend", [
      { name: "more", label: "Seconds more", type: "number", value: "10", min: "0.5", max: "14400", step: "0.5", required: true,
        help: "A new video that goes on where this one ends; this one stays as it is." },
      { name: "prompt", label: "Prompt from there on (optional)", type: "textarea", value: "" },
      { name: "switch", label: "When the prompt changes", options: SWITCHES, value: "" },
    ]);
    if (answer) this.fork({ more_seconds: Number(answer.more) }, answer);
  }

  async branch(chunk = this.preview === null ? null : this.preview + 1) {
    const done = this.video_.chunks_done;
    const answer = await asked("Branch from here", "Branch", [
      { name: "chunk", label: `Chunks to take over, of ${done}`, type: "number", value: String(chunk ?? done), min: "1",
        max: String(done), step: "1", required: true, help: "A new video with the same beginning; this one stays as it is." },
      { name: "prompt", label: "Prompt from there on", type: "textarea", value: this.promptNow() },
      { name: "switch", label: "When the prompt changes", options: SWITCHES, value: "" },
      { name: "more", label: "Seconds from there", type: "number", value: "10", min: "0.5", max: "14400", step: "0.5", required: true },
    ]);
    if (!answer) return;
    this.fork({ chunk: Number(answer.chunk), more_seconds: Number(answer.more) }, answer);
  }

  async fork(body, answer) {
    if (answer.prompt.trim() && answer.prompt.trim() !== this.promptNow()) body.prompt = answer.prompt.trim();
    if (answer.switch) body.switch = answer.switch;
    const video = await this.ask("/branch", body, "A new video goes on from there");
    if (video) this.open(video.id);
  }

  async changePrompt(event) {
    event.preventDefault();
    const { text, how } = this.parts;
    const body = { prompt: text.value.trim() };
    if (!body.prompt) { text.focus(); return; }
    if (how.value) body.switch = how.value;
    this.parts.promptFault.textContent = "";
    try {
      this.take(await api("POST", videoPath(this.id_, "/prompt"), body));
      text.value = "";
      toast("The new prompt takes over with the next chunk");
    } catch (error) {
      this.parts.promptFault.textContent = error.message;
    }
  }

  async copySettings(kind) {
    try {
      const settings = await api("GET", videoPath(this.id_, "/settings"));
      const [text, what] = {
        python: [settings.python, "Python"], cli: [settings.cli, "The command"],
        settings: [JSON.stringify(settings.settings, null, 2), "The settings"],
      }[kind];
      await copy(text, what);
    } catch (error) {
      toast(error.message, "error");
    }
  }

  reuse() {
    document.dispatchEvent(new CustomEvent("vidkv-reuse", { detail: this.id_ }));
  }

  promptNow() {
    const { video_: video, series } = this;
    if (!video) return "";
    if (series.last?.prompt && !ENDED.has(video.status)) return series.last.prompt;
    const told = series.last ? video.schedule.filter(([second]) => second <= series.last.second) : [];
    return told.at(-1)?.[1] ?? video.prompt;
  }

  // ---------------------------------------------------------------- drawing

  build() {
    const parts = (this.parts = {});
    parts.screen = h("video", { muted: true, playsinline: true, class: "vk-screen", "aria-label": "The video" });
    parts.screen.muted = true;
    parts.screen.addEventListener("loadeddata", () => { parts.screen.dataset.ready = ""; });
    parts.screen.addEventListener("emptied", () => { delete parts.screen.dataset.ready; });
    parts.frame = h("img", { class: "vk-frame", alt: "Latest frame of the video", hidden: true });
    parts.previewText = h("span", {});
    parts.preview = h("div", { class: "vk-preview", hidden: true }, parts.previewText,
      button("Branch from here", "branch", () => this.branch(), { class: "small", "data-act": "branch-here" }),
      button("Back", "close", () => this.lookAway(), { class: "small ghost" }));
    parts.views = h("div", { class: "vk-views", role: "group", "aria-label": "View" },
      ["live", "frame"].map((view) => h("button", { type: "button", "data-view": view, "aria-pressed": String(view === "live"),
        onclick: () => this.setView(view) }, view === "live" ? "Playback" : "Latest frame")));
    parts.wait = h("div", { class: "vk-wait" }, h("span", { class: "vk-pulse", "aria-hidden": "true" }), h("span", {}));
    const picture = h("div", { class: "vk-picture" }, parts.frame, parts.screen, parts.wait, parts.views, parts.preview);

    parts.title = h("h2", { class: "vk-title" });
    parts.chip = h("span", {});
    parts.facts = h("p", { class: "vk-facts" });
    parts.fault = h("p", { class: "vk-fault", role: "alert" });
    parts.bar = h("div", { class: "vk-bar", role: "progressbar", "aria-valuemin": "0", "aria-valuemax": "100", "aria-label": "Progress" },
      h("i", {}));
    parts.numbers = h("dl", { class: "vk-numbers" });
    parts.live = h("p", { class: "vk-offscreen", role: "status", "aria-live": "polite" });
    parts.timeline = h("div", { class: "vk-timeline", role: "slider", tabindex: "0", "aria-label": "Chunks of the video",
      "aria-valuemin": "0", onclick: (event) => this.pickChunk(event), onkeydown: (event) => this.steerChunk(event) });
    parts.ruler = h("div", { class: "vk-ruler", "aria-hidden": "true" });
    parts.buttons = h("div", { class: "vk-row vk-buttons" });

    parts.prompt = h("p", { class: "vk-now" });
    parts.later = h("ol", { class: "vk-later" });
    parts.text = h("textarea", { rows: 2, id: "vk-new-prompt", placeholder: "What should happen from now on?" });
    parts.how = h("select", { id: "vk-switch", title: "What becomes of the history" },
      SWITCHES.map(([value, text]) => h("option", { value }, text)));
    parts.promptFault = h("p", { class: "vk-fault", role: "alert" });
    parts.promptForm = h("form", { class: "vk-form", onsubmit: (event) => this.changePrompt(event) },
      h("label", { for: "vk-new-prompt" }, "Change the prompt now"), parts.text,
      h("div", { class: "vk-row" }, h("label", { for: "vk-switch", class: "vk-offscreen" }, "What becomes of the history"), parts.how,
        h("button", { type: "submit", class: "vk-button primary", "data-act": "prompt" }, "Change")),
      parts.promptFault);
    parts.text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) parts.promptForm.requestSubmit();
    });

    parts.pages = h("div", { class: "vk-pages", role: "img" });
    parts.mass = h("div", { class: "vk-mass", role: "img", "aria-label": "Attention per page", hidden: true });
    parts.cacheText = h("p", { class: "vk-small" });
    parts.cacheBytes = h("dl", { class: "vk-numbers" });
    parts.drift = h("div", { class: "vk-plot" });
    parts.driftText = h("p", { class: "vk-small" });

    this.append(
      h("div", { class: "vk-empty" }, emptyPicture(), h("h2", {}, "Your video appears here"),
        h("p", {}, "Describe a scene and press Generate. The first frames come within seconds, and you can change " +
          "the prompt while it runs. Closing this page never stops a video."),
        h("div", { class: "vk-recent" })),
      h("div", { class: "vk-stage" },
        h("header", { class: "vk-head" }, h("div", {}, parts.title, parts.facts), parts.chip,
          h("button", { type: "button", class: "vk-button ghost icon", title: "Clear the stage; the video stays in the gallery",
            "aria-label": "Clear the stage", onclick: () => this.close() }, icon("close"))),
        parts.fault,
        h("div", { class: "vk-grid" },
          h("div", { class: "vk-left" }, picture, parts.bar, parts.numbers, parts.timeline, parts.ruler, parts.buttons, parts.live),
          h("div", { class: "vk-right" },
            card("Prompt", parts.prompt, parts.later, parts.promptForm),
            card("KV cache", parts.pages, parts.mass, legend(), parts.cacheText, parts.cacheBytes),
            card("Drift", parts.drift, parts.driftText)))));
  }

  setView(view) {
    this.shown.view = view;
    this.dataset.view = view;
    for (const item of this.parts.views.children) item.setAttribute("aria-pressed", String(item.dataset.view === view));
    if (view === "frame" && this.preview !== null) this.lookAway();
  }

  render() {
    const { video_: video, parts } = this;
    const [width, height] = (video.size ?? "1x1").split("x").map(Number);
    this.style.setProperty("--ratio", `${width} / ${height}`);
    this.toggleAttribute("data-small", width <= 256);
    parts.title.textContent = video.prompt;
    parts.title.title = video.prompt;
    parts.chip.replaceChildren(chip(video.status));
    const rate = video.frame_rate ?? null;
    const length = video.status === "completed" ? duration(video.frames / (rate || 1))
      : video.until_stopped ? "until stopped" : duration(Number(video.seconds));
    parts.facts.textContent = [video.id, video.model, video.size, length, rate && `${rate} fps`,
      video.seed !== undefined && `seed ${video.seed}`, video.parent && `branched from ${video.parent.id} at chunk ${video.parent.chunk}`]
      .filter(Boolean).join(" · ");
    const ended = ENDED.has(video.status);
    parts.fault.textContent = video.error ? `${video.error.message}` : "";
    parts.bar.firstChild.style.inlineSize = `${video.progress}%`;
    parts.bar.setAttribute("aria-valuenow", video.progress);
    parts.bar.toggleAttribute("data-endless", Boolean(video.until_stopped) && !ended);

    const waiting = video.status === "queued"
      ? (video.place > 1 ? `In the queue, place ${video.place}` : "Next in the queue")
      : video.chunks_done ? "" : { in_progress: "Loading the model and making the first chunk", paused: "Paused" }[video.status] ?? "";
    parts.wait.lastChild.textContent = waiting;
    parts.wait.hidden = !waiting;
    const made = rate ? video.frames / rate : null;
    numbers(parts.numbers, [
      ["Made", made === null ? `${video.frames} frames` : duration(made)],
      ["Speed", video.fps ? `${video.fps.toFixed(1)} fps` : "–"],
      [ended ? "Took" : "Left", ended ? duration(video.completed_at - video.created_at)
        : video.until_stopped ? "until you stop" : duration(video.eta_s)],
      ["Chunks", video.until_stopped || video.status === "completed" ? `${video.chunks_done}` : `${video.chunks_done} of ${video.chunks}`],
    ]);
    this.announce(video);
    this.renderTimeline();
    this.renderButtons();
    this.renderPrompt();
    this.renderPreview();
  }

  /** To a screen reader at tenths, not at every chunk. */
  announce(video) {
    const tenth = `${video.status}${Math.floor(video.progress / 10)}`;
    if (tenth === this.shown.announced) return;
    this.shown.announced = tenth;
    const left = video.eta_s ? `, ${duration(video.eta_s)} left` : "";
    this.parts.live.textContent = `${STATUS[video.status]}, ${video.progress} percent${left}`;
  }

  renderButtons() {
    const { video_: video, parts } = this;
    const kept = video.keep !== false && video.chunks_done > 0;
    const key = [video.status, kept, video.has_partial].join();
    if (this.told === key) return;
    this.told = key;
    const all = [];
    const add = (act, label, symbol, run, attributes = {}) => all.push(button(label, symbol, run, { "data-act": act, ...attributes }));
    if (["in_progress", "paused"].includes(video.status)) {
      add("finish", "Stop and keep", "stop", () => this.stopAndKeep(), { class: "primary", title: "Finish with what is there (S)" });
    }
    if (["in_progress", "queued"].includes(video.status)) add("pause", "Pause", "pause", () => this.pause(), { title: "P" });
    if (video.status === "paused") add("resume", "Resume", "play", () => this.resume(), { title: "P" });
    if (video.status === "queued") add("cancel", "Take out of the queue", "close", () => this.cancel());
    if (["failed", "cancelled"].includes(video.status)) {
      add("retry", "Go on with it", "retry", () => this.retry(), { class: "primary" });
    }
    if (video.status === "completed" && kept) {
      add("extend", "Extend", "extend", () => this.extend(), { class: "primary", title: "Make it longer (E)" });
    }
    if (kept) add("branch", "Branch", "branch", () => this.branch(), { title: "Another ending from any chunk (B)" });
    if (video.status === "completed" || (ENDED.has(video.status) && video.has_partial)) {
      const variant = video.status === "completed" ? "" : "?variant=partial";
      all.push(h("a", { class: "vk-button", "data-act": "download", href: videoPath(video.id, `/content${variant}`),
        download: `${video.id}.mp4` }, icon("download"), h("span", {}, "Download")));
    }
    add("reuse", "Reuse settings", "reuse", () => this.reuse(), { class: "ghost" });
    const menu = h("details", { class: "vk-menu" },
      h("summary", { class: "vk-button ghost" }, icon("copy"), h("span", {}, "Copy")),
      h("div", { class: "vk-menu-items" },
        [["settings", "Copy settings"], ["python", "Copy as Python"], ["cli", "Copy as command"]].map(([kind, label]) =>
          h("button", { type: "button", "data-act": `copy-${kind}`,
            onclick: () => { menu.open = false; this.copySettings(kind); } }, label))));
    all.push(menu);
    parts.buttons.replaceChildren(...all);
  }

  renderTimeline() {
    const { video_: video, parts } = this;
    const endless = video.until_stopped && !ENDED.has(video.status);
    const most = video.status === "completed" ? video.chunks_done : endless ? video.chunks_done + 4 : video.chunks;
    const total = Math.max(1, most);
    const cells = Math.min(total, MOST_CELLS);
    while (parts.timeline.children.length > cells) parts.timeline.lastChild.remove();
    while (parts.timeline.children.length < cells) parts.timeline.append(h("i", {}));
    const running = video.status === "in_progress" ? video.chunks_done : -1;
    const seconds = this.secondsPerChunk();
    const turns = video.schedule.map(([second]) => Math.floor(second / seconds));
    for (let cell = 0; cell < cells; cell += 1) {
      const [from, to] = [Math.floor((cell * total) / cells), Math.floor(((cell + 1) * total) / cells)];
      const state = from < video.chunks_done ? "done" : from <= running && running < to ? "now" : "open";
      const element = parts.timeline.children[cell];
      if (element.dataset.state !== state) element.dataset.state = state;
      element.toggleAttribute("data-turn", turns.some((chunk) => from <= chunk && chunk < to));
      element.toggleAttribute("data-chosen", this.preview !== null && from <= this.preview && this.preview < to);
    }
    this.total = total;
    parts.timeline.setAttribute("aria-valuemax", Math.max(0, video.chunks_done - 1));
    parts.timeline.setAttribute("aria-valuenow", this.preview ?? Math.max(0, video.chunks_done - 1));
    parts.timeline.setAttribute("aria-valuetext", this.preview === null ? "latest chunk" : `chunk ${this.preview}`);
    const length = total * seconds;
    parts.ruler.replaceChildren(...[0, 0.25, 0.5, 0.75, 1].map((part) => h("span", {}, duration(part * length))));
  }

  secondsPerChunk() {
    const { video_: video } = this;
    if (video.frame_rate && video.chunks_done) return video.frames / video.frame_rate / video.chunks_done;
    return Number(video.seconds) / Math.max(1, video.chunks) || 0.75;
  }

  pickChunk(event) {
    const box = this.parts.timeline.getBoundingClientRect();
    const chunk = Math.floor(((event.clientX - box.left) / box.width) * this.total);
    if (chunk < (this.video_?.chunks_done ?? 0)) this.lookAt(chunk);
  }

  steerChunk(event) {
    const now = this.preview ?? (this.video_?.chunks_done ?? 1) - 1;
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: Infinity }[event.key];
    if (event.key === "Escape") this.lookAway();
    else if (to === Infinity) this.lookAway();
    else if (to !== undefined) this.lookAt(to);
    else return;
    event.preventDefault();
  }

  renderPreview() {
    const { parts, preview } = this;
    parts.preview.hidden = preview === null;
    this.toggleAttribute("data-preview", preview !== null);
    if (preview !== null) {
      parts.previewText.textContent = `Chunk ${preview} · ends at ${duration((preview + 1) * this.secondsPerChunk())}`;
    }
    const branch = parts.preview.querySelector("[data-act=branch-here]");
    branch.hidden = this.video_?.keep === false;
    if (this.video_) {
      for (const cell of parts.timeline.children) cell.removeAttribute("data-chosen");
      if (preview !== null) {
        parts.timeline.children[Math.floor((preview * parts.timeline.children.length) / this.total)]?.setAttribute("data-chosen", "");
      }
    }
  }

  renderPrompt() {
    const { video_: video, parts } = this;
    parts.prompt.textContent = this.promptNow();
    const rows = video.schedule.length ? [[0, video.prompt, null], ...video.schedule] : [];
    const known = rows.map((row) => row.join()).join(";");
    if (this.scheduleShown !== known) {
      this.scheduleShown = known;
      parts.later.replaceChildren(...rows.map(([second, prompt, how]) =>
        h("li", {}, h("b", {}, duration(second)), h("span", {}, prompt), how ? h("em", {}, how) : null)));
    }
    parts.promptForm.hidden = ENDED.has(video.status);
  }

  renderLog() {
    const { parts, series } = this;
    const entry = series.last;
    if (this.video_) this.renderPrompt();
    if (!entry) {
      parts.pages.replaceChildren();
      parts.cacheText.textContent = this.video_ && ENDED.has(this.video_.status)
        ? "No log was kept of this video." : "Pages appear with the first chunk.";
      numbers(parts.cacheBytes, [["Planned", bytes(this.predicted?.kv_bytes)]]);
      parts.drift.replaceChildren();
      parts.driftText.textContent = "";
      return;
    }
    this.renderPages(entry);
    this.renderDrift();
  }

  renderPages(entry) {
    const { parts } = this;
    const sinks = new Set(entry.sinks ?? []);
    const resident = entry.resident ?? [];
    const shown = resident.length > MOST_PAGES
      ? [...resident.slice(0, sinks.size), ...resident.slice(sinks.size - MOST_PAGES)] : resident;
    const newest = entry.frames && resident.length ? newestOf(resident) : new Set();
    const formats = new Map(resident.map((frame, i) => [frame, entry.formats?.[i] ?? entry.format]));
    const tiers = new Map(resident.map((frame, i) => [frame, entry.tiers?.[i] ?? "device"]));
    const where = (frame) => (entry.tiers ? `, ${PLACES[tiers.get(frame)]}` : "");
    parts.pages.replaceChildren(
      ...shown.map((frame) => h("i", { "data-kind": sinks.has(frame) ? "sink" : newest.has(frame) ? "new" : "window",
        "data-tier": tiers.get(frame), title: `latent frame ${frame}, ${formats.get(frame)}${where(frame)}` })),
      ...(entry.evicted ?? []).slice(-6).map((frame) => h("i", { "data-kind": "gone", title: `latent frame ${frame} has left` })));
    const kinds = [...new Set(formats.values())].map((kind) => [kind, resident.filter((frame) => formats.get(frame) === kind).length]);
    const places = Object.entries(PLACES).map(([tier, name]) => [name, resident.filter((frame) => tiers.get(frame) === tier).length]);
    const lie = entry.tiers ? `; ${places.filter(([, count]) => count).map(([name, count]) => `${count} ${name}`).join(", ")}` : "";
    const held = (kinds.length > 1 ? kinds.map(([kind, count]) => `${count} in ${kind}`).join(", ") : `as ${entry.format}`) + lie;
    const span = resident.length ? `${resident.length} latent frames, ${held}` : "empty";
    parts.pages.setAttribute("aria-label", `${span}, ${sinks.size} of them sinks`);
    const gone = entry.evicted ?? [];
    parts.cacheText.textContent = `${sinks.size} sinks and ${resident.length - sinks.size} other frames, ${held}. ` +
      (gone.length ? `Frame${gone.length > 1 ? "s" : ""} ${range(gone)} left with this chunk: the window is full.`
        : "Nothing had to leave yet.");
    parts.mass.hidden = !entry.mass;
    if (entry.mass) {
      const most = Math.max(...entry.mass, 1e-9);
      const shares = new Map(resident.map((frame, i) => [frame, entry.mass[i]]));
      parts.mass.replaceChildren(...shown.map((frame) => h("i", { style: `opacity:${(0.08 + (0.92 * shares.get(frame)) / most).toFixed(3)}`,
        title: `latent frame ${frame}: ${(100 * shares.get(frame)).toFixed(1)} % of the attention` })));
    }
    numbers(parts.cacheBytes, [
      ["Used", bytes(entry.kv_bytes)],
      ["Planned", bytes(this.predicted?.kv_bytes)],
      ["Per frame", bytes(entry.bytes_per_frame)],
      ...(entry.kv_host_bytes ? [["On the host", bytes(entry.kv_host_bytes)]] : []),
      ...(entry.kv_disk_bytes ? [["On disk", bytes(entry.kv_disk_bytes)]] : []),
      ["Process", bytes(entry.rss_bytes)],
    ]);
  }

  renderDrift() {
    const { parts, series } = this;
    const { points } = series;
    const names = ["luma", "saturation", "contrast"].filter((name) => points.some((point) => Number.isFinite(point[name])));
    const last = points.at(-1);
    parts.driftText.textContent = names.length
      ? `Against the first chunk, in percent of full scale: ${names.map((name) => `${name} ${signed(last[name])}`).join(", ")}` : "";
    if (points.length < 2 || !names.length) { parts.drift.replaceChildren(); return; }
    const values = points.flatMap((point) => names.map((name) => point[name])).filter(Number.isFinite);
    const most = Math.max(2, ...values.map(Math.abs));
    const at = (point, name) => [
      (300 * (point.chunk - points[0].chunk)) / Math.max(1, last.chunk - points[0].chunk), 30 - (26 * point[name]) / most];
    const drawing = svg("svg", { viewBox: "0 0 300 60", preserveAspectRatio: "none", role: "img",
      "aria-label": `Drift over ${points.length} points` }, svg("line", { x1: 0, x2: 300, y1: 30, y2: 30, class: "zero" }));
    for (const name of names) {
      const line = points.filter((point) => Number.isFinite(point[name])).map((point) => at(point, name).map((v) => v.toFixed(1)).join()).join(" ");
      drawing.append(svg("polyline", { points: line, class: name }));
    }
    parts.drift.replaceChildren(drawing, h("div", { class: "vk-legend" }, names.map((name) => h("span", { class: name }, name))));
  }

  complain(error) {
    this.parts.fault.textContent = error ? error.message : this.video_?.error?.message ?? "";
  }
}

function card(title, ...children) {
  return h("section", { class: "vk-card", "aria-label": title }, h("h3", {}, title), children);
}

function legend() {
  return h("div", { class: "vk-legend" }, [["sink", "sinks, kept for good"], ["window", "window"], ["new", "newest chunk"], ["gone", "has left"]]
    .map(([kind, text]) => h("span", { "data-kind": kind }, text)));
}

function numbers(list, rows) {
  if (list.children.length !== rows.length) list.replaceChildren(...rows.map(() => h("div", {}, h("dt", {}), h("dd", {}))));
  rows.forEach(([name, value], i) => {
    const [term, text] = list.children[i].children;
    if (term.textContent !== name) term.textContent = name;
    if (text.textContent !== value) text.textContent = value;
  });
}

/** Latent frames of the last chunk: those at the end without a gap, at most three. */
function newestOf(resident) {
  return new Set(resident.slice(-3).filter((frame, i, all) => frame > all.at(-1) - 3));
}

function range(frames) {
  const [first, last] = [frames[0], frames.at(-1)];
  return frames.length === 1 ? `${first}` : last - first === frames.length - 1 ? `${first}–${last}` : frames.join(", ");
}

function signed(value) {
  return Number.isFinite(value) ? `${value > 0 ? "+" : ""}${value.toFixed(1)}` : "–";
}

/** A picture of what is about to happen: pages of a cache, one after the other. */
function emptyPicture() {
  const drawing = svg("svg", { viewBox: "0 0 240 96", class: "vk-empty-picture", "aria-hidden": "true" });
  for (let i = 0; i < 7; i += 1) {
    drawing.append(svg("rect", { x: 8 + 32 * i, y: 20, width: 26, height: 56, rx: 5, class: i < 1 ? "sink" : i > 5 ? "new" : "window",
      style: `animation-delay:${0.18 * i}s` }));
  }
  drawing.append(svg("circle", { cx: 21, cy: 60, r: 7, class: "ball" }));
  return drawing;
}

customElements.define("vidkv-stage", VidkvStage);
