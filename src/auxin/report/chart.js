"use strict";
(() => {
  const branches = JSON.parse(document.getElementById("data").textContent);
  const words = JSON.parse(document.getElementById("words").textContent);
  const chart = document.getElementById("chart");
  const AXES = {
    units: { title: `training ${words.unit}s`, hover: `%{x:.4s} ${words.unit}s` },
    flops: { title: "training FLOPs", hover: "%{x:.3e} FLOPs" },
    seconds: { title: "wall time", hover: "%{x:.0f} s" },
  };
  const ON_ALL = " on the whole held-out split";
  const WIDE = 760;
  const LABEL_HEIGHT = 17;
  const LATE_SHARE = 0.12; // of the cost: before it the loss falls steeply and hides everything after
  const BAND_SHARE = 0.4; // of the curves' height: so much is added for the bands on either side, at most
  const SMALLEST = 1e-6; // a logarithmic axis has no place for 0
  const state = {
    axis: "flops", range: words.range, scale: "linear", training: branches.some((branch) => branch.trained), hidden: new Set(),
  };
  const shown = () => branches.filter((branch) => !state.hidden.has(branch.name));
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const isDark = () => document.documentElement.dataset.theme === "dark";
  const hue = (branch) => (isDark() ? branch.dark : branch.light);

  function traces() {
    // The main branch is drawn last, over the others.
    const order = [...shown()].reverse();
    const result = [];
    order.forEach((branch) => { if (branch.validation.half && !instead(branch)) result.push(band(branch, branch.validation)); });
    if (state.training) order.forEach((branch) => result.push(curve(branch, branch.training, true)));
    order.forEach((branch) => result.push(curve(branch, branch.validation, false)));
    order.forEach((branch) => { if (branch.growths.length) result.push(growths(branch)); });
    order.forEach((branch) => { if (branch.end?.apart) result.push(whole(branch)); });
    return result;
  }

  /** Whether the training loss is drawn in place of a line between points that are far apart. */
  const instead = (branch) => state.training && branch.trained;

  /** `values` of points, cut into the pieces that a line may join. */
  function pieces(points, values) {
    let start = 0;
    return (points.lines ?? [values.length]).map((length) => values.slice(start, (start += length)));
  }

  /** `values` of points, with a gap where no line may join them. */
  const gaps = (points, values) => pieces(points, values).flatMap((piece, index) => (index ? [null, ...piece] : piece));

  function curve(branch, points, training) {
    const few = points.loss.length <= 40, sole = instead(branch);
    const intervals = points.loss.map((_, i) => (points.half ? ` ± ${points.half[i].toFixed(4)}` : ""));
    return {
      type: "scatter", name: branch.title, x: gaps(points, points[state.axis]), y: gaps(points, points.loss),
      customdata: gaps(points, points.stage), text: gaps(points, intervals), connectgaps: false,
      mode: training ? "lines" : sole ? "markers" : few ? "lines+markers" : "lines", opacity: training && !sole ? 0.4 : 1,
      line: { color: hue(branch), width: training ? (sole ? 1.5 : 1) : branch.main ? 3 : 2 },
      marker: { symbol: branch.symbol, size: sole ? 9 : 6, color: hue(branch) },
      hovertemplate: `<b>%{y:.4f}%{text}</b> ${training ? "training loss" : `validation ${words.measure}`}<br>${AXES[state.axis].hover}` +
        "<br>%{customdata}<extra>%{fullData.name}</extra>",
    };
  }

  /** The interval around a mean curve: there along its upper edge, and back along the lower one. */
  function band(branch, points) {
    const edge = (sign) => pieces(points, points.loss.map((loss, i) => bound(loss + sign * points.half[i])));
    const around = (there, back) => there.flatMap((piece, i) => [...(i ? [null] : []), ...piece, ...[...back[i]].reverse()]);
    const x = pieces(points, points[state.axis]);
    return {
      type: "scatter", mode: "lines", x: around(x, x), y: around(edge(1), edge(-1)),
      fill: "toself", fillcolor: `${hue(branch)}2e`, line: { width: 0 }, hoverinfo: "skip",
    };
  }

  const bound = (loss) => (state.scale === "log" ? Math.max(loss, SMALLEST) : loss);

  function growths(branch) {
    return {
      type: "scatter", mode: "markers", name: branch.title, x: branch.growths.map((growth) => growth[state.axis]),
      y: branch.growths.map((growth) => growth.loss), customdata: branch.growths.map((growth) => `<b>${growth.word}</b> ${growth.label}`),
      marker: branch.apart
        ? { symbol: "diamond-open", size: 12, color: hue(branch), line: { width: 2 } }
        : { symbol: "diamond", size: 13, color: hue(branch), line: { color: style("--card"), width: 2 } },
      hovertemplate: `%{customdata} parameters<br>%{y:.4f} validation ${words.measure}${branch.apart ? ON_ALL : ""}<br>` +
        `${AXES[state.axis].hover}<extra>%{fullData.name}</extra>`,
    };
  }

  /** The final value on the whole held-out split, where the curve is of a part of it. */
  function whole(branch) {
    return {
      type: "scatter", mode: "markers", name: branch.title, x: [branch.end[state.axis]], y: [branch.end.loss],
      marker: { symbol: "circle-open", size: 10, color: hue(branch), line: { width: 2 } },
      hovertemplate: `<b>%{y:.4f}</b> validation ${words.measure}${ON_ALL}<br>${AXES[state.axis].hover}<extra>%{fullData.name}</extra>`,
    };
  }

  function ranges() {
    const largest = Math.max(0, ...shown().flatMap((branch) => branch.validation[state.axis]));
    const from = state.range === "late" ? LATE_SHARE * largest : 0;
    const losses = [], edges = [];
    for (const branch of shown()) {
      for (const points of state.training ? [branch.validation, branch.training] : [branch.validation]) {
        points.loss.forEach((loss, index) => {
          if (points[state.axis][index] < from || (loss <= 0 && state.scale === "log")) return;
          losses.push(loss);
          if (points.half && points === branch.validation) edges.push(loss - points.half[index], loss + points.half[index]);
        });
      }
      if (branch.end?.apart && (branch.end.loss > 0 || state.scale === "linear")) losses.push(branch.end.loss);
    }
    if (!losses.length || largest === 0) return null;
    const transform = state.scale === "log" ? Math.log10 : (value) => value;
    // Bands are shown, but the widest must not press the curves flat.
    const span = Math.max(...losses) - Math.min(...losses);
    const outer = (beyond, pick, sign) => beyond(pick(...losses) + sign * BAND_SHARE * span, pick(...losses, ...edges));
    const low = transform(bound(outer(Math.max, Math.min, -1))), high = transform(outer(Math.min, Math.max, 1));
    const room = 0.06 * (high - low || 0.1);
    return { x: [from - 0.01 * (largest - from), largest + 0.015 * (largest - from)], y: [low - room, high + room] };
  }

  /** Titles beside the ends of their curves, moved apart where they would overlap. */
  function endLabels(range, height) {
    const position = (loss) => {
      const value = state.scale === "log" ? Math.log10(loss) : loss;
      return (height * (value - range.y[0])) / (range.y[1] - range.y[0]);
    };
    const ends = shown().filter((branch) => branch.end).map((branch) => {
      const loss = branch.end.loss;
      return { branch, loss, place: Math.min(Math.max(position(loss), 0), height) };
    }).sort((a, b) => a.place - b.place);
    const tall = (end) => LABEL_HEIGHT * label(end).length;
    const apart = (one, other) => (tall(one) + tall(other)) / 2 + 3;
    ends.forEach((end, index) => {
      const below = ends[index - 1];
      end.moved = below ? Math.max(end.place, below.moved + apart(below, end)) : end.place;
    });
    // What was pushed out at the top comes back down, pushing the others.
    for (let index = ends.length - 1; index >= 0; index--) {
      const above = ends[index + 1];
      ends[index].moved = Math.min(ends[index].moved, above ? above.moved - apart(above, ends[index]) : height);
    }
    return ends.map((end) => ({
      xref: "paper", yref: "paper", x: 1, y: end.moved / height, xanchor: "left", yanchor: "middle", xshift: 6,
      align: "left", showarrow: false, font: { color: hue(end.branch), size: 13 },
      text: label(end).join("<br>"),
    }));
  }

  /** The title's lines and the number, which follows where it has room: with an interval on a line of its own. */
  function label(end) {
    const title = lines(end.branch.title).map(escapeText), half = end.branch.end.half;
    const number = `<b>${end.loss.toFixed(3)}${half === null ? "" : ` ± ${half.toFixed(3)}`}</b>`;
    return half !== null ? [...title, number] : [...title.slice(0, -1), `${title.at(-1)} ${number}`];
  }

  function lines(title) {
    const result = [""];
    for (const word of title.split(" ")) {
      if (result.at(-1) && result.at(-1).length + word.length > 20) result.push("");
      result[result.length - 1] += (result.at(-1) ? " " : "") + word;
    }
    return result;
  }

  const escapeText = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

  function growthLabels(range) {
    const inside = (growth) => !range || (growth[state.axis] >= range.x[0] && growth[state.axis] <= range.x[1]);
    return shown().filter((branch) => branch.main).flatMap((branch) => branch.growths.filter(inside).map((growth) => ({
      x: growth[state.axis], y: state.scale === "log" ? Math.log10(growth.loss) : growth.loss, text: growth.label,
      showarrow: true, arrowhead: 0, arrowwidth: 1, arrowcolor: style("--soft"), ax: 26, ay: -34, xanchor: "left",
      standoff: 8, font: { size: 12, color: style("--soft") },
    })));
  }

  function timeTicks(largest) {
    const steps = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 43200, 86400];
    let step = steps.find((candidate) => largest / candidate <= 8);
    if (!step) step = 86400 * Math.ceil(largest / 86400 / 8);
    const [unit, name] = step >= 86400 ? [86400, "d"] : step >= 3600 ? [3600, "h"] : step >= 60 ? [60, "min"] : [1, "s"];
    const values = Array.from({ length: Math.floor(largest / step) + 1 }, (_, index) => index * step);
    return { tickvals: values, ticktext: values.map((value) => (value ? `${+(value / unit).toFixed(1)} ${name}` : "0")) };
  }

  function layout() {
    const wide = chart.clientWidth >= WIDE;
    const range = ranges();
    const margin = { l: 58, r: wide ? 190 : 14, t: 18, b: 52 };
    const axis = {
      gridcolor: style("--line"), linecolor: style("--line"), zeroline: false, tickcolor: style("--line"),
      exponentformat: "power", automargin: false,
    };
    const ticks = state.axis === "seconds" && range ? timeTicks(range.x[1]) : state.axis === "units" ? { exponentformat: "SI" } : {};
    return {
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: style("--soft") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, margin, hovermode: "closest",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: style("--soft"), activecolor: style("--ink") },
      hoverlabel: { bgcolor: style("--card"), bordercolor: style("--line"), font: { color: style("--ink") }, align: "left" },
      xaxis: { ...axis, ...ticks, title: { text: `${AXES[state.axis].title}, ancestors included`, standoff: 12 }, range: range?.x },
      yaxis: {
        ...axis, title: { text: words.axis, standoff: 8 }, type: state.scale, range: range?.y,
        ...(state.scale === "log" ? { nticks: 8, minor: { showgrid: false }, tickformat: ".2~f" } : {}),
      },
      annotations: range
        ? [...growthLabels(range), ...(wide ? endLabels(range, chart.clientHeight - margin.t - margin.b) : [])]
        : [{ text: `no ${words.measure} was measured`, xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false }],
    };
  }

  function draw() {
    document.querySelectorAll("[data-setting]").forEach((group) => {
      group.querySelectorAll("button").forEach((button) => {
        button.setAttribute("aria-pressed", String(state[group.dataset.setting] === button.dataset.value));
      });
    });
    Plotly.react(chart, traces(), layout(), {
      displaylogo: false, responsive: false, modeBarButtons: [["toImage", "resetScale2d"]],
    });
  }

  function pressable(button, press) {
    button.addEventListener("click", () => { press(); draw(); });
  }

  document.querySelectorAll("[data-setting] button").forEach((button) => {
    pressable(button, () => { state[button.parentElement.dataset.setting] = button.dataset.value; });
  });
  const training = document.getElementById("training");
  // Only losses share an axis with the training loss.
  if (training) {
    training.setAttribute("aria-pressed", String(state.training));
    pressable(training, () => {
      state.training = !state.training;
      training.setAttribute("aria-pressed", String(state.training));
    });
  }
  branches.forEach((branch, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    button.style.setProperty("--hue", `var(--branch-${index})`);
    button.innerHTML = '<span class="swatch"></span>';
    button.append(branch.title);
    pressable(button, () => {
      if (!state.hidden.delete(branch.name)) state.hidden.add(branch.name);
      button.setAttribute("aria-pressed", String(!state.hidden.has(branch.name)));
    });
    document.getElementById("legend").append(button);
  });
  const copy = document.getElementById("copy");
  copy.addEventListener("click", async () => {
    const command = document.getElementById("command");
    try {
      await navigator.clipboard.writeText(command.textContent);
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    } catch {
      // Pages from disk may not write to the clipboard: select the text, so that one key press copies it.
      getSelection().selectAllChildren(command);
    }
  });
  let width = 0;
  new ResizeObserver(() => {
    if (chart.clientWidth !== width) {
      width = chart.clientWidth;
      draw();
    }
  }).observe(chart);
  window.addEventListener("themechange", draw);
  draw();
})();
