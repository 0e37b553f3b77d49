// The settings and their dialog: what it shows holds once Done is pressed and every field is valid; Cancel and Escape leave
// everything as it was. main.js is told by `changed`, whichever tab they were changed in.

import { loadSettings, saveSettings } from "./store.js";

const at = (id) => document.getElementById(id);

/** {system, temperature, maxTokens, key, theme}; null: the model's own. One object for good. */
export const settings = loadSettings();

function number(id) {
  const value = at(id).valueAsNumber;
  return Number.isFinite(value) ? value : null;
}

function applyTheme() {
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
  else delete document.documentElement.dataset.theme;
}

/** Take what is stored now: another tab has changed it. */
export function reloadSettings() {
  Object.assign(settings, loadSettings());
  applyTheme();
}

export function startSettings(changed) {
  const dialog = at("settings");
  at("open-settings").addEventListener("click", () => {
    at("system").value = settings.system;
    at("temperature").value = settings.temperature ?? "";
    at("max-tokens").value = settings.maxTokens ?? "";
    at("key").value = settings.key;
    at("theme").value = settings.theme;
    dialog.showModal();
  });
  at("cancel").addEventListener("click", () => dialog.close());
  dialog.querySelector("form").addEventListener("submit", (event) => {      // comes only where every field is valid
    event.preventDefault();
    Object.assign(settings, {
      system: at("system").value, temperature: number("temperature"), maxTokens: number("max-tokens"),
      key: at("key").value.trim(), theme: at("theme").value,
    });
    saveSettings(settings);
    applyTheme();
    dialog.close();
    changed();
  });
  applyTheme();
}
