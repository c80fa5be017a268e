// The page of `featx show`. Bokeh draws the map; this script finds the image under the pointer and shows it.
// Names are only ever set as text: whatever is in them, none becomes HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const bytes = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
const FEW = 60; // images in view that are thumbnails on the map
const digits = (number) => (number === 0 ? "0" : number < 0.001 ? number.toExponential(1) : number.toPrecision(3));

function el(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

const faint = (words) => el("p", { className: "faint", textContent: words });

async function main() {
  Bokeh.logger.set_level("error");
  const packed = new Blob([bytes($("data").textContent)]).stream();
  const page = await new Response(packed.pipeThrough(new DecompressionStream("gzip"))).json();
  const points = new Float32Array(bytes(page.points).buffer);
  const labels = new Uint32Array(bytes(page.labels).buffer);
  const near = new Int32Array(bytes(page.near).buffer);
  const distances = new Float32Array(bytes(page.distances).buffer);
  const total = page.names.length;
  const x = points.filter((_, at) => at % 2 === 0);
  const y = points.filter((_, at) => at % 2 === 1);
  const colour = (row) => page.colours[labels[row] % page.colours.length];
  const nearest = (row) => Array.from(near.subarray(row * page.columns, (row + 1) * page.columns));

  // -- images ---------------------------------------------------------------------------------------------------

  const picture = (row) =>
    page.thumbnails[row]
      ? el("img", { src: `data:image/webp;base64,${page.thumbnails[row]}`, alt: "" })
      : el("div", { className: "none", textContent: "no thumbnail" });
  const named = (row) => { // a narrow card breaks the name after a slash first
    const parts = page.names[row].split(/(?<=\/)/);
    return el("span", { dir: "auto" }, ...parts.flatMap((part, at) => (at ? [el("wbr"), part] : [part])));
  };

  function card(row, distance) {
    const apart = distance === undefined ? null : el("b", { textContent: digits(distance) });
    return el("button", { className: "card", type: "button", onclick: () => select(row) }, picture(row), apart, named(row));
  }

  /** The path of the file itself; bytes that are not UTF-8 come as lone surrogates, U+DC80 to U+DCFF. */
  function link(row) {
    const encode = (part) =>
      /^[\udc80-\udcff]$/u.test(part) ? `%${(part.charCodeAt(0) & 255).toString(16)}` : encodeURIComponent(part);
    return page.folder + Array.from(page.names[row], encode).join("").replaceAll("%2F", "/");
  }

  // -- the map --------------------------------------------------------------------------------------------------

  const size = total > 20000 ? 4 : total > 2000 ? 6 : 10;
  const source = new Bokeh.ColumnDataSource({ data: { x, y, colour: Array.from(labels, (_, row) => colour(row)) } });
  const range = () => new Bokeh.DataRange1d({ range_padding: total > FEW ? 0.1 : 0.25 }); // room for thumbnails
  const figure = Bokeh.Plotting.figure({
    x_range: range(), y_range: range(),
    tools: "wheel_zoom", active_scroll: "wheel_zoom", toolbar_location: null, lod_threshold: 20000,
    match_aspect: true, sizing_mode: "stretch_both", min_border: 0, outline_line_color: null,
    background_fill_color: null, border_fill_color: null,
  });
  figure.grid.visible = false;
  figure.axis.visible = false;
  const field = (name) => ({ field: name });
  figure.scatter(field("x"), field("y"), { source, size, fill_color: field("colour"), line_color: null, fill_alpha: 0.85 });
  const { x_scale, y_scale } = (await Bokeh.Plotting.show(figure, $("drawn"))).frame;

  /** Where a row is in the map's element, in pixels. */
  const place = (row) => [x_scale.compute(x[row]), y_scale.compute(y[row])];

  let side = 0; // of the thumbnails on the map, in pixels; 0: there are none
  let only = -1; // the class that is shown alone

  /** Show the images in view as thumbnails, if they are few enough to be recognized. */
  function drawThumbnails() {
    const { inner_width, inner_height } = figure;
    const inView = (row) => x[row] > left && x[row] < right && y[row] > bottom && y[row] < top;
    const [left, right] = [x_scale.invert(0), x_scale.invert(inner_width)];
    const [top, bottom] = [y_scale.invert(0), y_scale.invert(inner_height)];
    const rows = [];
    for (let row = 0; row < total && rows.length <= FEW; row++) if (inView(row)) rows.push(row);
    side = rows.length > FEW ? 0 : Math.min(112, 0.5 * Math.sqrt((inner_width * inner_height) / rows.length));
    if (side < 40) side = 0;
    $("thumbnails").replaceChildren(...rows.filter((row) => side && page.thumbnails[row]).map((row) => {
      const [left, top] = place(row), img = small.get(row) ?? picture(row);
      small.set(row, img);
      img.style = `left: ${left}px; top: ${top}px; width: ${side}px; height: ${side}px; border-color: ${colour(row)}`;
      img.className = only >= 0 && labels[row] !== only ? "dim" : "";
      return img;
    }));
  }
  const small = new Map(); // the thumbnails on the map, by row: a browser decodes each once

  /** The row nearest to a place in the map's element, if it is nearer than some pixels. */
  function rowAt(left, top, pixels = Math.max(14, side / 2)) {
    const atX = x_scale.invert(left), atY = y_scale.invert(top);
    let best = -1, least = (x_scale.invert(left + pixels) - atX) ** 2;
    for (let row = 0; row < total; row++) {
      const squared = (x[row] - atX) ** 2 + (y[row] - atY) ** 2;
      if (squared < least) [best, least] = [row, squared];
    }
    return best;
  }

  function rowUnder(event) {
    const box = $("moved").getBoundingClientRect();
    return rowAt(event.clientX - box.left, event.clientY - box.top);
  }

  let hovered = -1, selected = -1;

  /** Put rings around the image pointed at, the one shown and the ones nearest to it. */
  function mark() {
    const ring = (row, wider) => {
      const [left, top] = place(row), wide = (side || size) + wider;
      const style = `left: ${left}px; top: ${top}px; width: ${wide}px; height: ${wide}px`;
      return el("i", { style, className: side ? "square" : "" });
    };
    const rings = selected < 0 ? [] : [ring(selected, 16), ...nearest(selected).map((row) => ring(row, 8))];
    $("marks").replaceChildren(...rings, ...(hovered < 0 ? [] : [ring(hovered, 12)]));
    small.forEach((img, row) => (img.style.zIndex = row === hovered ? 2 : row === selected ? 1 : 0));
  }
  function draw() {
    drawThumbnails();
    mark();
  }
  figure.x_range.change.connect(draw);
  figure.y_range.change.connect(draw);

  function hover(row) {
    if (row === hovered) return;
    hovered = row;
    mark();
    const tip = $("tip");
    tip.hidden = row < 0;
    if (row < 0) return;
    const shown = [row, ...nearest(row)].find((at) => page.thumbnails[at]) ?? row;
    const other = el("div", { className: "faint" }, "no thumbnail; this is one near it: ", named(shown));
    tip.replaceChildren(picture(shown), named(row), shown === row ? "" : other);
    const box = $("map").getBoundingClientRect(), [left, top] = place(row);
    const right = box.left + left + tip.offsetWidth + 16 > document.documentElement.clientWidth;
    const below = box.top + top - tip.offsetHeight - 12 < 0;
    tip.style.left = `${Math.max(4, scrollX + box.left + left + (right ? -tip.offsetWidth - 14 : 14))}px`;
    tip.style.top = `${scrollY + box.top + top + (below ? 14 : -tip.offsetHeight - 10)}px`;
  }

  function moveBy(right, up) {
    for (const [range, by] of [[figure.x_range, right], [figure.y_range, up]]) {
      range.setv({ start: range.start + by, end: range.end + by });
    }
  }

  function reveal(row) {
    const [left, top] = place(row), { inner_width, inner_height } = figure;
    if (left > 0 && top > 0 && left < inner_width && top < inner_height) return;
    moveBy(x[row] - x_scale.invert(inner_width / 2), y[row] - y_scale.invert(inner_height / 2));
  }

  // A drag moves the drawn map as it is, and draws anew at its end: 100,000 points at each move are too many for a
  // machine without a graphics card, with WebGL too.
  let grip = null, dragged = false;
  $("map").addEventListener("pointerdown", (event) => {
    grip = event.isPrimary && event.button === 0 ? [event.clientX, event.clientY] : null;
    dragged = false;
  });
  addEventListener("pointermove", (event) => {
    if (!grip) return;
    const [right, down] = [event.clientX - grip[0], event.clientY - grip[1]];
    dragged ||= Math.hypot(right, down) > 4; // less is a click by an unsteady hand
    if (!dragged) return;
    hover(-1);
    $("moved").style.transform = `translate(${right}px, ${down}px)`;
  });
  function drop(event) {
    if (grip && dragged) {
      moveBy(
        x_scale.invert(grip[0]) - x_scale.invert(event.clientX),
        y_scale.invert(grip[1]) - y_scale.invert(event.clientY),
      );
      requestAnimationFrame(() => ($("moved").style.transform = "")); // after Bokeh's own, which draws in this frame
    }
    grip = null;
  }
  addEventListener("pointerup", drop);
  addEventListener("pointercancel", drop);

  $("map").addEventListener("pointermove", (event) => grip || hover(rowUnder(event)));
  $("map").addEventListener("pointerleave", () => hover(-1));
  $("map").addEventListener("click", (event) => dragged || select(rowUnder(event)));

  /** The nearest row in a direction, within 45 degrees of it. */
  function step(from, right, up) {
    let best = from, least = Infinity;
    for (let row = 0; row < total; row++) {
      const ahead = (x[row] - x[from]) * right + (y[row] - y[from]) * up;
      const aside = Math.abs((x[row] - x[from]) * up) + Math.abs((y[row] - y[from]) * right);
      if (ahead > 0 && aside <= ahead && ahead + aside < least) [best, least] = [row, ahead + aside];
    }
    return best;
  }

  const ARROWS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  $("map").addEventListener("keydown", (event) => {
    if (ARROWS[event.key]) {
      event.preventDefault();
      const from = hovered >= 0 ? hovered : selected;
      const middle = () => rowAt(figure.inner_width / 2, figure.inner_height / 2, Infinity);
      const row = from < 0 ? middle() : step(from, ...ARROWS[event.key]);
      reveal(row);
      hovered = -1;
      hover(row);
    } else if (event.key === "Enter" && hovered >= 0) select(hovered);
  });

  // -- one image ------------------------------------------------------------------------------------------------

  function select(row) {
    selected = row;
    hover(-1);
    if (row < 0) {
      $("one").replaceChildren(
        el("p", { textContent: "Point at the map to see an image; click for the ones nearest to it. Drag to move, scroll to zoom." }),
        el("p", { textContent: "By keyboard: the arrows go from image to image, Enter shows one, Escape leaves it." }),
        faint(`${page.map}. Colours are class folders.`),
        faint(`Distances are Euclidean, of whole rows, not on the map. Two images are usually ${digits(page.usual)} apart (median).`),
        ...page.notes.map((note) => el("p", { textContent: note })),
      );
    } else {
      reveal(row);
      const name = el("figcaption", {}, el("b", {}, named(row)), el("br"),
        el("small", { textContent: `row ${row + 1} ` }),
        page.folder ? el("a", { href: link(row), target: "_blank", textContent: "the file" }) : null);
      $("one").replaceChildren(
        el("figure", {}, picture(row), name,
          el("button", { type: "button", textContent: "✕", ariaLabel: "Close", onclick: () => select(-1) })),
        el("h3", { textContent: `Nearest ${page.columns}` }),
        el("div", { className: "cards" }, ...nearest(row).map((other, at) => card(other, distances[row * page.columns + at]))),
      );
      $("one").scrollTop = 0;
      const { top, bottom } = $("one").getBoundingClientRect();
      if (top > innerHeight - 200 || bottom < 80) $("one").scrollIntoView();
    }
    mark();
  }

  // -- search and keys ------------------------------------------------------------------------------------------

  const input = document.querySelector("#search input");
  const folded = page.names.map((name) => name.normalize("NFC").toLowerCase());
  function search() {
    const words = input.value.normalize("NFC").toLowerCase().trim();
    const rows = words ? [...folded.keys()].filter((row) => folded[row].includes(words)) : [];
    $("found").hidden = !words;
    $("found").replaceChildren(
      ...rows.slice(0, 20).map((row) => el("button", { type: "button", onclick: () => { leaveSearch(); select(row); } }, picture(row), named(row))),
      faint(rows.length ? `${rows.length.toLocaleString("en")} found` : "No name contains that."),
    );
  }
  function leaveSearch() {
    input.value = "";
    search();
  }
  input.addEventListener("input", search);
  $("search").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target === input) $("found").querySelector("button")?.click();
    if (event.key === "ArrowDown" && event.target === input) $("found").querySelector("button")?.focus();
    if (event.key === "ArrowUp" && event.target === $("found").firstChild) input.focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      if (input.value) { leaveSearch(); input.focus(); }
      else { hover(-1); select(-1); }
    }
    const way = { ArrowRight: "next", ArrowDown: "next", ArrowLeft: "previous", ArrowUp: "previous" }[event.key];
    if (way && event.target.matches(".card, #found button")) {
      event.preventDefault();
      const other = event.target[`${way}ElementSibling`];
      if (other?.matches("button")) other.focus();
    }
  });

  // -- the rest of the page -------------------------------------------------------------------------------------

  $("what").textContent = `${page.record.identity.network}, ${page.record.columns.toLocaleString("en")} values per image`;

  const counts = page.classes.map(() => 0);
  labels.forEach((label) => counts[label]++);
  function paint(label) {
    only = only === label ? -1 : label;
    [...$("legend").children].forEach((button, at) => at < page.classes.length && (button.ariaPressed = at === only));
    source.data = { ...source.data, colour: Array.from(labels, (at, row) => (only < 0 || at === only ? colour(row) : "#8884")) };
    draw();
  }
  $("legend").append(
    ...page.classes.slice(0, 40).map((name, at) =>
      el("button", { type: "button", ariaPressed: false, onclick: () => paint(at) },
        el("i", { style: `background: ${page.colours[at % page.colours.length]}` }),
        el("span", { dir: "auto", textContent: name || "no folder" }), ` ${counts[at].toLocaleString("en")}`)),
    page.classes.length > 40 ? `and ${page.classes.length - 40} more` : "",
    el("button", { className: "whole", type: "button", textContent: "whole map", onclick: () => figure.reset.emit() }),
  );

  $("alone").append(
    el("h2", { textContent: `The ${page.alone.length} farthest from all others` }),
    faint("Every other image is at least this far away: what a search for novelties looks for."),
    el("div", { className: "cards" }, ...page.alone.map((row) => card(row, distances[row * page.columns]))),
  );

  const limit = `nearer than ${digits(page.usual * page.nearer)}, a tenth of the usual distance`;
  const more = page.twins_all > page.twins.length ? `; the nearest ${page.twins.length} are shown` : "";
  $("twins").append(
    el("h2", { textContent: "Near-duplicates" }),
    faint(page.twins_all ? `${page.twins_all.toLocaleString("en")} pairs ${limit}${more}.` : `No two images are ${limit}.`),
    el("div", { className: "pairs" }, ...page.twins.map(([one, other], at) =>
      el("div", { className: "pair" }, el("b", { textContent: digits(page.apart[at]) }), card(one), card(other)))),
  );

  $("faults").append(
    el("h2", { textContent: "Could not be read" }),
    page.faults.length
      ? el("table", {}, ...page.faults.map(([path, reason, exception]) =>
          el("tr", {}, el("td", { dir: "auto", textContent: path }), el("td", {}, reason, el("br"), el("small", { className: "faint", textContent: exception })))))
      : faint("Every image could be read."),
  );

  const words = (value) => (Array.isArray(value) ? value.map(words).join(", ") : value === null ? "none" : String(value));
  const list = (record) =>
    el("dl", {}, ...Object.entries(record).map(([key, value]) => {
      const nested = value !== null && typeof value === "object" && !Array.isArray(value);
      return el("div", { className: nested ? "nested" : "" },
        el("dt", { textContent: key.replaceAll("_", " ") }), el("dd", nested ? {} : { textContent: words(value) }, ...(nested ? [list(value)] : [])));
    }));
  $("record").append(el("h2", { textContent: "Record" }), faint("What made these rows."), list(page.record));

  drawThumbnails();
  // fc7.html#cats/felix.jpg begins with that image, its path encoded as in the link to its file.
  select(location.hash ? page.names.findIndex((_, row) => link(row) === page.folder + location.hash.slice(1)) : -1);
  document.documentElement.dataset.ready = "yes";
}

main().catch((err) => { $("what").textContent = `This page could not be drawn: ${err.message}`; throw err; });
