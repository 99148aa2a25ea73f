// What pages add to Quarto's: names for those who hear controls, boxes that say when
// they scroll, pictures that open in their own size.
(() => {
  "use strict";

  const SCROLLS =
    "main pre, main .sourceCode, main .symtele-wide, main math, main p, main li";

  // A slider says the setting it stands at, not the number of it.
  const tell = (slider) => {
    const label = slider.querySelector(".widget-label");
    const readout = slider.querySelector(".widget-readout");
    const handle = slider.querySelector(".noUi-handle");
    if (!label || !handle) return;
    const value = readout ? readout.textContent : handle.ariaValueNow;
    if (handle.ariaLabel !== label.textContent)
      handle.ariaLabel = label.textContent;
    if (handle.ariaValueText !== value) handle.ariaValueText = value;
  };

  // Buttons that stand for one choice: which is it, and what is chosen.
  const tellButtons = (box) => {
    const label = box.querySelector(".widget-label");
    const group = box.querySelector(":scope > div");
    if (group) group.setAttribute("role", "group");
    if (group && label) group.ariaLabel = label.textContent;
    for (const button of box.querySelectorAll("button"))
      button.ariaPressed = String(button.classList.contains("mod-active"));
  };

  const PLAY = { play: "Play", pause: "Pause", stop: "Stop", retweet: "Repeat" };
  const tellPlay = (button) => {
    const icon = button.querySelector("[class*=fa-]");
    const kind = icon && /fa-(play|pause|stop|retweet)/.exec(icon.className);
    if (!kind || button.ariaLabel === PLAY[kind[1]]) return;
    button.ariaLabel = button.title = PLAY[kind[1]];
  };

  const name = () => {
    document.querySelectorAll(".widget-slider").forEach(tell);
    document.querySelectorAll(".widget-toggle-buttons").forEach(tellButtons);
    document.querySelectorAll(".widget-play button").forEach(tellPlay);
    document.querySelectorAll(".symtele-control").forEach(offer);
  };

  // What is wider than its box can be moved by the keyboard too, and says so.
  const mark = () => {
    for (const box of document.querySelectorAll(SCROLLS)) {
      const style = getComputedStyle(box).overflowX;
      const wide = box.scrollWidth > box.clientWidth + 1 && style !== "visible";
      if (wide === box.classList.contains("symtele-scrolls")) continue;
      box.classList.toggle("symtele-scrolls", wide);
      if (wide) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
      const next = box.nextElementSibling;
      if (next?.classList.contains("symtele-hint")) next.remove();
      if (!wide) continue;
      const hint = document.createElement("p");
      hint.className = "symtele-hint";
      hint.textContent = "scrolls sideways →";
      box.after(hint);
    }
  };

  const dialog = document.createElement("dialog");
  dialog.className = "symtele-zoom";
  dialog.addEventListener("click", () => dialog.close());

  const open = (image) => {
    const whole = new Image();
    whole.src = image.src;
    whole.alt = image.alt;
    const close = document.createElement("button");
    close.textContent = "Close";
    dialog.replaceChildren(close, whole);
    dialog.ariaLabel = image.alt;
    dialog.showModal();
  };

  // A button below a picture, seen where the page is narrower than the picture.
  const offer = (box) => {
    if (box.querySelector(":scope > .symtele-enlarge")) return;
    const button = document.createElement("button");
    button.className = "symtele-enlarge";
    button.textContent = "Enlarge the picture";
    button.addEventListener("click", () => {
      const all = [...box.querySelectorAll("img")];
      open(all.find((image) => image.getClientRects().length));
    });
    box.append(button);
  };

  document.body.append(dialog);
  document.querySelectorAll("figure.symtele-figure").forEach(offer);
  new MutationObserver(name).observe(document.body, {
    subtree: true,
    childList: true,
    characterData: true,
    attributeFilter: ["class", "aria-valuetext"],
  });
  new ResizeObserver(mark).observe(document.querySelector("main"));
  addEventListener("load", mark);
  document.addEventListener("toggle", mark, true); // what was folded has no width
  name();
})();
