"use strict";
// Refresh the page every ten seconds, and at once when its tab is shown again. A hidden page is not
// refreshed, nor one in which somebody types or has selected text. The refresh keeps what the reader
// does: the scroll positions, the focus, and what is typed into the filter.
const byId = (id) => document.getElementById(id);
// Elements that are e, or the links with the same address as e.
const like = (e) => e.id ? [byId(e.id)] : [...document.links].filter((a) => a.getAttribute("href") === e.getAttribute("href"));
let busy = false;
async function refresh() {
  const typing = () => document.activeElement.matches("form input, form select");
  const wait = () => document.hidden || typing() || byId("pause").checked || String(getSelection());
  if (busy || wait()) return;
  busy = true;
  let page = null;
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" }, signal: AbortSignal.timeout(30000) });
    const got = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (answer.ok && got.getElementById("now")) page = got; // a proxy may answer with another page
  } catch { }
  busy = false;
  byId("lost").hidden = page !== null;
  if (!page || wait()) return;
  const focus = document.activeElement, nth = like(focus).indexOf(focus);
  const form = document.querySelector("form"), newForm = page.querySelector("form");
  if (form && newForm) newForm.replaceWith(form);
  const scrolled = [...document.querySelectorAll(".scroll")].map((e) => [e.id, e.scrollLeft]);
  const y = scrollY;
  for (const part of ["main", "header", "#now"]) document.querySelector(part).replaceWith(page.querySelector(part));
  document.title = page.title;
  for (const [id, left] of scrolled) if (byId(id)) byId(id).scrollLeft = left;
  if (nth >= 0 && like(focus)[nth]) like(focus)[nth].focus({ preventScroll: true });
  scrollTo(scrollX, y);
}
setInterval(refresh, 10000);
document.addEventListener("visibilitychange", refresh);
byId("refresh").hidden = false;
