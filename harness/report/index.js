// Sorts the tables of runs by a column. The page reads without it.
"use strict";
(() => {
  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const body = head.closest("table").tBodies[0];
      const place = head.cellIndex;
      const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const key = (row) => row.cells[place].dataset.key ?? row.cells[place].textContent.trim();
      const rows = [...body.rows].sort((a, b) => down * key(a).localeCompare(key(b), "en", { numeric: true }));
      for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
      body.append(...rows);
    });
  }
})();
