"use strict";
// Draws the charts of a scaling law. The tables need none of this.
const data = JSON.parse(document.getElementById("data").textContent);
const divs = [...document.querySelectorAll(".chart")];
const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function traces(chart) {
  const found = [];
  for (const line of chart.lines) {
    const ink = line.color ?? color("--ink");
    const common = {type: "scatter", x: line.x, legendgroup: line.name, name: line.name, showlegend: false, hoverinfo: "skip"};
    if (line.low) {
      found.push({...common, x: [...line.x, ...line.x.slice().reverse()], y: [...line.low, ...line.high.slice().reverse()],
        mode: "lines", fill: "toself", fillcolor: ink, opacity: 0.15, line: {width: 0}});
    }
    const trace = {...common, y: line.y, mode: line.dots ? "markers" : "lines", showlegend: line.legend, hoverinfo: "all",
      line: {color: ink, width: line.width, dash: line.dash}, marker: {color: ink, size: line.dots?.size, symbol: line.dots?.symbol,
        line: {color: color("--card"), width: 1}},
      hovertemplate: `${line.texts ? "%{customdata}<br>" : ""}%{x:.4~s}, %{y:${chart.format}}<extra>%{fullData.name}</extra>`};
    if (line.texts) trace.customdata = line.texts;
    if (line.error) trace.error_y = {type: "data", symmetric: false, array: line.error.above, arrayminus: line.error.below, color: ink};
    found.push(trace);
  }
  return found;
}

function layout(chart) {
  const [ink, line, card] = ["--ink", "--line", "--card"].map(color);
  const common = {gridcolor: line, linecolor: line, zeroline: false, title: {standoff: 8}, exponentformat: "power"};
  return {
    height: 520, showlegend: true, hovermode: "closest", margin: {l: 70, r: 12, t: 28, b: 44},
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {family: getComputedStyle(document.body).fontFamily, size: 12, color: ink},
    hoverlabel: {bgcolor: card, bordercolor: line, font: {color: ink}, namelength: 60},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: ink},
    legend: {orientation: "h", x: 0, y: -0.2, yanchor: "top"},
    xaxis: {...common, title: {text: chart.x, standoff: 8}, type: "log", dtick: 1},
    yaxis: {...common, title: {text: chart.y, standoff: 12}, type: chart.logY ? "log" : "linear", automargin: "left",
      ...(chart.logY ? {dtick: 1} : {})},
  };
}

const CONFIG = {responsive: true, displaylogo: false,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "autoScale2d", "resetScale2d"]]};

async function drawAll() {
  for (const [index, div] of divs.entries()) {
    await Plotly.react(div, traces(data.charts[index]), layout(data.charts[index]), CONFIG);
  }
  document.body.dataset.drawn = "yes";  // tests wait for it
}

for (const element of document.querySelectorAll(".needs-script")) element.hidden = false;
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
drawAll();
