/* Maps to walk through. What they show is JSON beside each; walk.py says what is in it. */
"use strict";
document.documentElement.classList.add("js");
const NONE = 65535, OUTSIDE = 10001, STYLES = 10, GREY = "soft";
const unpack = (text) => new Uint16Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
const element = (tag, set = {}, ...inside) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(set)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...inside);
  return made;
};

/* Draw the marker of a style around a place; ten shapes, so that colours are not needed to tell values apart. */
function marker(pen, style, x, y, r) {
  const shape = (style + Math.floor(style / STYLES)) % STYLES;
  const corners = { 1: [4, 1, 1.1], 2: [3, 0, 1.3], 3: [4, 0, 1.3], 4: [3, 3, 1.3], 7: [3, 4.5, 1.3], 8: [3, 1.5, 1.3], 9: [5, 0, 1.3] }[shape];
  pen.beginPath();
  if (corners) {
    const [n, turn, size] = corners;
    for (let k = 0; k < n; k++) {
      const angle = (2 * Math.PI * k) / n - Math.PI / 2 + (n === 4 && turn ? Math.PI / 4 : (turn * Math.PI) / 3);
      pen.lineTo(x + size * r * Math.cos(angle), y + size * r * Math.sin(angle));
    }
    pen.closePath();
  } else if (shape === 5) pen.rect(x - r, y - r / 2.5, 2 * r, r / 1.25), pen.rect(x - r / 2.5, y - r, r / 1.25, 2 * r);
  else if (shape === 6) pen.rect(x - r, y - r / 2.5, 2 * r, r / 1.25);
  else pen.arc(x, y, r, 0, 2 * Math.PI);
  pen.fill();
}

class Walk {
  constructor(root) {
    this.root = root;
    this.data = JSON.parse(root.querySelector("script").textContent);
    this.part = (name) => root.querySelector(`[data-part=${name}]`);
    this.n = this.data.ids.length;
    for (const space of this.data.spaces) {
      for (const key of ["places", "near", "predicted", "probability"]) if (space[key]) space[key] = unpack(space[key]);
    }
    this.text = this.data.ids.map((id, i) => `${id}\n${this.data.words[i]}\n${this.data.labels[i]}`.toLowerCase());
    this.canvas = this.part("canvas");
    this.pen = this.canvas.getContext("2d");
    this.current = this.chosen = -1;
    this.view = { x: 0.5, y: 0.5, zoom: 1 };
    this.data.spaces.forEach((space, i) => this.part("space").append(element("option", { value: i }, space.name)));
    this.part("shown").textContent = this.data.shown;
    this.listen();
    this.enter();
    root.hidden = false;
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  listen() {
    const { canvas } = this, on = (what, names, act) => names.split(" ").forEach((name) => what.addEventListener(name, act));
    on(this.part("space"), "change", () => this.enter());
    on(this.part("colour"), "change", () => this.colour());
    on(this.part("search"), "input", () => this.search());
    on(this.part("search"), "keydown", (e) => e.key === "Enter" && this.matches.length && this.choose(this.matches[0]));
    for (const [name, by] of [["in", 1.5], ["out", 1 / 1.5], ["whole", 0]]) on(this.part(name), "click", () => this.zoom(by));
    on(canvas, "pointermove", (e) => (e.buttons && this.grip ? this.drag(e) : this.hover(e)));
    on(canvas, "pointerdown", (e) => ((this.grip = { x: e.offsetX, y: e.offsetY, moved: 0 }), this.hover(e)));
    on(canvas, "pointerup", () => (this.grip && this.grip.moved < 8 && this.choose(this.current), (this.grip = null)));
    on(canvas, "pointercancel", () => (this.grip = null));
    on(canvas, "pointerleave blur", () => this.point(-1));
    on(canvas, "wheel", (e) => e.ctrlKey && (e.preventDefault(), this.zoom(e.deltaY < 0 ? 1.2 : 1 / 1.2, e.offsetX, e.offsetY)));
    on(canvas, "focus", () => this.point(this.chosen >= 0 ? this.chosen : this.current));
    on(canvas, "keydown", (e) => this.key(e));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /* Show the space that is selected, and what it can be coloured by. */
  enter() {
    this.space = this.data.spaces[this.part("space").value];
    this.colours = { ...this.data.colours };
    if (this.space.clusters) this.colours.cluster = this.space.clusters;
    if (this.space.predicted) {
      const { of, names } = this.data.colours.class, own = unpack(of), { classes } = this.data;
      this.colours.error = {
        names: ["right", "wrong", "not predicted"],
        numbers: own.map((k, i) => (this.space.predicted[i] === NONE ? 2 : classes[this.space.predicted[i]] === names[k] ? 0 : 1)),
      };
    }
    const select = this.part("colour"), before = select.value;
    select.replaceChildren(...Object.keys(this.colours).map((name) => element("option", { value: name }, name)));
    if (before in this.colours) select.value = before;
    this.colour();
    if (this.chosen >= 0) this.choose(this.chosen);
  }

  colour() {
    const { names, of, numbers } = this.colours[this.part("colour").value] || { names: ["all"], numbers: new Uint16Array(this.n) };
    this.values = numbers || unpack(of);
    this.off = new Set();
    const counts = names.map(() => 0);
    this.values.forEach((k, i) => this.there(i) && counts[k]++);
    const entries = names.map((name, k) => {
      const swatch = element("canvas", { width: 24, height: 24, "aria-hidden": "true" });
      const button = element("button", { type: "button", "aria-pressed": "true", dir: "auto" }, swatch, `${name} (${counts[k]})`);
      button.addEventListener("click", () => {
        this.off[this.off.has(k) ? "delete" : "add"](k);
        this.filter();
      });
      return element("li", {}, button);
    });
    const all = element("button", { type: "button" }, "all"), none = element("button", { type: "button" }, "none");
    all.addEventListener("click", () => (this.off.clear(), this.filter()));
    none.addEventListener("click", () => ((this.off = new Set(names.keys())), this.filter()));
    this.part("legend").replaceChildren(...entries, element("li", {}, all), element("li", {}, none));
    this.search();
  }

  filter() {
    this.part("legend").querySelectorAll("[aria-pressed]").forEach((b, k) => b.setAttribute("aria-pressed", String(!this.off.has(k))));
    this.search();
  }

  search() {
    const asked = this.part("search").value.trim().toLowerCase();
    this.matches = [...Array(this.n).keys()].filter((i) => this.visible(i) && this.text[i].includes(asked));
    this.found = new Set(asked ? this.matches : []);
    const more = this.matches.length > 20 ? [element("li", {}, `and ${this.matches.length - 20} more`)] : [];
    const shown = asked ? this.matches.slice(0, 20).map((i) => element("li", {}, this.button(i))) : [];
    this.part("matches").replaceChildren(...shown, ...(asked ? more : []));
    this.say(asked ? `${this.matches.length} of ${this.n} match.` : `${this.matches.length} of ${this.n} points are visible.`);
    this.draw();
  }

  say(text) {
    this.part("status").textContent = text;
  }

  there(i) {
    return this.space.places[2 * i] < OUTSIDE;
  }

  visible(i) {
    return this.there(i) && !this.off.has(this.values[i]);
  }

  /* Place of a point on the canvas, in its units. */
  at(i) {
    const { x, y, zoom } = this.view, side = Math.min(this.width, this.height) - 24;
    const place = (k, middle) => (this.space.places[2 * i + k] / (OUTSIDE - 1) - middle) * side * zoom;
    return [place(0, x) + this.width / 2, place(1, y) + this.height / 2];
  }

  draw() {
    const { canvas, pen } = this, style = getComputedStyle(canvas), ratio = window.devicePixelRatio || 1;
    [this.width, this.height] = [canvas.clientWidth, canvas.clientHeight];
    [canvas.width, canvas.height] = [this.width * ratio, this.height * ratio];
    if (!this.width) return;
    const ink = (name) => this.tint(name, style), hues = Array.from({ length: STYLES }, (_, k) => ink(`k${k}`));
    const size = (this.n <= 600 ? 4.2 : 3) * Math.min(1.6, Math.sqrt(this.view.zoom));
    this.part("legend").querySelectorAll("canvas").forEach((swatch, k) => {
      const small = swatch.getContext("2d");
      small.clearRect(0, 0, 24, 24);
      small.fillStyle = hues[k % STYLES];
      marker(small, k, 12, 12, 8);
    });
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    for (let i = 0; i < this.n; i++) {
      if (!this.visible(i)) continue;
      pen.globalAlpha = !this.found.size || this.found.has(i) ? 0.85 : 0.12;
      pen.fillStyle = hues[this.values[i] % STYLES];
      marker(pen, this.values[i], ...this.at(i), this.found.has(i) ? 1.4 * size : size);
    }
    pen.globalAlpha = 1;
    const ring = (i, radius, colour, width) => {
      pen.beginPath();
      pen.strokeStyle = colour;
      pen.lineWidth = width;
      pen.arc(...this.at(i), radius, 0, 2 * Math.PI);
      pen.stroke();
    };
    if (this.chosen >= 0) {
      this.near(this.space, this.chosen).forEach((i) => this.visible(i) && ring(i, size + 3, ink("accent"), 1.2));
      if (this.there(this.chosen)) ring(this.chosen, size + 5, ink("ink"), 2.5);
    }
    if (this.current >= 0) ring(this.current, size + 3, ink("ink"), 1.5);
  }

  /* Value of a colour of the page; light-dark() is resolved by an element that has it. */
  tint(name, style) {
    this.canvas.style.color = `var(--${name})`;
    return style.color;
  }

  near(space, i) {
    return [...space.near.slice(10 * i, 10 * i + 10)].filter((k) => k !== NONE);
  }

  nearest(x, y, within) {
    let best = -1;
    for (let i = 0; i < this.n; i++) {
      if (!this.visible(i)) continue;
      const [a, b] = this.at(i), away = Math.hypot(a - x, b - y);
      if (away < within) [best, within] = [i, away];
    }
    return best;
  }

  hover(e) {
    this.point(this.nearest(e.offsetX, e.offsetY, e.pointerType === "touch" ? 24 : 12));
  }

  point(i) {
    const tip = this.part("tip");
    if (this.current !== i) {
      this.current = i;
      this.draw();
    }
    tip.hidden = i < 0;
    if (i < 0) return;
    tip.replaceChildren(...this.about(i));
    const [x, y] = this.at(i), right = x > this.width / 2;
    tip.style.cssText = `${right ? "right" : "left"}: ${(right ? this.width - x : x) + 14}px; top: ${Math.max(0, y - 20)}px;`;
  }

  /* What is known of an utterance, as elements. */
  about(i, space = this.space) {
    const { data } = this, lines = [], line = (name, text) => text && lines.push(element("p", { dir: "auto" }, name && element("b", {}, `${name} `), element("bdi", {}, text)));
    if (data.faces[i]) lines.push(element("img", { src: `data:image/jpeg;base64,${data.faces[i]}`, width: 64, height: 64, alt: `Picture of ${data.ids[i]}` }));
    line("", data.ids[i]);
    line("", data.words[i] && `“${data.words[i]}”`);
    line("label", data.labels[i]);
    line("predicted", this.predicted(i, space));
    line("person", data.persons[i]);
    return lines;
  }

  predicted(i, space) {
    const known = space.predicted && space.predicted[i] !== NONE;
    return known ? `${this.data.classes[space.predicted[i]]}, ${space.probability[i]} %` : "";
  }

  key(e) {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key];
    const others = { Enter: () => this.choose(this.current), " ": () => this.choose(this.current), Escape: () => this.choose(-1) };
    const zooms = { "+": 1.5, "=": 1.5, "-": 1 / 1.5, 0: 0 };
    if (way) this.step(...way);
    else if (others[e.key]) others[e.key]();
    else if (e.key in zooms && !e.ctrlKey && !e.metaKey) this.zoom(zooms[e.key]);
    else return;
    e.preventDefault();
  }

  /* Go to the nearest point in a direction, at most 45 degrees off. */
  step(dx, dy) {
    const from = this.current >= 0 ? this.current : this.chosen;
    if (from < 0 || !this.visible(from)) return this.go(this.nearest(this.width / 2, this.height / 2, Infinity));
    const [x, y] = this.at(from);
    let best = -1, least = Infinity;
    for (let i = 0; i < this.n; i++) {
      if (i === from || !this.visible(i)) continue;
      const [a, b] = this.at(i), ahead = (a - x) * dx + (b - y) * dy, aside = Math.abs((a - x) * dy) + Math.abs((b - y) * dx);
      const away = ahead + 2 * aside;
      if (ahead > 0 && aside <= ahead && away < least) [best, least] = [i, away];
    }
    this.go(best);
  }

  go(i) {
    if (i < 0) return;
    const [x, y] = this.at(i), side = (Math.min(this.width, this.height) - 24) * this.view.zoom;
    if (x < 10 || y < 10 || x > this.width - 10 || y > this.height - 10) this.pan(this.width / 2 - x, this.height / 2 - y, side);
    this.point(i);
    const { data } = this, said = [data.ids[i], data.words[i], data.labels[i] && `label ${data.labels[i]}`, this.predicted(i, this.space) && `predicted ${this.predicted(i, this.space)}`];
    this.say(said.filter(Boolean).join(", "));
  }

  choose(i) {
    this.chosen = i;
    const panel = this.part("detail");
    panel.replaceChildren();
    if (i >= 0) {
      const raw = this.data.spaces.find((space) => space.raw) || this.space;
      const lists = [...new Set([this.space, raw])].map((space) => this.neighbours(space, i));
      panel.append(element("div", { className: "about" }, ...this.about(i), ...this.clip(i)), ...lists);
      this.say(`${this.data.ids[i]} is selected; its nearest neighbours are listed below the map.`);
    }
    panel.hidden = i < 0;
    this.draw();
  }

  neighbours(space, i) {
    const rows = this.near(space, i).map((k) => element("li", {}, this.button(k)));
    const nothing = rows.length ? [] : [element("p", { className: "note" }, "It has none of these modalities.")];
    return element("div", { className: "near" }, element("h4", { dir: "auto" }, `Nearest by ${space.name}`), element("ol", {}, ...rows), ...nothing);
  }

  button(i) {
    const { data } = this, picture = data.faces[i] ? [element("img", { src: `data:image/jpeg;base64,${data.faces[i]}`, width: 32, height: 32, alt: "" })] : [];
    const label = data.labels[i] ? [" ", element("small", {}, element("bdi", {}, data.labels[i]))] : [];
    const made = element("button", { type: "button", title: data.words[i] }, ...picture, element("bdi", {}, data.ids[i]), ...label);
    made.addEventListener("click", () => this.choose(i));
    return made;
  }

  /* A player of the clip where its file was when the page was written, or still lies beside the page. */
  clip(i) {
    const { url, relative, names, times } = this.data.clips, name = names && names[i];
    if (!name) return [];
    const end = `${name.split("/").map(encodeURIComponent).join("/")}${times[i] && `#t=${times[i]}`}`;
    const video = element("video", { controls: true, preload: "metadata", "aria-label": `Clip ${this.data.ids[i]}` });
    const sources = [url, relative.split("/").map(encodeURIComponent).join("/")].map((place) => element("source", { src: `${place}/${end}` }));
    video.append(...sources);
    const way = element("a", { href: `${url}/${end}` }, name);
    sources[1].addEventListener("error", () => video.replaceWith(element("p", { className: "note" }, "This browser cannot play the clip: ", way)));
    return [video];
  }

  zoom(by, x = this.width / 2, y = this.height / 2) {
    const zoom = by ? Math.min(40, Math.max(1, this.view.zoom * by)) : 1, side = Math.min(this.width, this.height) - 24;
    const shift = (1 / this.view.zoom - 1 / zoom) / side;
    this.view = zoom === 1 ? { x: 0.5, y: 0.5, zoom } : { x: this.view.x + (x - this.width / 2) * shift, y: this.view.y + (y - this.height / 2) * shift, zoom };
    this.canvas.style.touchAction = zoom === 1 ? "" : "none";
    this.point(this.current);
    this.draw();
  }

  drag(e) {
    const [dx, dy] = [e.offsetX - this.grip.x, e.offsetY - this.grip.y];
    this.grip = { x: e.offsetX, y: e.offsetY, moved: this.grip.moved + Math.abs(dx) + Math.abs(dy) };
    if (this.view.zoom > 1) this.pan(dx, dy, (Math.min(this.width, this.height) - 24) * this.view.zoom);
  }

  pan(dx, dy, side) {
    this.view.x -= dx / side;
    this.view.y -= dy / side;
    this.draw();
  }
}

document.querySelectorAll(".walk").forEach((root) => new Walk(root));
