"use strict";
(function () {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const themes = {
    light: {
      text: "#1b2330", muted: "#6b7684", grid: "#e3e7ec", page: "#ffffff",
      local: "#c8480b", accumulated: "#1f6fb5",
      calm0: "#f1f4f8", calm1: "#86b6e2", wrong0: "#fdbf6f", wrong1: "#e25a1c", wrong2: "#6d0416",
    },
    dark: {
      text: "#e6eaf0", muted: "#97a3b3", grid: "#2c3541", page: "#171c24",
      local: "#ff8b4d", accumulated: "#6db3f2",
      calm0: "#202834", calm1: "#2f669e", wrong0: "#c06a14", wrong1: "#ff7a3d", wrong2: "#ffe1cf",
    },
  };
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const config = {
    responsive: true, displaylogo: false, displayModeBar: "hover",
    // Named one by one: a new version of plotly must not bring a button that sends data anywhere.
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  };

  // "@name" is a colour of the theme.
  function coloured(value, theme) {
    if (typeof value === "string") return value[0] === "@" && value.slice(1) in theme ? theme[value.slice(1)] : value;
    if (Array.isArray(value)) return value.map((v) => coloured(v, theme));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, coloured(v, theme)]));
  }

  function draw(name) {
    const theme = themes[name];
    for (const place of document.querySelectorAll("[data-figure]")) {
      const figure = coloured(figures[place.dataset.figure], theme);
      const layout = figure.layout;
      layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
      layout.font = { family: "system-ui, sans-serif", size: 12, color: theme.text };
      layout.hoverlabel = { bgcolor: theme.page, bordercolor: theme.muted, font: { color: theme.text } };
      layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: theme.muted, activecolor: theme.text };
      for (const axis of ["xaxis", "yaxis"]) {
        layout[axis] = { gridcolor: theme.grid, linecolor: theme.muted, ...layout[axis] };
      }
      Plotly.react(place, figure.data, layout, config);
    }
  }

  const current = () => draw(dark.matches ? "dark" : "light");
  current();
  dark.addEventListener("change", current);

  // On paper: light, and everything open.
  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((d) => { d.open = true; });
    draw("light");
  });
  window.addEventListener("afterprint", () => {
    closed.forEach((d) => { d.open = false; });
    current();
  });
})();
