// Filters, deep links and packed parts. The page reads without it; state lives in the URL's fragment.
"use strict";
(() => {
  const form = document.querySelector("form.filter");
  const output = form.querySelector("output");
  const missing = document.querySelector(".missing");
  const fields = [...form.querySelectorAll("select:not([name=sort])")].map((select) => select.name);
  const kept = ["text", ...fields, "sort"];
  const cells = [...document.querySelectorAll("details.cell")].map((element, place) => ({
    element,
    place,
    id: element.dataset.id,
    order: element.dataset.order.split(" ").map((value) => (value === "-" ? NaN : Number(value))),
    facets: fields.map((name) => element.dataset[name].split("\n")), // of suites there may be several
    text: (element.dataset.id + " " + element.querySelector("summary").textContent).toLowerCase(),
    shown: true,
  }));
  const byId = new Map(cells.map((cell) => [cell.id, cell]));
  const groups = [...document.querySelectorAll("section.group")].map((element) => ({
    element,
    cells: [...element.querySelectorAll("details.cell")].map((cell) => byId.get(cell.dataset.id)),
  }));
  // Each square, and for each cell the places of its squares: by backend and by model.
  const squares = [...document.querySelectorAll("a.square")];
  const places = new Map();
  squares.forEach((element, place) => {
    const asked = new URLSearchParams(element.hash.slice(1));
    places.set([asked.has("model") ? "model" : "backend", ...asked.values()].join("\n"), place);
  });
  for (const cell of cells) {
    const { kind, column, hardware } = cell.element.dataset;
    const keys = ["backend", "model"].map((by) => [by, kind, cell.element.dataset[by], column, hardware].join("\n"));
    cell.squares = keys.map((key) => places.get(key)).filter((place) => place !== undefined);
  }
  const flat = document.createElement("section");
  flat.className = "group flat";
  let sorted = "";
  const list = document.getElementById("cells");
  let later = 0; // the timer of what is still to be written
  const against = document.querySelector("select.against");
  const encode = (value) => encodeURIComponent(value).replace(/%(2F|3A|40|2C|3B|24)/g, decodeURIComponent);
  const count = (n) => n.toLocaleString("en") + (n === 1 ? " cell" : " cells");
  const state = () => new URLSearchParams(location.hash.slice(1));

  async function unpacked(base64) {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
    return new Response(stream).text();
  }

  async function fill(element) {
    const body = element.querySelector(".body");
    const base64 = body.dataset.packed;
    if (!base64) return;
    delete body.dataset.packed;
    body.insertAdjacentHTML("beforeend", await unpacked(base64)); // escaped when it was written
  }

  // Writes what the filter found, and says how many rows each step shows: hiding is cheap and done before the first
  // of them, so that no row stands there wrongly. A group without a match is hidden as a whole, and its cells are left
  // as they are until it comes back.
  function* changes() {
    const live = [];
    for (const group of sorted ? [{ element: flat, cells }] : groups) {
      if (!group.cells.some((cell) => cell.shown)) group.element.hidden = true;
      else live.push(group);
    }
    for (const group of live)
      for (const cell of group.cells) if (!cell.shown && !cell.element.hidden) cell.element.hidden = true;
    for (const group of live) {
      const back = group.element.hidden;
      let count = 0;
      for (const cell of group.cells) {
        if (cell.shown) count += 1;
        if (!cell.shown || !cell.element.hidden) continue;
        cell.element.hidden = false;
        if (!back) yield 1;
      }
      if (!back) continue;
      group.element.hidden = false;
      yield count;
    }
  }

  // In pages of many thousand cells the first rows are right at once, and those far below a moment later.
  function write(steps) {
    let step = steps.next();
    for (let rows = 0; !step.done && (rows += step.value) < 1000; ) step = steps.next();
    list.ariaBusy = step.done ? null : "true";
    if (!step.done) later = setTimeout(write, 0, steps);
  }

  function filter() {
    const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = fields.map((name, i) => [i, form.elements[name].value]).filter(([, value]) => value);
    const live = new Uint8Array(squares.length);
    let seen = 0;
    for (const cell of cells) {
      cell.shown = wanted.every(([i, value]) => cell.facets[i].includes(value)) && words.every((w) => cell.text.includes(w));
      if (!cell.shown) continue;
      seen += 1;
      for (const place of cell.squares) live[place] = 1;
    }
    clearTimeout(later);
    write(changes());
    squares.forEach((square, place) => square.classList.toggle("dim", seen < cells.length && !live[place]));
    output.textContent = seen === cells.length ? count(seen) : `${seen.toLocaleString("en")} of ${count(cells.length)}`;
  }

  // Least first; what has no such number comes last. Ties keep the order of the squares.
  const keys = {
    verdict: (cell) => cell.order[0],
    kv: (cell) => cell.order[1],
    near: (cell) => -cell.order[2],
    time: (cell) => -cell.order[3],
  };

  function sort() {
    const wanted = form.elements.sort.value;
    if (wanted === sorted) return;
    sorted = wanted;
    if (!wanted) {
      for (const group of groups) group.element.append(...group.cells.map((cell) => cell.element));
      flat.remove();
      return;
    }
    const key = keys[wanted];
    const number = (cell) => (Number.isNaN(key(cell)) ? Infinity : key(cell));
    const found = [...cells].sort(
      wanted === "name" ? (a, b) => (a.id < b.id ? -1 : 1) : (a, b) => number(a) - number(b) || a.place - b.place,
    );
    flat.replaceChildren(...found.map((cell) => cell.element));
    for (const group of groups) group.element.hidden = true;
    list.append(flat);
  }

  // The comparison with another run travels packed, written and escaped by the same template as the one shown.
  const first = document.querySelector(".comparison")?.innerHTML;
  async function compare() {
    const packed = against.selectedOptions[0].dataset.packed;
    document.querySelector(".comparison").innerHTML = packed ? await unpacked(packed) : first;
  }

  function remember() {
    const asked = kept.filter((name) => form.elements[name].value).map((name) => [name, form.elements[name].value]);
    if (against?.selectedIndex > 0) asked.push(["against", against.value]);
    const hash = asked.map(([name, value]) => `${name}=${encode(value)}`).join("&");
    history.replaceState(null, "", hash ? "#" + hash : location.pathname + location.search);
  }

  // What the address asks for: a filter, a cell, or both. Any other fragment is a place in the page.
  function follow() {
    const asked = state();
    const names = kept.filter((name) => asked.has(name));
    const id = asked.get("cell");
    missing.hidden = true;
    const run = [...(against?.options ?? [])].findIndex((option) => option.value === asked.get("against"));
    if (run >= 0 && run !== against.selectedIndex) {
      against.selectedIndex = run;
      compare();
    }
    if (names.length || location.hash.length < 2 || id !== null) {
      for (const name of kept) form.elements[name].value = asked.get(name) ?? "";
      for (const name of [...fields, "sort"])
        if (asked.get(name) && form.elements[name].value !== asked.get(name)) {
          missing.textContent = `This run has no ${name} “${asked.get(name)}”.`;
          missing.hidden = false;
          form.elements[name].value = "";
        }
      const more = form.querySelector(".more");
      if (more && [...more.querySelectorAll("select")].some((select) => select.value)) more.open = true;
      sort();
      filter();
    }
    if (id !== null) show(id);
    else if (names.length) list.scrollIntoView();
  }

  async function show(id) {
    const cell = byId.get(id);
    if (!cell) {
      missing.textContent = `This run has no cell ${id}.`;
      missing.hidden = false;
      missing.scrollIntoView({ block: "center" });
      return;
    }
    cell.element.hidden = false;
    cell.element.parentElement.hidden = false;
    cell.shown = true;
    await fill(cell.element);
    cell.element.open = true;
    cell.element.querySelector("summary").focus({ preventScroll: true });
    // Rows above that were never drawn have a guessed height: once more when the near ones have their own.
    for (let turn = 0; turn < 3; turn++) {
      cell.element.scrollIntoView({ behavior: "instant" });
      await new Promise(requestAnimationFrame);
    }
  }

  const refresh = () => { sort(); filter(); remember(); };
  form.addEventListener("input", refresh);
  form.addEventListener("reset", () => setTimeout(() => { missing.hidden = true; refresh(); }));
  against?.addEventListener("change", () => { compare(); remember(); });
  // Headings of squares stick below the bar, however many lines it has.
  new ResizeObserver(() => document.documentElement.style.setProperty("--bar", `${form.offsetHeight}px`)).observe(form);
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", follow);
  document.addEventListener("toggle", (event) => {
    if (event.target.open && event.target.matches("details.cell")) fill(event.target);
  }, true);
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button");
    const link = event.target.closest('a[href^="#"]');
    if (link && link.hash === location.hash) follow(); // the same address again: no hashchange comes
    if (button?.matches(".unpack")) {
      const text = await unpacked(button.dataset.packed);
      button.previousElementSibling.textContent = text;
      button.previousElementSibling.focus();
      button.remove();
    } else if (button?.matches(".copy")) {
      const pre = button.previousElementSibling;
      getSelection().selectAllChildren(pre);
      try {
        await navigator.clipboard.writeText(pre.textContent);
        button.textContent = "Copied";
      } catch {
        button.textContent = "Selected";
      }
      button.removeAttribute("aria-label"); // what it says now is its name
    }
  });
  follow();
})();
