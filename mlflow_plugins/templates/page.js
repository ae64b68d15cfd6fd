"use strict";
// "Compare" answers in place; without this script it answers on a page of its own.
document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (!form.matches("form.compare")) return;
  event.preventDefault();
  const button = form.querySelector("button");
  const output = form.querySelector("output");
  button.disabled = true;
  output.className = "";
  output.textContent = "Hashing…";
  try {
    const response = await fetch(form.action, { method: "POST", headers: { Accept: "application/json" } });
    if (!response.ok) throw new Error(response.status === 503 ? "Busy, try again in a minute." : "That did not work.");
    const found = await response.json();
    output.className = found.result.replace(" ", "-");
    output.textContent = found.message;
    output.title = found.digest || "";
  } catch (error) {
    output.className = "unreadable";
    output.textContent = error instanceof TypeError ? "The server does not answer." : error.message;
  } finally {
    button.disabled = false;
    button.focus();
  }
});
