// SPDX-License-Identifier: Apache-2.0
// The script of all pages, before their own. A page defines
//   WORDS: {language: {key: text}}, and `language`, the key of the shown one;
//   STORAGE: the start of its names in the browser's storage, if it has any;
//   expertName(e): the name of an expert;
//   tipOf(span): the children of the tooltip of a token.

const HUES = 8;
const UNDERLINES = 5;

const $ = (id) => document.getElementById(id);

function t(key, args = {}) {
  return WORDS[language][key].replace(/\{(\w+)\}/g, (_, name) => args[name]);
}

function number(value, digits) {
  const both = {minimumFractionDigits: digits, maximumFractionDigits: digits};
  // Adding 0 makes a negative zero positive.
  return (Number(value.toFixed(digits)) + 0).toLocaleString(language, both);
}

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function button(key, act, attributes = {}) {
  const made = make('button', {type: 'button', ...attributes}, t(key));
  made.addEventListener('click', act);
  return made;
}

// Sets the language of the elements that name their texts, and of the button
// for the other language.
function translatePage(chosen) {
  language = chosen;
  document.documentElement.lang = chosen === 'zh' ? 'zh-CN' : 'en';
  for (const one of document.querySelectorAll('[data-i18n]')) {
    one.textContent = t(one.dataset.i18n);
  }
  for (const one of document.querySelectorAll('[data-i18n-placeholder]')) {
    one.placeholder = t(one.dataset.i18nPlaceholder);
  }
  for (const one of document.querySelectorAll('[data-label]')) {
    one.setAttribute('aria-label', t(one.dataset.label));
  }
  const other = chosen === 'zh' ? 'en' : 'zh';
  $('language').textContent = WORDS[other].language;
  $('language').lang = other;
}

const languageOfBrowser = () =>
  /^zh/i.test(navigator.language) ? 'zh' : 'en';

function darkNow() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === 'dark'
    : matchMedia('(prefers-color-scheme: dark)').matches;
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  $('theme').setAttribute('aria-pressed', darkNow());
}

// ---- Storage of the browser: 'localStorage' or 'sessionStorage'

function recall(store, name) {
  try {
    return JSON.parse(window[store].getItem(STORAGE + name));
  } catch {
    return null; // Storage may be forbidden.
  }
}

// Whether a value is stored; null removes it.
function remember(store, name, value) {
  try {
    if (value === null) window[store].removeItem(STORAGE + name);
    else window[store].setItem(STORAGE + name, JSON.stringify(value));
    return true;
  } catch {
    return false; // Storage may be forbidden, or full.
  }
}

// ---- Answers of a server

// Yields the data of server-sent events, independent of chunk boundaries.
// `lost` makes the error of a lost connection.
async function* eventsOf(body, lost) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = '';
  let data = [];
  const onError = (error) => {
    throw error.name === 'AbortError' ? error : lost();
  };
  try {
    for (let done = false; !done;) {
      const read = await reader.read().catch(onError);
      done = read.done;
      rest += decoder.decode(read.value, {stream: !done});
      // A carriage return at the end may be the first half of a line end.
      const lines = (rest + (done ? '\n\n' : '')).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith('data:')) data.push(line.slice(5).trimStart());
        if (line || !data.length) continue;
        yield data.join('\n');
        data = [];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// ---- Tokens and their experts

const hue = (expert) => `x${expert % HUES}`;
const look = (expert) => `expert ${hue(expert)} u${expert % UNDERLINES}`;
const visible = (text) => `“${text.replace(/\n/g, '\u21b5')}”`;

// The expert with the largest weight; -1 if all are 0.
function strongest(weights) {
  const best = weights.indexOf(Math.max(...weights));
  return weights[best] > 0 ? best : -1;
}

// Bars of the strongest experts.
function weightRows(weights, digits) {
  const order = weights.map((weight, e) => [e, weight])
    .sort((a, b) => b[1] - a[1]);
  const shown = order.slice(0, HUES).flatMap(([e, weight]) => {
    const fill = make('span', {class: `fill ${hue(e)}`});
    fill.style.width = `${Math.min(100, Math.max(0, 100 * weight))}%`;
    return [make('span', {}, expertName(e)),
      make('span', {class: 'track'}, fill),
      make('span', {class: 'number'}, number(weight, digits))];
  });
  const rest = order.length - HUES;
  const more = rest > 0 ? [make('span', {}, t('more', {n: rest}))] : [];
  return make('div', {class: 'rows'}, ...shown, ...more);
}

// The share in percent of each strongest expert, {expert: its tokens}.
function legendItems(counts) {
  const total = [...counts.values()].reduce((a, b) => a + b, 0);
  return [...counts].sort((a, b) => a[0] - b[0]).map(([e, n]) =>
    make('li', {}, make('span', {class: look(e)}, expertName(e)),
      ` ${number(100 * n / total, 0)} %`));
}

function showTip(span) {
  $('tip').replaceChildren(...tipOf(span));
  $('tip').hidden = false;
  const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const own = $('tip').getBoundingClientRect();
  const left = Math.min(at.left, innerWidth - own.width - 8);
  const above = at.top - own.height - 8;
  $('tip').style.left = `${Math.max(8, left)}px`;
  $('tip').style.top = `${above > 8 ? above : at.bottom + 8}px`;
  document.querySelector('[aria-describedby=tip]')
    ?.removeAttribute('aria-describedby');
  span.setAttribute('aria-describedby', 'tip');
}

function hideTip() {
  $('tip').hidden = true;
}

// Moves the tooltip of a token on scrolling, as long as the token is in sight.
function moveTip() {
  const span = document.querySelector('[aria-describedby=tip]');
  if ($('tip').hidden || !span) return;
  const {top, bottom} = span.getBoundingClientRect();
  if (bottom < 0 || top > innerHeight) hideTip();
  else showTip(span);
}

// One token of a group is in the tab order; arrow keys move to the others.
function onTokenKey(event) {
  const span = event.target.closest('.token');
  if (!span) return;
  const {firstElementChild: first, lastElementChild: last} = span.parentNode;
  const next = {
    ArrowLeft: span.previousElementSibling,
    ArrowRight: span.nextElementSibling,
    ArrowUp: span.previousElementSibling,
    ArrowDown: span.nextElementSibling,
    Home: first,
    End: last,
  }[event.key];
  if (!next) return;
  event.preventDefault();
  span.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function listenToTokens(box) {
  const token = (event) => event.target.closest?.('.token');
  for (const what of ['mouseover', 'focusin']) {
    box.addEventListener(what,
      (event) => token(event) && showTip(token(event)));
  }
  for (const what of ['mouseout', 'focusout']) {
    box.addEventListener(what, (event) => token(event) && hideTip());
  }
  box.addEventListener('keydown', onTokenKey);
  document.addEventListener('scroll', moveTip, {capture: true, passive: true});
}

