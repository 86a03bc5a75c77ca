// Sorts and pages tables, shows and hides methods, lays small frames out for the width at hand, and
// shows the numbers behind marks. Without it the page is complete. No storage, no network: it runs in a
// sandboxed frame.
(() => {
  "use strict";
  const all = (what, where = document) => [...where.querySelectorAll(what)];
  const hidden = new Set();
  const figures = all("figure > svg").map((svg) => {
    const box = svg.getAttribute("viewBox").split(" ").map(Number);
    const own = all("[data-m]", svg).filter((part) => !part.parentElement.closest("[data-m]"));
    return { svg, own, width: box[2], height: box[3], data: svg.dataset };
  });

  // Order of the methods as the result table stands.
  const order = () => all("#result tbody tr").map((row) => row.dataset.m);

  function arrange(figure, printing) {
    const { svg, own, width, height, data } = figure;
    for (const part of own) part.classList.toggle("away", hidden.has(part.dataset.m));
    if (!data.order) return;
    const slots = data.order.split(",");
    const shown = order().filter((m) => slots.includes(m) && !hidden.has(m));
    const drawn = Number(data.columns);
    const [right, down, head] = [data.right, data.down, data.head].map(Number);
    const fitting = Math.max(2, Math.floor(svg.parentElement.clientWidth / 175));
    const columns = right === 0 || printing ? drawn : Math.min(fitting, Math.max(2, shown.length));
    for (const part of own) {
      const was = slots.indexOf(part.dataset.m), is = shown.indexOf(part.dataset.m);
      if (is < 0) continue;
      const x = ((is % columns) - (was % drawn)) * right;
      const y = (Math.floor(is / columns) - Math.floor(was / drawn)) * down;
      part.setAttribute("transform", `translate(${x.toFixed(2)} ${y.toFixed(2)})`);
    }
    const rows = Math.ceil(shown.length / columns);
    const wide = right === 0 ? width : Math.max(2, columns) * right;
    const tall = head + rows * down + (height - head - Math.ceil(slots.length / drawn) * down);
    svg.setAttribute("viewBox", `0 0 ${wide.toFixed(2)} ${tall.toFixed(2)}`);
    if (right) svg.style.maxWidth = `${Math.round(wide * 1.9)}px`;
  }

  // Long tables and lists are shown a page at a time, in print whole.
  const PAGE = 50;
  const pagers = all("table.sortable > tbody, ul.verdicts")
    .filter((list) => list.children.length > PAGE)
    .map((list) => {
      const bar = document.createElement("p"), text = document.createElement("span");
      const pager = { list, bar, text, from: 0, size: PAGE };
      const button = (name, act) => {
        const made = document.createElement("button");
        made.type = "button";
        made.textContent = name;
        made.addEventListener("click", () => { act(); turn(pager); });
        return made;
      };
      pager.back = button("previous", () => { pager.from -= PAGE; });
      pager.on = button("next", () => { pager.from += PAGE; });
      const whole = button("all", () => { pager.size = pager.size === PAGE ? Infinity : PAGE; });
      bar.className = "pager";
      bar.append(text, pager.back, pager.on, whole);
      (list.closest(".scroll") || list).after(bar);
      return pager;
    });
  function turn(pager) {
    const shown = [...pager.list.children].filter((item) => !item.classList.contains("away"));
    const last = PAGE * Math.floor(Math.max(0, shown.length - 1) / PAGE);
    pager.from = pager.size === PAGE ? Math.min(Math.max(0, pager.from), last) : 0;
    const to = Math.min(pager.from + pager.size, shown.length);
    shown.forEach((item, i) => item.classList.toggle("later", i < pager.from || i >= to));
    pager.text.textContent = `${shown.length ? pager.from + 1 : 0} to ${to} of ${shown.length}`;
    pager.back.disabled = pager.from === 0;
    pager.on.disabled = to === shown.length;
  }

  function update(printing = false) {
    for (const row of all("tr[data-m], li[data-m], details[data-m]"))
      row.classList.toggle("away", hidden.has(row.dataset.m));
    for (const figure of figures) arrange(figure, printing);
    for (const pager of pagers) turn(pager);
  }

  // Methods to show.
  const picker = document.getElementById("picker");
  const boxes = picker ? all("input[type=checkbox]", picker) : [];
  const search = picker && picker.querySelector("input[type=search]");
  const found = (box) =>
    !search || box.parentElement.textContent.toLowerCase().includes(search.value.trim().toLowerCase());
  function pick() {
    hidden.clear();
    for (const box of boxes) {
      box.parentElement.classList.toggle("away", !found(box));
      if (!box.checked || !found(box)) hidden.add(box.value);
    }
    update();
  }
  if (picker) {
    picker.hidden = false;
    picker.addEventListener("change", pick);
    if (search) search.addEventListener("input", pick);
    for (const button of all("button", picker))
      button.addEventListener("click", () => {
        for (const box of boxes.filter(found)) box.checked = button.value === "all";
        pick();
      });
  }

  // A method under the pointer or the focus stands out in all figures.
  function focus(event) {
    const at = event.target.closest && event.target.closest("tr[data-m], #picker label[data-m]");
    const m = at && at.dataset.m;
    document.body.classList.toggle("focus", Boolean(m) && !hidden.has(m));
    for (const part of all(".hot")) part.classList.remove("hot");
    if (m) for (const part of all(`[data-m="${m}"]`)) part.classList.add("hot");
  }
  document.addEventListener("pointerover", focus);
  document.addEventListener("focusin", focus);

  // Tables sort by the number behind a cell, words by their text; a third click restores.
  function sort(table, column, direction) {
    const rows = [...table.tBodies[0].rows];
    const numbers = rows.some((row) => row.cells[column].dataset.v !== undefined);
    const key = (row) => {
      const cell = row.cells[column], glyph = cell.querySelector(".glyph");
      if (numbers) return cell.dataset.v === undefined ? null : Number(cell.dataset.v);
      return cell.textContent.slice(glyph ? glyph.textContent.length : 0);
    };
    rows.sort((a, b) => a.dataset.i - b.dataset.i);
    if (direction)
      rows.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        return direction * (numbers ? x - y : x.localeCompare(y));
      });
    table.tBodies[0].append(...rows);
    if (table.id === "result") update();
    else for (const pager of pagers) if (pager.list === table.tBodies[0]) turn(pager);
  }
  for (const table of all("table.sortable")) {
    [...table.tBodies[0].rows].forEach((row, i) => { row.dataset.i = i; });
    const heads = all("thead th", table);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const next = { ascending: "descending", descending: "none" };
        const to = next[head.getAttribute("aria-sort")] || "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        if (to !== "none") head.setAttribute("aria-sort", to);
        sort(table, column, { ascending: 1, descending: -1, none: 0 }[to]);
      });
    });
  }

  // The number behind the nearest mark, for mouse, pen and finger.
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);
  for (const { svg } of figures) {
    const marks = all("title", svg).map((title) => {
      const mark = { part: title.parentElement, text: title.textContent };
      title.remove(); // or the browser would show it as well
      return mark;
    });
    const show = (event) => {
      let best = null, least = 16;
      for (const { part, text } of marks) {
        const box = part.getBoundingClientRect();
        if (!box.width && !box.height) continue;
        const dx = Math.max(box.left - event.clientX, 0, event.clientX - box.right);
        const dy = Math.max(box.top - event.clientY, 0, event.clientY - box.bottom);
        const far = Math.hypot(dx, dy) + Math.hypot(box.width, box.height) / 1e3;
        if (far < least) [best, least] = [text, far];
      }
      tip.hidden = best === null;
      if (best === null) return;
      tip.textContent = best;
      const { offsetWidth: width, offsetHeight: height } = tip;
      const left = Math.min(event.clientX + 12, innerWidth - width - 8);
      const above = event.clientY - height - 12;
      tip.style.left = `${Math.max(8, left)}px`;
      tip.style.top = `${above > 4 ? above : event.clientY + 18}px`;
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse") tip.hidden = true; // a finger leaves as soon as it lifts
    });
  }
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest("figure svg")) tip.hidden = true;
  });
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  for (const part of all("details.more")) part.addEventListener("toggle", () => update());
  addEventListener("resize", () => update());
  addEventListener("beforeprint", () => update(true));
  addEventListener("afterprint", () => update());
  if (picker) pick();
  else update();
})();
