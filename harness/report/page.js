// Filters, deep links and packed parts. The page reads without it; state lives in the URL's fragment.
"use strict";
(() => {
  const form = document.querySelector("form.filter");
  const output = form.querySelector("output");
  const missing = document.querySelector(".missing");
  const fields = [...form.querySelectorAll("select")].map((select) => select.name);
  const cells = [...document.querySelectorAll("details.cell")].map((element) => ({
    element,
    id: element.dataset.id,
    facets: fields.map((name) => element.dataset[name]),
    text: (element.dataset.id + " " + element.querySelector("summary").textContent).toLowerCase(),
    shown: true,
  }));
  const byId = new Map(cells.map((cell) => [cell.id, cell]));
  const groups = [...document.querySelectorAll("section.group")].map((element) => ({
    element,
    cells: [...element.querySelectorAll("details.cell")].map((cell) => byId.get(cell.dataset.id)),
  }));
  const squares = [...document.querySelectorAll("a.square")];
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

  function filter() {
    const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = fields.map((name) => form.elements[name].value);
    let seen = 0;
    for (const cell of cells) {
      const fits = wanted.every((value, i) => !value || value === cell.facets[i]) && words.every((w) => cell.text.includes(w));
      if (fits !== cell.shown) cell.element.hidden = !(cell.shown = fits);
      if (fits) seen += 1;
    }
    const live = new Set();
    for (const group of groups) {
      const any = group.cells.some((cell) => cell.shown);
      if (group.element.hidden === any) group.element.hidden = !any;
      if (any) live.add(group.element.id);
    }
    for (const square of squares) square.classList.toggle("dim", !live.has(square.hash.slice(1)));
    output.textContent = seen === cells.length ? count(seen) : `${seen.toLocaleString("en")} of ${count(cells.length)}`;
  }

  function remember() {
    const kept = ["text", ...fields].filter((name) => form.elements[name].value);
    const hash = kept.map((name) => `${name}=${encode(form.elements[name].value)}`).join("&");
    history.replaceState(null, "", hash ? "#" + hash : location.pathname + location.search);
  }

  // What the address asks for: a filter, a cell, or both. Any other fragment is a place in the page.
  function follow() {
    const asked = state();
    const names = ["text", ...fields].filter((name) => asked.has(name));
    const id = asked.get("cell");
    missing.hidden = true;
    if (names.length || location.hash.length < 2 || id !== null) {
      for (const name of ["text", ...fields]) form.elements[name].value = asked.get(name) ?? "";
      for (const name of fields)
        if (asked.get(name) && form.elements[name].value !== asked.get(name)) {
          missing.textContent = `This run has no ${name} “${asked.get(name)}”.`;
          missing.hidden = false;
          form.elements[name].value = "";
        }
      filter();
    }
    if (id !== null) show(id);
    else if (names.length) document.getElementById("cells").scrollIntoView();
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
    cell.element.scrollIntoView();
    cell.element.querySelector("summary").focus({ preventScroll: true });
  }

  form.addEventListener("input", () => { filter(); remember(); });
  form.addEventListener("reset", () => setTimeout(() => { missing.hidden = true; filter(); remember(); }));
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
    }
  });
  follow();
})();
