"use strict";
(function () {
  const data = JSON.parse(document.getElementById("samples").textContent);
  const part = (id) => document.getElementById(id);
  const list = part("tokens");
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
  document.querySelectorAll(".box").forEach((box) => {
    const sign = () => box.classList.toggle("more", box.scrollWidth - box.clientWidth - box.scrollLeft > 2);
    box.addEventListener("scroll", sign, {passive: true});
    new ResizeObserver(sign).observe(box);
  });
  if (!list) return;
  const choice = part("sample"), layer = part("layer"), shown = part("layer-name"), detail = part("detail"), about = part("about");
  let text = 0, active = 0;

  const make = (name, className, content) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (content !== undefined) node.textContent = content;
    return node;
  };
  const signed = (value) => {
    const size = Math.abs(value).toFixed(3);
    return Number(size) === 0 ? size : (value < 0 ? "\u2212" : "+") + size;
  };
  const sample = () => data.texts[text];
  const weights = (token) => sample().weights[Number(layer.value)][token];
  const largest = (row) => row.indexOf(Math.max(...row));
  const isRead = (row) => row.some((weight) => weight > 0);
  const mark = (expert) => "e" + (expert % 8);
  function paint() {
    shown.textContent = data.routers[Number(layer.value)];
    layer.setAttribute("aria-valuetext", shown.textContent);
    Array.from(list.querySelectorAll(".tok")).forEach((node, token) => {
      const row = weights(token), expert = largest(row);
      node.className = isRead(row) ? "tok " + mark(expert) + " s" + Math.min(4, 1 + Math.floor(row[expert] / 250.001)) : "tok unread";
    });
    explain();
  }

  function explain() {
    const token = sample().tokens[active], row = weights(active);
    const head = make("p", "", "Token " + (active + 1) + " of " + sample().tokens.length + ": ");
    head.append(make("code", "", JSON.stringify(token.text)), document.createTextNode(", "));
    if (token.loss === null) head.append((active < sample().source ? "source, " : active ? "" : "the first, ") + "not predicted");
    else head.append("loss " + token.loss.toFixed(2) + " nats");
    head.append("; " + data.routers[Number(layer.value)] + (isRead(row) ? "" : ", which does not read it"));
    const bars = make("ul");
    (isRead(row) ? row : []).map((weight, expert) => [weight, expert]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).forEach(([weight, expert]) => {
      const line = make("li", mark(expert));
      const bar = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      bar.setAttribute("viewBox", "0 0 1000 10");
      bar.setAttribute("preserveAspectRatio", "none");
      bar.setAttribute("aria-hidden", "true");
      const filled = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      filled.setAttribute("width", String(weight));
      filled.setAttribute("height", "10");
      bar.append(filled);
      const name = make("span", "chip " + mark(expert), data.experts[expert]);
      name.title = data.experts[expert];
      line.append(name, bar, make("data", "", (weight / 1000).toFixed(2)));
      bars.append(line);
    });
    detail.replaceChildren(head, bars);
  }

  function select(token, scroll) {
    const nodes = list.querySelectorAll(".tok");
    active = Math.max(0, Math.min(nodes.length - 1, token));
    const old = list.querySelector("[aria-selected=true]");
    if (old) old.setAttribute("aria-selected", "false");
    nodes[active].setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", nodes[active].id);
    if (scroll) nodes[active].scrollIntoView({ block: "nearest" });
    explain();
  }

  function open(place) {
    text = place;
    list.replaceChildren();
    const heading = (side) => {
      const node = make("span", "side", side);
      node.setAttribute("aria-hidden", "true");
      list.append(node);
    };
    sample().tokens.forEach((token, number) => {
      if (sample().source && number === 0) heading("Source");
      if (sample().source && number === sample().source) heading("Target");
      const node = make("span", "tok");
      node.id = "t" + number;
      node.setAttribute("role", "option");
      node.setAttribute("aria-selected", "false");
      token.text.split("\n").forEach((line, place) => {
        if (place) node.append(make("span", "nl", "⏎"), "\n");
        node.append(line);
      });
      list.append(node);
    });
    about.replaceChildren("Mean loss " + sample().loss.toFixed(3) + " nats per token.");
    const left = Object.entries(sample().without).map(([expert, change]) => expert + " " + signed(change));
    if (left.length) about.append(" With one expert left out: " + left.join(", ") + ".");
    active = Math.min(1, sample().tokens.length - 1);
    paint();
    select(active, false);
  }

  data.texts.forEach((each, place) => {
    const earlier = data.texts.slice(0, place).filter((other) => other.domain === each.domain).length;
    const option = make("option", "", each.domain + (earlier ? ", " + (earlier + 1) : ""));
    option.value = String(place);
    choice.append(option);
  });
  layer.max = String(data.routers.length - 1);
  layer.value = String(Math.floor(data.routers.length / 2));
  if (data.routers.length === 1) layer.hidden = true;
  const at = (event) => {
    const node = event.target.closest ? event.target.closest(".tok") : null;
    return node ? Number(node.id.slice(1)) : null;
  };
  list.addEventListener("pointermove", (event) => { if (at(event) !== null && at(event) !== active) select(at(event), false); });
  list.addEventListener("click", (event) => { if (at(event) !== null) select(at(event), false); });
  list.addEventListener("keydown", (event) => {
    const to = { ArrowRight: active + 1, ArrowDown: active + 10, ArrowLeft: active - 1, ArrowUp: active - 10, Home: 0, End: 1e9 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    select(to, true);
  });
  layer.addEventListener("input", paint);
  choice.addEventListener("change", () => open(Number(choice.value)));
  open(0);
})();
