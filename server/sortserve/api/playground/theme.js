// Before the first paint: the colours that the reader chose, or else those of the system.
{
  const chosen = localStorage.getItem("sortserve.theme");
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = chosen ?? (dark ? "dark" : "light");
}
