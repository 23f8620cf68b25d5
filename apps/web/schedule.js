/** `<vidkv-schedule>`: prompts that take over later, on a line and in rows. Its `value` is [[second, prompt, switch?], …]. */

import { button, h, icon } from "/page/kit.js";
import { SWITCHES } from "/page/stage.js";

const STEP_S = 0.5;

export class VidkvSchedule extends HTMLElement {
  connectedCallback() {
    this.rows ??= [];
    this.seconds ??= 10;
    this.track = h("div", { class: "vk-track", "aria-hidden": "true" });
    this.table = h("ol", { class: "vk-rows" });
    this.add = button("Add a prompt", null, () => this.append_(), { class: "small ghost" });
    this.replaceChildren(this.track, this.table, this.add);
    this.draw();
    this.drafted = ({ detail }) => {
      const seconds = Number(detail.seconds) || 60;
      if (seconds !== this.seconds) { this.seconds = seconds; this.drawTrack(); }
    };
    document.addEventListener("vidkv-draft", this.drafted);
  }

  disconnectedCallback() {
    document.removeEventListener("vidkv-draft", this.drafted);
  }

  get value() {
    return this.rows.filter(({ prompt }) => prompt.trim())
      .map(({ second, prompt, how }) => (how ? [second, prompt.trim(), how] : [second, prompt.trim()]))
      .sort(([first], [second]) => first - second);
  }

  set value(entries) {
    if (JSON.stringify(entries) === JSON.stringify(this.rows ? this.value : null)) return;
    this.rows = entries.map(([second, prompt, how]) => ({ second, prompt, how: how ?? "" }));
    if (this.track) this.draw();
  }

  append_() {
    const last = Math.max(0, ...this.rows.map((row) => row.second));
    const second = Math.round((last + (this.seconds - last) / 2) / STEP_S) * STEP_S;
    this.rows.push({ second: Math.max(STEP_S, second), prompt: "", how: "" });
    this.draw();
    this.table.lastChild.querySelector("input[type=text]").focus();
  }

  tell() {
    this.drawTrack();
    this.dispatchEvent(new CustomEvent("vidkv-schedule", { bubbles: true }));
  }

  draw() {
    this.table.replaceChildren(...this.rows.map((row, number) => {
      const name = `prompt ${number + 1}`;
      const second = h("input", { type: "number", min: STEP_S, step: STEP_S, value: row.second, "aria-label": `Second of ${name}`,
        oninput: () => { row.second = Math.max(0, Number(second.value) || 0); this.tell(); } });
      const prompt = h("input", { type: "text", value: row.prompt, placeholder: "what happens from then on", "aria-label": `Text of ${name}`,
        oninput: () => { row.prompt = prompt.value; this.tell(); } });
      const how = h("select", { "aria-label": `Switch of ${name}`, onchange: () => { row.how = how.value; this.tell(); } },
        SWITCHES.map(([value, text]) => h("option", { value, selected: value === row.how }, text)));
      const remove = h("button", { type: "button", class: "vk-button ghost icon", "aria-label": `Remove ${name}`,
        onclick: () => { this.rows = this.rows.filter((other) => other !== row); this.draw(); this.tell(); this.add.focus(); } }, icon("trash"));
      row.input = second;
      return h("li", {}, h("span", { class: "vk-second" }, second, "s"), prompt, how, remove);
    }));
    this.drawTrack();
  }

  drawTrack() {
    const length = Math.max(this.seconds, ...this.rows.map((row) => row.second * 1.1));
    this.track.hidden = !this.rows.length;
    this.track.replaceChildren(...this.rows.map((row, number) => {
      const mark = h("b", { style: `inset-inline-start:${(100 * row.second) / length}%`, title: `${row.second} s` }, String(number + 1));
      mark.addEventListener("pointerdown", (event) => this.drag(event, row, mark, length));
      return mark;
    }));
  }

  drag(event, row, mark, length) {
    mark.setPointerCapture(event.pointerId);
    const box = this.track.getBoundingClientRect();
    const move = ({ clientX }) => {
      const at = Math.min(1, Math.max(0, (clientX - box.left) / box.width));
      row.second = Math.max(STEP_S, Math.round((at * length) / STEP_S) * STEP_S);
      row.input.value = row.second;
      mark.style.insetInlineStart = `${(100 * row.second) / length}%`;
    };
    mark.addEventListener("pointermove", move);
    mark.addEventListener("pointerup", () => { mark.removeEventListener("pointermove", move); this.tell(); }, { once: true });
  }
}

customElements.define("vidkv-schedule", VidkvSchedule);
