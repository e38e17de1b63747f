// What the pages leave out because only a script uses it (scripts/lean.py): put back before smalldocs.js looks for it.
(() => {
  "use strict";
  // a part of the sidebar folds
  document.querySelectorAll("#quarto-sidebar li > b").forEach((name, k) => {
    const list = name.nextElementSibling, box = document.createElement("div");
    list.id = "quarto-sidebar-section-" + (k + 1);
    list.className = "collapse list-unstyled sidebar-section depth1 show";
    const fold = `data-bs-toggle="collapse" data-bs-target="#${list.id}" role="navigation" aria-expanded="true"`;
    box.className = "sidebar-item-container";
    box.innerHTML = `<a class="sidebar-item-text sidebar-link text-start" ${fold}></a>`
      + `<a class="sidebar-item-toggle text-start" ${fold} aria-label="Toggle section"><i class="bi bi-chevron-right ms-2"></i></a>`;
    box.firstChild.textContent = name.textContent;
    name.parentElement.className = "sidebar-item sidebar-item-section";
    name.replaceWith(box);
  });
  // a cell's code is copied by a button
  document.querySelectorAll("div.sourceCode:not([id])").forEach((code) => {
    const box = document.createElement("div");
    box.className = "code-copy-outer-scaffold";
    code.replaceWith(box);
    box.append(code);
    box.insertAdjacentHTML("beforeend", '<button title="Copy to Clipboard" class="code-copy-button"><i class="bi"></i></button>');
  });
})();
