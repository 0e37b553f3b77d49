// Looks at the server now and then, while the page can be seen: for the model until it is found, then at the metrics. After
// a 401 it asks no more until `watchAnew`, which the settings call: a wrong key does not get better.

import { glance, health, model } from "./api.js";

const GLANCE_MS = 3000;
const LOOK_AGAIN_MS = 1000;

let served = null;                 // {id, max_model_len}
let refused = false;
let timer = 0;
let round = 0;                     // a later look makes what an earlier one brings void
let tell = null;                   // {found(served), said(text), glanced({running, waiting, cache} | null, text)}

/** {id, max_model_len}, or null while the model is not found. */
export const servedModel = () => served;

/** A look at once, and from then on at its times. */
export async function look() {
  clearTimeout(timer);
  const mine = ++round, known = served;
  if (document.hidden || refused) return;
  const news = await (served ? seeMetrics() : seeModel());
  if (mine !== round) return;
  news();
  if (!refused) timer = setTimeout(look, known ? GLANCE_MS : served ? 0 : LOOK_AGAIN_MS);
}

/** Ask no more, if the error is a 401. */
export function refuse(error) {
  if (error.status !== 401) return;
  refused = true;
  round += 1;
  clearTimeout(timer);
}

async function seeMetrics() {
  try {
    const seen = await glance();
    return () => tell.glanced(seen, "");
  } catch (error) {
    return () => {
      refuse(error);
      tell.glanced(null, refused ? "" : "no connection");
      if (refused) tell.said(error.message);
    };
  }
}

async function seeModel() {
  try {
    const found = await model();
    return () => tell.found(served = found);
  } catch (error) {
    const state = error.status === 401 ? null : await health().catch(() => null);
    const share = state?.total ? ` ${Math.round((100 * state.done) / state.total)} %` : "";
    return () => {
      refuse(error);
      tell.said(state?.status === "loading" ? `The model is loading: ${state.what}${share}` : error.message);
    };
  }
}

export function watchAnew() {
  served = null;
  refused = false;
  look();
}

export function startWatch(told) {
  tell = told;
  document.addEventListener("visibilitychange", look);
  look();
}
