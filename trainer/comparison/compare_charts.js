"use strict";
// Draws the curves. Tables and pictures need none of this.
const data = JSON.parse(document.getElementById("data").textContent);
const controls = document.getElementById("controls");
const divs = [...document.querySelectorAll(".chart")];
const CHART = {height: 340, left: 66, right: 12, top: 28, bottom: 44};
const PLOT_PIXELS = CHART.height - CHART.top - CHART.bottom;
const MARK_PIXELS = 16;  // room for the name of a published figure
const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const boxes = () => [...controls.querySelectorAll("[name=run]")];

function choices() {
  return {
    axis: controls.elements.axis.value,
    logX: controls.elements.logX.checked,
    logY: controls.elements.logY.checked,
    shown: boxes().map(box => box.checked),
  };
}

function traces(chart, {axis, shown}) {
  const found = [];
  for (const line of chart.lines) {
    const run = data.runs[line.run], x = line.x[axis];
    if (!x) continue;
    const trace = {type: "scatter", mode: "lines", x, visible: shown[line.run], showlegend: false, hoverinfo: "skip"};
    if (line.error) {
      const edge = sign => line.y.map((y, i) => y + sign * line.error[i]);
      found.push({...trace, x: [...x, ...x.slice().reverse()], y: [...edge(1), ...edge(-1).reverse()], fill: "toself",
        fillcolor: run.color + "24", line: {width: 0}});
    }
    if (line.mean) found.push({...trace, y: line.y, line: {color: run.color, width: 1}, opacity: 0.3});
    const more = line.error ? ` ± %{customdata:${chart.format}}`
      : line.mean ? ` (recorded: %{customdata:${chart.format}})` : "";
    found.push({...trace, y: line.mean ?? line.y, customdata: line.error ?? line.y, name: run.name, showlegend: true,
      mode: line.dots ? "lines+markers" : "lines", line: {color: run.color, width: 2, dash: run.dash},
      marker: {size: 6}, hoverinfo: "all", hovertemplate: `%{y:${chart.format}}${more}`});
  }
  return found;
}

function layout(chart, {axis, logX, logY}) {
  const [ink, soft, line, card] = ["--ink", "--soft", "--line", "--card"].map(color);
  const common = {gridcolor: line, linecolor: soft, zeroline: false, exponentformat: "power", separatethousands: true};
  return {
    height: CHART.height, showlegend: false, hovermode: "x unified", hoverdistance: -1, dragmode: "zoom",
    margin: {l: CHART.left, r: CHART.right, t: CHART.top, b: CHART.bottom},
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {family: getComputedStyle(document.body).fontFamily, size: 12, color: ink},
    hoverlabel: {bgcolor: card, bordercolor: line, font: {color: ink}, namelength: 40},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink},
    xaxis: {...common, title: {text: data.axes[axis], standoff: 8}, type: logX ? "log" : "linear", rangemode: "tozero",
      exponentformat: "SI", hoverformat: ",.5~r", unifiedhovertitle: {text: `${data.axes[axis]} %{x}`}},
    yaxis: {...common, title: {text: chart.unit, standoff: 12}, type: logY ? "log" : "linear", tickformat: chart.tickFormat,
      automargin: "left",
      ...(logY ? {autorange: true} : {range: chart.scale})},
    // Hiding a run keeps what was zoomed into; another axis does not.
    uirevision: [axis, logX, logY].join(),
  };
}

// Published figures: all those in view that leave each other room, the first ones first.
function marks(chart, range, logY) {
  const soft = color("--soft"), taken = [];
  for (const mark of chart.marks) {
    const y = ((logY ? Math.log10(mark.value) : mark.value) - range[0]) / (range[1] - range[0]) * PLOT_PIXELS;
    if (y < 0 || y > PLOT_PIXELS - MARK_PIXELS) continue;
    if (taken.every(other => Math.abs(other.y - y) >= MARK_PIXELS)) taken.push({...mark, y});
  }
  return {
    shapes: taken.map(mark => ({type: "line", xref: "paper", x0: 0, x1: 1, y0: mark.value, y1: mark.value,
      layer: "below", line: {color: soft, width: 1, dash: "dot"}})),
    annotations: taken.map(mark => ({xref: "paper", x: 0, xanchor: "left", yanchor: "bottom", showarrow: false,
      y: logY ? Math.log10(mark.value) : mark.value, text: mark.label, hovertext: mark.source, borderpad: 1, bgcolor: color("--card") + "b0",
      font: {size: 11, color: soft}})),
  };
}

// A picture for slides: on white or dark as the page, with its title and a legend.
function download(chart, div) {
  const file = `${chart.title} ${data.axes[choices().axis]}`.toLowerCase().replaceAll(/\W+/g, "-");
  const figure = {data: div.data, layout: {...div.layout, showlegend: true, paper_bgcolor: color("--card"),
    title: {text: chart.title}, margin: {...div.layout.margin, t: 60}, height: 600, width: 1000}};
  return Plotly.downloadImage(figure, {format: "png", width: 1000, height: 600, scale: 2, filename: file});
}

function config(chart) {
  const button = {name: "download", title: "Download as a picture", icon: Plotly.Icons.camera,
    click: div => download(chart, div)};
  return {responsive: true, displaylogo: false,
    modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "autoScale2d", "resetScale2d", button]]};
}

// Made once: Plotly takes another function at a button for a change, begins anew, and forgets what was zoomed into.
const configs = data.charts.map(config);

async function drawChart(index, div, chosen) {
  const chart = data.charts[index], isNew = !div.layout;
  await Plotly.react(div, traces(chart, chosen), layout(chart, chosen), configs[index]);
  if (!chart.marks.length) return;
  const mark = () => Plotly.relayout(div, marks(chart, div.layout.yaxis.range, choices().logY));
  if (isNew) div.on("plotly_relayout", change => { if (Object.keys(change).some(key => key.startsWith("yaxis"))) mark(); });
  await mark();
}

async function drawAll() {
  const chosen = choices();
  for (const [index, div] of divs.entries()) await drawChart(index, div, chosen);
  document.body.dataset.drawn = JSON.stringify(chosen);  // tests wait for it
}

let drawing = Promise.resolve();
function redraw() { drawing = drawing.then(drawAll); }  // one after the other, however fast the clicks

if (divs.length) {
  for (const element of document.querySelectorAll(".needs-script")) element.hidden = false;
  controls.addEventListener("change", redraw);
  for (const [id, checked] of [["all", true], ["none", false]]) {
    document.getElementById(id).addEventListener("click", () => { for (const box of boxes()) box.checked = checked; redraw(); });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  redraw();
}
