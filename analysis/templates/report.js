"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const CIVIDIS = [[0, 34, 78], [53, 69, 108], [102, 105, 112], [148, 142, 119], [200, 184, 102], [254, 232, 56]];
  const COST = [[255, 247, 188], [254, 196, 79], [236, 112, 20], [140, 45, 4]];
  const VIEWS = { oracle: "Oracle", routed: "Routed", cost: "Cost of routing", confusion: "Routed to" };
  const at = (list) => Object.fromEntries(list.map((name, k) => [name, k]));
  const CELL = at(data.cell), EXAMPLE = at(data.example);
  const OF_NO_ROUTING = new Set(data.of_no_routing);
  const state = { run: 0, view: "routed", only: null };
  const tip = make("div", { id: "tip", role: "tooltip", hidden: "" });
  document.body.append(tip);

  // Text only ever enters the page as text, never as markup.
  function make(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
    node.append(...children.map((c) => (c instanceof Node ? c : document.createTextNode(String(c)))));
    return node;
  }
  const percent = (share, digits = 1) => {
    if (share === null || Number.isNaN(share)) return "n/a";
    const text = (100 * share).toFixed(digits);
    return (Number(text) === 0 ? (0).toFixed(digits) : text).replace("-", "−");
  };
  function colour(stops, level) {
    const place = Math.min(Math.max(level, 0), 1) * (stops.length - 1);
    const k = Math.min(Math.floor(place), stops.length - 2);
    const rgb = stops[k].map((c, j) => c + (place - k) * (stops[k + 1][j] - c));
    const light = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    const luminance = 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2];
    return [`rgb(${rgb.map(Math.round).join(",")})`, luminance < 0.179 ? "#fff" : "#000"];
  }

  function show(cell, text) {
    tip.textContent = text;
    tip.hidden = false;
    const box = cell.getBoundingClientRect();
    const left = Math.min(box.left + window.scrollX, window.scrollX + document.documentElement.clientWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = `${Math.max(left, 8)}px`;
    tip.style.top = `${window.scrollY + (above > 0 ? above : box.bottom + 6)}px`;
  }
  const hide = () => { tip.hidden = true; };

  const taskName = (run, k) => {
    const task = (data.streams[run.stream].tasks || [])[k];
    const plain = `task ${k + 1}`;
    return task && task.name && task.name !== plain ? `${plain} (${task.name})` : plain;
  };
  const className = (run, id) => {
    const name = data.streams[run.stream].class_names[id];
    return name === undefined ? String(id) : name;
  };

  function counts(run, t, i, cell) {
    const n = cell[CELL.n];
    const line = (what, count) => `${what}: ${count === null ? "n/a" : `${count} of ${n} (${percent(count / n)} %)`}`;
    return [
      `After task ${t + 1}, on ${taskName(run, i)}`,
      line("right with the oracle", cell[CELL.oracle_right]),
      line("right as routed", cell[CELL.routed_right]),
      line("routed to its task", cell[CELL.route_right]),
      line("lost by routing", cell[CELL.lost]),
      line("gained by routing", cell[CELL.lucky]),
    ].join("\n");
  }

  /** Rows of {value, text, note, click} or null, with the colours that fit. */
  function cells(run) {
    if (state.view === "confusion") {
      return run.confusion.map((row, t) => {
        const total = row.reduce((a, b) => a + b, 0);
        const last = row.length - 1;
        const columns = run.confusion.some((r) => r[last]) ? row : row.slice(0, last);
        return columns.map((count, i) => ({
          value: total ? count / total : null,
          text: String(count),
          note: `${taskName(run, t)}\nrouted to ${i === last ? "no task" : taskName(run, i)}: ${count} of ${total} samples`,
          click: i !== last && i !== t && count ? [t + 1, i + 1] : null,
        }));
      });
    }
    return run.cells.map((row, t) => row.map((cell, i) => {
      if (cell === null || !cell[CELL.n]) return null;
      const oracle = cell[CELL.oracle_right] / cell[CELL.n], routed = cell[CELL.routed_right] / cell[CELL.n];
      const value = { oracle, routed, cost: oracle - routed }[state.view];
      return { value, text: percent(value, run.cells.length > 8 ? 0 : 1), note: counts(run, t, i, cell), click: null };
    }));
  }

  function matrix(run) {
    const rows = cells(run);
    const cost = state.view === "cost", confusion = state.view === "confusion";
    const values = rows.flat().filter(Boolean).map((c) => c.value);
    const low = cost ? Math.min(0, ...values) : 0, high = cost ? Math.max(0.05, ...values) : 1;
    const width = Math.max(0, ...rows.map((row) => row.length));
    const names = [...Array(width).keys()].map((i) => (confusion && i >= rows.length ? "none" : String(i + 1)));
    const head = make("tr", {}, make("th", {}, confusion ? "true \\ to" : "after \\ on"), ...names.map((n) => make("th", { scope: "col" }, n)));
    const body = rows.map((row, t) => make("tr", {}, make("th", { scope: "row" }, String(t + 1)), ...row.map((cell) => {
      if (!cell) return make("td");
      const node = make("td", { tabindex: "0", "aria-label": cell.note }, cell.text);
      if (cell.value !== null) [node.style.background, node.style.color] = colour(cost ? COST : CIVIDIS, (cell.value - low) / (high - low));
      for (const event of ["mouseenter", "focus", "click"]) node.addEventListener(event, () => show(node, cell.note));
      for (const event of ["mouseleave", "blur"]) node.addEventListener(event, hide);
      if (cell.click) {
        node.classList.add("click");
        const pick = () => { state.only = cell.click; drawExamples(run); };
        node.addEventListener("click", pick);
        node.addEventListener("keydown", (event) => { if (event.key === "Enter") pick(); });
      }
      return node;
    })));
    return make("table", { class: "matrix" }, make("thead", {}, head), make("tbody", {}, ...body));
  }

  function numbers(run) {
    const countLike = (name) => /(_parameters|_bytes|_modules)$/.test(name);
    const value = (name, x) => (x === null ? "n/a" : countLike(name) ? x.toLocaleString("en") : percent(x));
    const head = make("tr", {}, ...["", "oracle", "routed"].map((h, k) => make("th", k ? { class: "number" } : {}, h)));
    const rows = run.metrics.map(([name, oracle, routed, none]) => {
      const label = name.replaceAll("_", " ") + (countLike(name) ? "" : " (%)");
      const one = [make("td", { class: "number", colspan: "2" }, value(name, none))];
      const two = [oracle, routed].map((x) => make("td", { class: "number" }, value(name, x)));
      return make("tr", {}, make("th", { scope: "row" }, label), ...(OF_NO_ROUTING.has(name) ? one : two));
    });
    return make("table", { id: "numbers" }, make("thead", {}, head), make("tbody", {}, ...rows));
  }

  function outcome(row) {
    const label = row[EXAMPLE.label];
    const oracle = row[EXAMPLE.oracle_prediction] === label, routed = row[EXAMPLE.routed_prediction] === label;
    if (oracle) return routed ? "right all the same" : "lost by routing";
    return routed ? "gained by routing" : "wrong either way";
  }

  function drawExamples(run) {
    const place = document.getElementById("examples");
    if (run.examples === null) {
      place.replaceChildren(make("p", { class: "note" }, "The predictions of this run could not be read, so there are no examples and no routes."));
      return;
    }
    const { total, rows } = run.examples;
    const only = state.only;
    const shown = only ? rows.filter((r) => r[EXAMPLE.eval_task] === only[0] && r[EXAMPLE.routed_task] === only[1]) : rows;
    const about = only
      ? `${shown.length} of task ${only[0]} routed to task ${only[1]}, among the ${rows.length} kept of ${total}.`
      : `${rows.length} of ${total}, after task ${run.done}.`;
    const told = make("p", { class: "note", "aria-live": "polite" }, total ? about : "None: every sample was routed to its task, or the learner tells no task.");
    const parts = [make("h3", {}, "Misrouted examples"), told];
    if (only) {
      const all = make("button", { class: "clear", type: "button" }, "Show all");
      all.addEventListener("click", () => { state.only = null; drawExamples(run); });
      parts.push(all);
    }
    if (shown.length) {
      const heads = ["row", "true task", "routed to", "label", "oracle's answer", "routed answer", "outcome", "margin", "confidence"];
      const head = make("tr", {}, ...heads.map((h) => make("th", {}, h)));
      const body = shown.map((r) => make("tr", {}, ...[
        r[EXAMPLE.row], r[EXAMPLE.eval_task], r[EXAMPLE.routed_task],
        className(run, r[EXAMPLE.label]), className(run, r[EXAMPLE.oracle_prediction]), className(run, r[EXAMPLE.routed_prediction]),
        outcome(r), ...[EXAMPLE.margin, EXAMPLE.confidence].map((k) => (r[k] === null ? "n/a" : Number(r[k].toPrecision(3)))),
      ].map((text) => make("td", {}, text))));
      const table = make("table", { class: "sortable" }, make("thead", {}, head), make("tbody", {}, ...body));
      sortable(table);
      parts.push(make("div", { class: "scroll tall" }, table));
    }
    place.replaceChildren(...parts);
  }

  function draw() {
    hide();
    const run = data.runs[state.run];
    document.getElementById("pick").value = String(state.run);
    const about = document.getElementById("about");
    const settings = Object.entries(run.settings).map(([key, value]) => `${key}=${value}`).join("  ");
    about.replaceChildren(
      make("p", {}, make("b", {}, `${run.group}/${run.run}`), " ", make("span", { class: `state ${/^[a-z]+$/.test(run.state) ? run.state : ""}` }, run.state), `, ${run.done} of ${run.tasks === null ? "?" : run.tasks} tasks`),
      make("p", { class: "note" }, settings),
    );
    if (run.error) about.append(make("pre", {}, run.error));
    const views = make("div", { class: "tabs", role: "group", "aria-label": "What the matrix shows" }, ...Object.entries(VIEWS).map(([name, title]) => {
      const button = make("button", { type: "button", "aria-pressed": String(name === state.view) }, title);
      button.addEventListener("click", () => { state.view = name; draw(); });
      return button;
    }));
    const unit = { oracle: "Accuracy in %", routed: "Accuracy in %", cost: "Oracle minus routed, in points", confusion: "Samples" }[state.view];
    const left = run.done ? [views, make("p", { class: "note" }, unit), make("div", { class: "scroll" }, matrix(run))] : [make("p", {}, "No task is finished, so there are no numbers.")];
    document.getElementById("left").replaceChildren(...left);
    document.getElementById("right").replaceChildren(...(run.done ? [make("div", { class: "scroll" }, numbers(run))] : []));
    drawExamples(run);
  }

  function open(k) {
    if (k < 0 || k >= data.runs.length) return;
    [state.run, state.only] = [k, null];
    draw();
  }

  function sortable(table) {
    const body = table.tBodies[0];
    [...table.tHead.rows[0].cells].forEach((head, k) => {
      const button = make("button", { type: "button" }, ...head.childNodes);
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => row.cells[k].dataset.sort ?? row.cells[k].textContent;
        const rows = [...body.rows].sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          const [p, q] = [x, y].map((v) => (v.trim() === "" ? NaN : Number(v)));
          if (!Number.isNaN(p) && !Number.isNaN(q)) return p - q;
          if (!Number.isNaN(p) || !Number.isNaN(q)) return Number.isNaN(p) ? 1 : -1;
          return x.localeCompare(y, "en", { numeric: true });
        });
        body.append(...(down ? rows.reverse() : rows));
      });
    });
  }

  const runTable = document.getElementById("run-table");
  if (runTable) {
    const place = Object.fromEntries(data.runs.map((run, k) => [`${run.group}/${run.run}`, k]));
    for (const link of runTable.querySelectorAll("a.pick")) {
      const k = place[link.closest("td").dataset.sort];
      if (k === undefined) link.replaceWith(...link.childNodes);
      else link.addEventListener("click", () => open(k));
    }
    sortable(runTable);
  }
  if (!data.runs.length) return;
  const names = data.runs.map((run, k) => make("option", { value: String(k) }, [run.label, `seeds ${run.seeds}`, run.run, run.state === "finished" ? "" : run.state].filter(Boolean).join("  ·  ")));
  const pick = make("select", { id: "pick" }, ...names);
  pick.addEventListener("change", () => open(Number(pick.value)));
  document.getElementById("explorer").append(
    make("div", { class: "controls" }, make("label", {}, "Run", pick)),
    make("div", { id: "about" }),
    make("div", { class: "halves" }, make("div", { id: "left" }), make("div", { id: "right" })),
    make("div", { id: "examples" }),
  );
  open(Math.max(0, data.runs.findIndex((run) => run.state === "finished")));
})();
