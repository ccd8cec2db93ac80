"use strict";
const root = document.documentElement;
const theme = document.getElementById("theme");
const isDark = () => root.dataset.theme
  ? root.dataset.theme === "dark"
  : window.matchMedia("(prefers-color-scheme: dark)").matches;
theme.hidden = false;
theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; });

const filter = document.getElementById("filter");
const count = document.getElementById("shown");
const rows = [...document.querySelectorAll("#rows tbody tr, #outcomes tbody tr")];
filter.closest("p").hidden = false;
filter.addEventListener("input", () => {
  const wanted = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !wanted.every((word) => text.includes(word));
    shown += row.hidden ? 0 : 1;
  }
  count.textContent = `${shown} of ${rows.length} rows shown`;
});

for (const zoom of document.querySelectorAll(".zoom")) {
  zoom.addEventListener("click", () => {
    zoom.setAttribute("aria-pressed", zoom.getAttribute("aria-pressed") === "true" ? "false" : "true");
  });
}
