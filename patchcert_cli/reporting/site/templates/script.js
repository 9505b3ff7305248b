"use strict";
(() => {
  const all = (what, from = document) => [...from.querySelectorAll(what)];
  const one = (what) => document.querySelector(what);
  const [dataset, threat, filter, status] = ["#dataset", "#threat", "#filter", "#status"].map(one);
  const words = new Intl.Collator("en", {numeric: true});

  // Addresses: #data-set/threat shows these tables, #model/name opens a card.
  const plain = (text) => { try { return decodeURIComponent(text); } catch { return text; } };
  const pick = (select, text) => {
    const option = [...select.options].find((each) => !each.disabled && plain(each.value) === plain(text));
    select.value = option ? option.value : select.options[0].value;
  };

  function remember() {
    const chosen = dataset.value === "all" && !threat.value ? "" : "#" + dataset.value + (threat.value ? "/" + threat.value : "");
    try { history.replaceState(null, "", chosen || location.pathname + location.search); } catch { location.hash = chosen; }
  }

  function offer() {
    const fits = (each) => dataset.value === "all" || each.dataset.dataset === dataset.value;
    const known = new Set(all("section.threat").filter(fits).map((each) => each.dataset.threat));
    for (const option of threat.options) {
      const general = option.value === "" || option.value === "all";
      option.disabled = option.hidden = !general && !known.has(option.value);
    }
    if (threat.selectedOptions[0].disabled) threat.value = "";
  }

  function arrive() {
    const [first, ...rest] = location.hash.slice(1).split("/");
    if (first === "model" && rest.length) {
      const card = document.getElementById(location.hash.slice(1)) || document.getElementById(plain(location.hash.slice(1)));
      if (!card) return;
      if (card.hidden) { dataset.value = "all"; threat.value = filter.value = ""; offer(); show(); }
      card.open = true;
      card.scrollIntoView();
    } else if (!first || !rest.length || rest[0]) {
      pick(dataset, first || "all");
      offer();
      pick(threat, rest.join("/"));
      show();
    }
  }

  // What is shown.
  function show() {
    const asked = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const named = (each) => asked.every((word) => each.dataset.words.includes(word));
    const ours = (each) => dataset.value === "all" || each.dataset.dataset === dataset.value;
    const meant = (board) => threat.value === "all" || (threat.value ? board.dataset.threat === threat.value : board.dataset.own);
    const seen = new Set();
    for (const board of all("section.threat")) {
      let rows = 0;
      for (const row of all("tbody tr", board)) {
        row.hidden = !named(row);
        rows += !row.hidden;
      }
      board.hidden = !(rows && ours(board) && meant(board));
      if (!board.hidden) all("tbody tr:not([hidden]) th", board).forEach((each) => seen.add(each.dataset.value));
    }
    const kind = threat.value.split(":")[0];
    for (const curve of all("figure.curve")) {
      const names = all(".legend li", curve).some((each) => asked.every((word) => each.dataset.words.includes(word)));
      curve.hidden = !(ours(curve) && (!kind || kind === "all" || kind === curve.dataset.kind) && (names || !asked.length));
    }
    for (const part of all("section.data")) part.hidden = !all("section.threat, figure.curve", part).some((each) => !each.hidden);
    for (const part of all("section.unmeasured")) {
      const rows = all(".board tbody tr", part);
      for (const each of all("[data-words]", part)) each.hidden = !(named(each) && ours(each));
      part.hidden = rows.every((row) => row.hidden);
    }
    const cards = all("details.card");
    cards.forEach((card) => { card.hidden = !(named(card) && ours(card)); });
    one("#models\\/").hidden = cards.every((card) => card.hidden);
    status.textContent = seen.size === 1 ? "1 model in these tables" : (seen.size || "No") + " models in these tables";
  }

  // Sorting: stable, and what has no value stays last both ways.
  function sort(head, table) {
    const numeric = head.dataset.sort === "number";
    const before = head.getAttribute("aria-sort");
    const first = numeric && head.textContent.trim() !== "Rank" ? "descending" : "ascending";
    const way = before ? (before === "ascending" ? "descending" : "ascending") : first;
    const column = Number(head.dataset.column);
    const value = (row) => row.cells[column].dataset.value;
    const compare = (a, b) => (numeric ? Number(a) - Number(b) : words.compare(a, b));
    const rows = all("tbody tr", table).sort((a, b) => {
      const [left, right] = [value(a), value(b)];
      if (left === undefined || right === undefined) return (left === undefined) - (right === undefined);
      return way === "ascending" ? compare(left, right) : compare(right, left);
    });
    all("th[aria-sort]", table).forEach((each) => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", way);
    table.tBodies[0].append(...rows);
  }

  function makeSortable(table) {
    const [top, below] = table.tHead.rows;
    let column = 0;
    const group = [...below.cells];
    for (const head of [...top.cells].flatMap((each) => (each.colSpan > 1 ? group.splice(0, each.colSpan) : [each]))) {
      head.dataset.column = column++;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      button.addEventListener("click", () => sort(head, table));
      head.append(button);
    }
  }

  function makeCopyable(lines) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(lines.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(lines);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    const frame = document.createElement("div");
    frame.className = "copyable";
    lines.replaceWith(frame);
    frame.append(lines, button);
  }

  all("table.board").forEach(makeSortable);
  all("pre").forEach(makeCopyable);
  dataset.addEventListener("change", () => { offer(); show(); remember(); });
  threat.addEventListener("change", () => { show(); remember(); });
  filter.addEventListener("input", show);
  addEventListener("hashchange", arrive);
  one("#controls").hidden = false;
  offer();
  show();
  arrive();
})();
