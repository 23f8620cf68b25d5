// Plays a video while it is made: appends finished chunks to a <video> as they come, and holds only what lies
// around the playhead, however long the video gets.
//
//   const player = new LivePlayer(video, { id: "fox", onState: (state) => show(state.name) });
//   player.attach();
//   player.update(12, false);   // whenever chunks_done or the end has changed
//   player.detach();
//
// Seconds throughout, except where a name says frames.

const AHEAD = 30; // fetched before the playhead
const BEHIND = 60; // kept behind it
const FAR = 30; // behind the newest frame: who watches and has not gone back himself is taken along
const NEAR = 5; // to the newest frame: whoever goes there wants to be taken along
const PATIENCE_MS = 20_000; // of one request
const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 8_000;
const REBUILDS = 3; // after errors of the decoder, without a chunk in between that plays
const HLS = "application/vnd.apple.mpegurl";

/**
 * What `onState` is told, whenever it has changed.
 * @typedef {object} PlayerState
 * @property {"idle"|"loading"|"playing"|"waiting"|"paused"|"blocked"|"ended"|"error"|"unsupported"} name
 *   idle: nothing is finished yet; waiting: everything that is finished was shown; blocked: the browser wants
 *   a click before it plays.
 * @property {string|null} message what is wrong, in words for people
 */

export class LivePlayer {
  #video;
  #base;
  #onState;
  #chunks = 0;
  #ended = false;
  #attached = null; // everything that belongs to one attach()
  #told = "";

  /**
   * @param {HTMLVideoElement} video
   * @param {{id: string, onState?: (state: PlayerState) => void}} options
   */
  constructor(video, { id, onState = () => {} }) {
    this.#video = video;
    this.#base = `/v1/videos/${encodeURIComponent(id)}`;
    this.#onState = onState;
  }

  /** Begin; shows something as soon as there is a chunk. */
  attach() {
    if (this.#attached) return;
    const session = (this.#attached = new Session());
    const video = this.#video;
    video.muted = true;
    video.playsInline = true;
    for (const name of ["playing", "waiting", "pause", "ended", "seeking", "timeupdate", "play", "error"]) {
      session.listen(video, name, () => this.#noticed(session, name));
    }
    // a tab that slept has work to do
    session.listen(document, "visibilitychange", () => session.wake());
    this.#tell("idle");
    this.#run(session).catch((error) => {
      if (!session.over) this.#tell("error", String(error?.message ?? error));
    });
  }

  /**
   * Say how far the video is.
   * @param {number} chunksDone
   * @param {boolean} ended whether there will be no more
   */
  update(chunksDone, ended) {
    const session = this.#attached;
    if (session && this.#ended && !ended) session.reopened = this.#video.ended;
    this.#chunks = Math.max(0, Math.floor(Number(chunksDone) || 0));
    this.#ended = Boolean(ended);
    session?.hurry();
    session?.wake();
  }

  /** Go to the newest frame, and stay with it. */
  follow() {
    const session = this.#attached;
    if (!session?.timeline || !session.buffer) return;
    session.following = true;
    this.#jump(session, session.timeline.begin(Math.max(0, this.#chunks - 2)));
    this.#play(session);
    session.wake();
  }

  /** Let go of everything; the element can be used for something else, or attached to again. */
  detach() {
    const session = this.#attached;
    if (!session) return;
    this.#attached = null;
    session.end();
    this.#video.pause();
    this.#video.removeAttribute("src");
    this.#video.load();
    this.#told = "";
  }

  // ---------------------------------------------------------------- states

  #tell(name, message = null) {
    const told = `${name} ${message}`;
    if (told === this.#told) return;
    this.#told = told;
    try {
      this.#onState({ name, message });
    } catch (error) {
      console.error(error);
    }
  }

  #noticed(session, name) {
    const video = this.#video;
    if (name === "error") {
      session.broken = true;
    } else if (name === "pause") {
      // who pauses wants to go on from there, not from the newest frame
      // a source that fails or is replaced pauses, too
      if (!video.ended && !video.error && video.readyState > 0) {
        session.following = false;
        this.#tell("paused");
      }
    } else if (name === "play") {
      session.following ||= this.#behind(session) < NEAR;
    } else if (name === "playing") {
      this.#tell("playing");
    } else if (name === "waiting") {
      this.#tell(this.#atEnd(session) ? "waiting" : "loading");
    } else if (name === "ended") {
      this.#tell("ended");
    } else if (name === "seeking") {
      const own = Math.abs(video.currentTime - session.jumped) < 1e-3;
      session.jumped = NaN;
      if (!own) session.following = this.#behind(session) < NEAR;
      session.hurry();
    }
    session.wake();
  }

  #behind(session) {
    return session.timeline ? session.timeline.end(this.#chunks) - this.#video.currentTime : 0;
  }

  #atEnd(session) {
    const { timeline } = session;
    if (!timeline) return !this.#ended;
    return timeline.chunkAt(this.#video.currentTime + 0.1) >= this.#chunks;
  }

  // ---------------------------------------------------------------- the one loop

  /** Everything that is done to the media happens here, one step after the other. */
  async #run(session) {
    while (!session.over && !this.#chunks) await session.woken();
    if (session.over) return;
    this.#tell("loading");
    const Source = window.ManagedMediaSource ?? window.MediaSource;
    const beginning = Source ? await this.#persist(session, "/live/init.mp4") : null;
    if (session.over) return;
    if (!beginning || !Source.isTypeSupported(beginning.type)) return this.#playNatively(session);
    let rebuilds = 0;
    let worst = -1; // the furthest chunk that failed
    let from = this.#start(session);
    while (!session.over) {
      try {
        await this.#feed(session, Source, beginning, from);
      } catch (error) {
        if (session.over) return;
        rebuilds = session.last > worst ? 1 : rebuilds + 1;
        worst = Math.max(worst, session.last);
        if (rebuilds > REBUILDS) {
          const message = this.#video.error?.message || String(error?.message ?? error);
          this.#tell("error", `the browser cannot play this video: ${message}`);
          return;
        }
        from = this.#video.currentTime || from;
        session.close();
        await session.pause(FIRST_RETRY_MS * rebuilds);
      }
    }
  }

  /** Where to begin: a long video that is still being made, near its newest frame. */
  #start(session) {
    const { timeline } = session;
    const far = !this.#ended && timeline.end(this.#chunks) > FAR;
    return far ? timeline.begin(Math.max(0, this.#chunks - 2)) : 0;
  }

  async #feed(session, Source, beginning, from) {
    const video = this.#video;
    session.broken = false;
    const media = (session.media = new Source());
    const opened = session.event(media, "sourceopen");
    for (const name of ["startstreaming", "endstreaming"]) session.listen(media, name, () => session.wake());
    // without it some browsers refuse a source that they manage
    if (Source === window.ManagedMediaSource) video.disableRemotePlayback = true;
    const url = URL.createObjectURL(media);
    video.src = url;
    try {
      await opened;
    } finally {
      URL.revokeObjectURL(url);
    }
    const buffer = (session.buffer = media.addSourceBuffer(beginning.type));
    buffer.mode = "segments";
    await this.#change(session, () => buffer.appendBuffer(beginning.data));
    this.#stretch(session);
    if (from > 0) this.#jump(session, from);
    let started = false;
    let repeats = 0;
    session.last = -1;
    while (!session.over) {
      if (session.broken) throw new Error("playback has failed");
      await this.#trim(session);
      this.#stretch(session);
      this.#follow(session);
      const chunk = this.#wanted(session);
      if (chunk === null) {
        await session.woken();
        continue;
      }
      repeats = chunk === session.last ? repeats + 1 : 0;
      session.last = chunk;
      // appended, and yet not there
      if (repeats > 2) throw new Error(`chunk ${chunk} cannot be decoded`);
      const fragment = await this.#persist(session, `/live/${chunk}.m4s`, () => this.#wanted(session) === chunk);
      if (!fragment) {
        session.last = -1;
        continue;
      }
      await this.#append(session, fragment.data);
      this.#stretch(session);
      if (!started || session.reopened) {
        started = true;
        session.reopened = false;
        this.#play(session);
      }
    }
  }

  #play(session) {
    // rejected where the browser wants a click first, or when the source has changed meanwhile
    this.#video.play()?.catch((error) => {
      if (!session.over && error?.name === "NotAllowedError") this.#tell("blocked");
    });
  }

  /** The chunk that is missing next, seen from the playhead; null: nothing to do now. */
  #wanted(session) {
    const { timeline, media } = session;
    const time = this.#video.currentTime;
    const edge = contiguous(session.buffer, time, timeline.frame);
    const chunk = timeline.chunkAt(edge);
    if (chunk >= this.#chunks) {
      this.#finish(session);
      return null;
    }
    // a source that the browser manages says when it wants more, but never that it wants nothing at all
    const full = media.streaming === false && edge > time + timeline.frame;
    return full || edge - time > AHEAD ? null : chunk;
  }

  /** Everything is there up to the end: say so, so that playback ends instead of waiting. */
  #finish(session) {
    const { media, buffer } = session;
    if (!this.#ended || !this.#chunks || media.readyState !== "open" || buffer.updating) return;
    if (!buffer.buffered.length) return;
    media.endOfStream();
  }

  /** Drop what lies far from the playhead, in whole chunks: pictures cannot be decoded without those before. */
  async #trim(session) {
    const { buffer, timeline } = session;
    const time = this.#video.currentTime;
    const { length } = buffer.buffered;
    if (!length) return;
    const keep = timeline.begin(timeline.chunkAt(Math.max(0, time - BEHIND)));
    if (buffer.buffered.start(0) < keep - timeline.frame) {
      await this.#change(session, () => buffer.remove(0, keep));
    }
    const most = timeline.begin(timeline.chunkAt(time + AHEAD) + 2);
    const ranges = buffer.buffered;
    if (ranges.length && ranges.end(ranges.length - 1) > most + timeline.frame) {
      await this.#change(session, () => buffer.remove(most, Infinity));
    }
  }

  /** The element's duration: all that is finished, and room for the next chunk, or it would end there. */
  #stretch(session) {
    const { media, buffer, timeline } = session;
    if (media.readyState !== "open" || buffer.updating) return;
    const ranges = buffer.buffered;
    const held = ranges.length ? ranges.end(ranges.length - 1) : 0;
    const end = timeline.end(this.#chunks) + (this.#ended ? 0 : timeline.later * timeline.frame);
    const duration = Math.max(end, held);
    if (!(Math.abs(media.duration - duration) < timeline.frame / 2)) media.duration = duration;
  }

  /** Keep the playhead inside what is finished, and take who watches along when he falls far behind. */
  #follow(session) {
    const video = this.#video;
    const { timeline } = session;
    const end = timeline.end(this.#chunks);
    if (video.currentTime > end) this.#jump(session, Math.max(0, end - timeline.frame));
    else if (session.following && !this.#ended && !video.paused && end - video.currentTime > FAR) {
      this.#jump(session, timeline.begin(Math.max(0, this.#chunks - 2)));
    }
  }

  #jump(session, time) {
    if (Math.abs(this.#video.currentTime - time) < session.timeline.frame / 2) return;
    session.jumped = time;
    this.#video.currentTime = time;
  }

  async #append(session, data) {
    const { buffer, timeline } = session;
    while (!session.over) {
      try {
        return await this.#change(session, () => buffer.appendBuffer(data));
      } catch (error) {
        if (error?.name !== "QuotaExceededError" || session.broken) throw error;
        // this browser holds less than others: make room behind the playhead, then wait until there is some
        const keep = timeline.begin(timeline.chunkAt(Math.max(0, this.#video.currentTime - 1)));
        if (buffer.buffered.length && buffer.buffered.start(0) < keep - timeline.frame) {
          await this.#change(session, () => buffer.remove(0, keep));
        } else {
          await session.woken();
        }
      }
    }
  }

  /** Do something to the buffer and wait until it is done. */
  async #change(session, act) {
    const { buffer } = session;
    const done = session.event(buffer, "updateend", "error", "abort");
    try {
      act();
    } catch (error) {
      done.catch(() => {});
      done.forget();
      throw error;
    }
    if ((await done) === "error") {
      session.broken = true;
      throw new Error("the fragment cannot be decoded");
    }
  }

  // ---------------------------------------------------------------- requests

  /** Fetch until it works; null when it is over or not wanted any more. */
  async #persist(session, path, wanted = () => true) {
    for (let wait = FIRST_RETRY_MS; !session.over && wanted(); wait = Math.min(2 * wait, LAST_RETRY_MS)) {
      try {
        const answer = await session.fetch(this.#base + path);
        session.timeline = Timeline.read(answer.headers.get("X-Timeline"));
        const type = answer.headers.get("Content-Type");
        return { data: answer.data, type };
      } catch (error) {
        if (session.over) return null;
        // while something still plays nobody need know
        const starved = this.#video.readyState < HTMLMediaElement.HAVE_FUTURE_DATA;
        if (starved) this.#tell("error", `${error?.message ?? error}; trying again`);
        await session.pause(wait);
        if (starved && !session.over) this.#tell("loading");
      }
    }
    return null;
  }

  // ---------------------------------------------------------------- without MediaSource

  async #playNatively(session) {
    const video = this.#video;
    if (!video.canPlayType(HLS)) {
      this.#tell("unsupported", "this browser cannot play a video that is still being made");
      return;
    }
    video.src = `${this.#base}/live.m3u8`;
    this.#play(session);
    // the browser asks for what is new by itself
    for (let rebuilds = 0; !session.over; ) {
      await session.woken();
      if (!session.broken || session.over) continue;
      session.broken = false;
      rebuilds += 1;
      if (rebuilds > REBUILDS) {
        this.#tell("error", "the browser cannot play this video");
        return;
      }
      await session.pause(FIRST_RETRY_MS * rebuilds);
      if (session.over) return;
      video.src = `${this.#base}/live.m3u8`;
      this.#play(session);
    }
  }
}

/** Which frames are in which chunk, as the server says. */
class Timeline {
  constructor(first, later, frames, fps) {
    Object.assign(this, { first, later, frames, frame: 1 / fps });
    this.chunks = 1 + Math.max(0, Math.ceil((frames - first) / later));
  }

  /** @param {string|null} header such as `first=9, later=12, frames=57, fps=16` */
  static read(header) {
    const found = /^first=(\d+), later=(\d+), frames=(\d+), fps=(\d+)$/.exec(header ?? "");
    if (!found) throw new Error("the server's answer has no timeline");
    return new Timeline(...found.slice(1).map(Number));
  }

  begin(chunk) {
    return chunk ? (this.first + (chunk - 1) * this.later) * this.frame : 0;
  }

  chunkAt(time) {
    // a hundredth of a frame is rounding
    const frame = Math.floor(time / this.frame + 0.01);
    return frame < this.first ? 0 : 1 + Math.floor((frame - this.first) / this.later);
  }

  /** When so many chunks are over; the last of all may be shorter than the others. */
  end(chunks) {
    return chunks === this.chunks ? this.frames * this.frame : this.begin(chunks);
  }
}

/** What one attach() holds, and how all of it ends. */
class Session {
  over = false;
  broken = false; // the element has failed
  reopened = false; // there is more after an end that was shown
  following = true; // who watches has not gone elsewhere
  jumped = NaN; // where to, when it was not the user
  last = -1; // chunk that was asked for
  media = null;
  buffer = null;
  timeline = null;
  #abort = new AbortController();
  #waiting = new Set(); // called when it is over
  #pauses = new Set();
  #wakers = [];
  #dirty = false;

  listen(target, name, act) {
    target.addEventListener(name, act, { signal: this.#abort.signal });
  }

  /** Let the loop look again. */
  wake() {
    this.#dirty = true;
    for (const go of this.#wakers.splice(0)) go();
  }

  /** Until there may be something to do. */
  async woken() {
    if (!this.#dirty && !this.over) await new Promise((go) => this.#wakers.push(go));
    this.#dirty = false;
  }

  /** The name of the first of some events. */
  event(target, ...names) {
    const stop = new AbortController();
    const done = new Promise((resolve, reject) => {
      const cease = () => (stop.abort(), reject(new Error("detached")));
      this.#waiting.add(cease);
      stop.signal.addEventListener("abort", () => this.#waiting.delete(cease));
      for (const name of names) {
        target.addEventListener(name, () => (stop.abort(), resolve(name)), { signal: stop.signal });
      }
    });
    done.forget = () => stop.abort();
    return done;
  }

  /** So long, or until there is reason to hurry. */
  pause(ms) {
    return new Promise((resolve) => {
      const go = () => (clearTimeout(timer), this.#pauses.delete(go), resolve());
      const timer = setTimeout(go, ms);
      this.#pauses.add(go);
    });
  }

  hurry() {
    for (const go of [...this.#pauses]) go();
  }

  async fetch(url) {
    const stop = new AbortController();
    const cease = () => stop.abort();
    this.#waiting.add(cease);
    const timer = setTimeout(cease, PATIENCE_MS);
    try {
      const answer = await fetch(url, { signal: stop.signal, cache: "no-store" });
      if (!answer.ok) {
        const said = await answer.json().catch(() => null);
        throw new Error(said?.error?.message ?? `the server answers ${answer.status}`);
      }
      return { headers: answer.headers, data: await answer.arrayBuffer() };
    } catch (error) {
      if (error?.name === "AbortError") throw new Error("the server does not answer");
      // what browsers say of a lost connection helps nobody
      throw error instanceof TypeError ? new Error("the server cannot be reached") : error;
    } finally {
      clearTimeout(timer);
      this.#waiting.delete(cease);
    }
  }

  /** Let go of the source, to begin with a new one. */
  close() {
    const { media, buffer } = this;
    this.media = this.buffer = null;
    try {
      if (media?.readyState === "open") buffer?.abort();
    } catch {
      // it is being thrown away
    }
  }

  end() {
    this.over = true;
    this.#abort.abort();
    for (const cease of [...this.#waiting]) cease();
    this.hurry();
    this.close();
    this.wake();
  }
}

/** Until where everything from `time` on is there. */
function contiguous(buffer, time, frame) {
  const ranges = buffer.buffered;
  for (let index = 0; index < ranges.length; index += 1) {
    if (ranges.start(index) <= time + frame && time < ranges.end(index) + frame / 2) {
      return Math.max(time, ranges.end(index));
    }
  }
  return time;
}
