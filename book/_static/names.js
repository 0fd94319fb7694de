// Names for screen readers, where widgets and the theme give none, or one that differs from what is seen.
function giveNames() {
  for (const handle of document.querySelectorAll(".noUi-handle:not([aria-label])")) {
    const label = handle.closest(".widget-inline-hbox")?.querySelector(".widget-label");
    if (label) handle.setAttribute("aria-label", label.textContent);
  }
  for (const element of document.querySelectorAll("summary[aria-label], .search-button-field[aria-label]")) {
    if (element.textContent.trim()) element.removeAttribute("aria-label");
  }
}
giveNames();
new MutationObserver(giveNames).observe(document.body, { childList: true, subtree: true });
